package cbtmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

var (
	// ErrMismatch means: the saved map is of a device of another size or in
	// blocks of another size.
	ErrMismatch = errors.New("saved change map does not fit")
	// ErrInUse means: a take has been made since the map began, so that no
	// older history can be put before it.
	ErrInUse = errors.New("change map already has takes")
)

// A saved map is
//
//	0        header (see header), sequence 0, 56 bytes
//	56       active map, one byte a block
//	...      readable map, one byte a block
//	last 4   CRC-32C of all before, little endian
const savedHeader = 8 * headerWords

// Save is the map as it is kept while the device has no filter: every write that
// was marked is in it. A corrupted map is refused with ErrCorrupted. What Save
// returned is stale from the next mark on. The caller must not use it more than once.
func (m *Map) Save() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.corrupted() {
		return nil, fmt.Errorf("save change map: %w", ErrCorrupted)
	}
	return m.encodeSavedLocked(), nil
}

func (m *Map) encodeSavedLocked() []byte {
	h := m.header
	h.sequence = 0
	head := h.encode().bytes()
	b := make([]byte, 0, savedSize(m.geometry))
	b = append(b, head[:]...)
	b = append(b, m.active...)
	b = append(b, m.readable...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func savedSize(g geometry) int64 { return savedHeader + 2*g.count + 4 }

// Load gives a new map the history that Save returned: generation, number and
// marks. What has been marked in m before counts as changed since the last take.
// The caller has proved that nothing else wrote to the device in between. On an
// error m is as it was: ErrForeign, ErrTorn, ErrMismatch, ErrInUse if m has had a
// take, or ErrCorrupted if m is corrupted.
func (m *Map) Load(saved []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.loadLocked(saved); err != nil {
		return fmt.Errorf("load change map: %w", err)
	}
	return nil
}

func (m *Map) loadLocked(b []byte) error {
	h, active, readable, err := decodeSaved(b, m.geometry)
	if err != nil {
		return err
	}
	return m.takeOverLocked(h.generation, h.number, active, func(from, to int) { copy(m.readable[from:to], readable[from:to]) })
}

// takeOverLocked gives a new map a history. read sets a part of the readable map.
func (m *Map) takeOverLocked(generation uuid.UUID, number uint8, active []byte, read func(from, to int)) error {
	switch {
	case m.corrupted():
		return ErrCorrupted
	case m.number != 0:
		return ErrInUse
	}
	// Marks are only ever raised until the new header counts.
	m.rewrite(m.active, func(i int, old byte) byte {
		if old != 0 {
			return number + 1
		}
		return active[i]
	})
	m.eachPiece(read)
	m.commitLocked(generation, number)
	return nil
}

// decodeSaved checks b against the geometry it is to be loaded into. The maps are parts of b.
func decodeSaved(b []byte, want geometry) (h header, active, readable []byte, err error) {
	if len(b) < savedHeader {
		return h, nil, nil, fmt.Errorf("%w: only %d bytes", ErrTorn, len(b))
	}
	var w rawHeader
	for i := range w {
		w[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	h, g, err := w.decode()
	if err != nil {
		return h, nil, nil, err
	}
	if g != want {
		return h, nil, nil, fmt.Errorf("%w: %d bytes in blocks of %d, not %d in blocks of %d",
			ErrMismatch, g.size, int64(1)<<g.shift, want.size, int64(1)<<want.shift)
	}
	if int64(len(b)) != savedSize(g) {
		return h, nil, nil, fmt.Errorf("%w: not %d bytes long", ErrTorn, savedSize(g))
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return h, nil, nil, fmt.Errorf("%w: checksum", ErrTorn)
	}
	active, readable = body[savedHeader:savedHeader+g.count], body[savedHeader+g.count:]
	if above(active, h.number+1) || above(readable, h.number) {
		return h, nil, nil, fmt.Errorf("%w: mark above number %d", ErrTorn, h.number)
	}
	return h, active, readable, nil
}

func above(b []byte, limit byte) bool {
	for _, v := range b {
		if v > limit {
			return true
		}
	}
	return false
}
