package cbtmap

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
)

// History is what outlives a power failure of a map, with the help of a write-intent
// log (package intentlog).
type History struct {
	Info
	Marks []byte // of the active map, a byte a block
}

// Follow has f told what the map says of itself: now, and whenever a take, a generation
// or a load changes it, before anything is marked with the new number. With an error, which
// is ErrCorrupted, the map is not to be trusted any more. f is called under the map's
// mutex, and must neither block nor call the map. Called again, it is told in
// the place of the one before.
func (m *Map) Follow(f func(Info, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.follower = f
	f(m.infoLocked(), nil)
}

// tellLocked tells the follower that h is going to be the header.
func (m *Map) tellLocked(g geometry, h header, err error) {
	if m.follower != nil {
		m.follower(infoOf(g, h), err)
	}
}

// Copy copies the active map while marks go on. It has every mark that was made before,
// and any of those that are made meanwhile. Marks above ChangesNumber + 1 are of takes
// made meanwhile. It fails with ErrGeneration if a generation begins meanwhile, or with
// ErrCorrupted.
func (m *Map) Copy() (History, error) {
	i, err := m.Info()
	if err != nil {
		return History{}, fmt.Errorf("copy change map: %w", err)
	}
	h := History{Info: i, Marks: make([]byte, i.BlockCount)}
	for at := 0; at < len(h.Marks); at += maxHeld {
		if err := m.copyPart(h, at); err != nil {
			return History{}, fmt.Errorf("copy change map: %w", err)
		}
	}
	return h, nil
}

// copyPart copies the marks from at on, as many as may be under one hold of mu.
func (m *Map) copyPart(h History, at int) error {
	m.mu.Lock()
	defer m.release()
	if err := m.checkReaderLocked(h.GenerationID); err != nil {
		return err
	}
	dst := h.Marks[at:min(at+maxHeld, len(h.Marks))]
	for w := at / 8; len(dst) > 0; w++ {
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], atomic.LoadUint64(&m.activeWords[w]))
		dst = dst[copy(dst, b[:]):]
	}
	return nil
}

// Restore gives a new map a history, as [Map.Load] does.
func (m *Map) Restore(h History) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.infoLocked()
	switch {
	case h.DeviceCapacity != i.DeviceCapacity || h.BlockSize != i.BlockSize || int64(len(h.Marks)) != i.BlockCount:
		return fmt.Errorf("restore change map: %w: %d bytes in blocks of %d, not %d in blocks of %d",
			ErrMismatch, h.DeviceCapacity, h.BlockSize, i.DeviceCapacity, i.BlockSize)
	case h.ChangesNumber > maxNumber || above(h.Marks, h.ChangesNumber+1):
		return fmt.Errorf("restore change map: %w: mark above number %d", ErrTorn, h.ChangesNumber)
	}
	err := m.takeOverLocked(h.GenerationID, h.ChangesNumber, h.Marks, func(from, to int) {
		for i := from; i < to; i++ {
			m.readable[i] = min(h.Marks[i], h.ChangesNumber)
		}
	})
	if err != nil {
		return fmt.Errorf("restore change map: %w", err)
	}
	return nil
}
