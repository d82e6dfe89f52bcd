package cbtmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
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

// Save writes the map to a file, for a clean shutdown: every write that was
// marked is in it. It is on stable storage when Save returns nil; path never
// holds a part of it. A corrupted map is refused with ErrCorrupted. The file is
// stale from the next mark on, and the caller removes it before that.
func (m *Map) Save(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.corrupted() {
		return fmt.Errorf("save change map: %w", ErrCorrupted)
	}
	if err := writeFile(machine{}, path, m.encodeSavedLocked()); err != nil {
		return fmt.Errorf("save change map: %w", err)
	}
	return nil
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

// filesystem is what saving needs of one: the machine's, or one that a test
// takes the power from.
type filesystem interface {
	create(path string) (file, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(path string) error
}

type file interface {
	io.WriteCloser
	Sync() error
}

type machine struct{}

func (machine) create(path string) (file, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
}
func (machine) rename(from, to string) error { return os.Rename(from, to) }
func (machine) remove(path string) error     { return os.Remove(path) }
func (machine) syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// writeFile replaces the file at path durably by one that holds b.
func writeFile(fs filesystem, path string, b []byte) error {
	f, err := fs.create(path + newSuffix)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fs.rename(path+newSuffix, path)
	}
	if err != nil {
		return errors.Join(err, fs.remove(path+newSuffix))
	}
	return fs.syncDir(filepath.Dir(path))
}

// Load gives a new map the history that Save wrote: generation, number and
// marks. What has been marked in m before counts as changed since the last take.
// The caller has proved that nothing else wrote to the device in between. On an
// error m is as it was: ErrForeign, ErrTorn, ErrMismatch, ErrInUse if m has had a
// take, ErrCorrupted if m is corrupted, or what opening and reading the file
// gave.
func (m *Map) Load(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load change map: %w", err)
	}
	defer f.Close()
	// One byte more than fits tells a longer file.
	b, err := io.ReadAll(io.LimitReader(f, savedSize(m.geometry)+1))
	if err != nil {
		return fmt.Errorf("load change map: %w", err)
	}
	if err := m.loadLocked(b); err != nil {
		return fmt.Errorf("load change map %s: %w", path, err)
	}
	return nil
}

func (m *Map) loadLocked(b []byte) error {
	h, active, readable, err := decodeSaved(b, m.geometry)
	switch {
	case err != nil:
		return err
	case m.corrupted():
		return ErrCorrupted
	case m.number != 0:
		return ErrInUse
	}
	// Marks are only ever raised until the new header counts.
	m.rewrite(m.active, func(i int, old byte) byte {
		if old != 0 {
			return h.number + 1
		}
		return active[i]
	})
	m.eachPiece(func(from, to int) { copy(m.readable[from:to], readable[from:to]) })
	m.commitLocked(h.generation, h.number)
	return nil
}

// decodeSaved checks b, of which no more than a byte too many need be there,
// against the geometry it is to be loaded into. The maps are parts of b.
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
