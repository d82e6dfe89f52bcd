package cbtmap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/google/uuid"
)

var (
	// ErrCorrupted means: the map is not to be trusted; copy the whole device.
	ErrCorrupted = errors.New("change map is corrupted")
	// ErrGeneration means: the asked generation has ended; copy the whole device.
	ErrGeneration = errors.New("generation of changes has ended")
	// ErrNotTaken means: there was no take of the asked number in this generation.
	ErrNotTaken = errors.New("no take of that number")
)

// Info says what the readable map is.
type Info struct {
	DeviceCapacity int64 // bytes
	BlockSize      int64 // bytes, a power of two
	BlockCount     int64 // bytes of the readable map
	GenerationID   uuid.UUID
	ChangesNumber  uint8 // of the last take
}

// Range is a range of the device in bytes.
type Range struct {
	Offset int64
	Length int64
}

func (m *Map) infoLocked() Info {
	return Info{
		DeviceCapacity: m.geometry.size,
		BlockSize:      1 << m.shift,
		BlockCount:     m.count,
		GenerationID:   m.generation,
		ChangesNumber:  m.number,
	}
}

// Info describes the readable map. With ErrCorrupted the sizes are still right.
func (m *Map) Info() (Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.corrupted() {
		return m.infoLocked(), ErrCorrupted
	}
	return m.infoLocked(), nil
}

func (m *Map) checkReaderLocked(generation uuid.UUID) error {
	if m.corrupted() {
		return ErrCorrupted
	}
	if m.generation != generation {
		return fmt.Errorf("%w: %v, now %v", ErrGeneration, generation, m.generation)
	}
	return nil
}

// ReadMap reads the readable map of the generation from block off on, as
// [io.ReaderAt] does. A map read in pieces is right if every piece was read: a
// take between two pieces can only add changes, or is refused with ErrGeneration.
// Bytes above ChangesNumber do not occur but for such a take.
func (m *Map) ReadMap(generation uuid.UUID, dst []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkReaderLocked(generation); err != nil {
		return 0, fmt.Errorf("read change map: %w", err)
	}
	if off < 0 {
		return 0, fmt.Errorf("read change map at %d: %w", off, ErrRange)
	}
	n := copy(dst, m.readable[min(off, m.count):])
	if n < len(dst) {
		return n, io.EOF
	}
	return n, nil
}

// Changes returns the ranges of the device that changed between take since and
// the last take, ascending, as long as they can be, the last one ending with the
// device. They are those of the moment of the call, for which the readable map is
// copied; the sequence may be used at any time after it, and more than once.
func (m *Map) Changes(generation uuid.UUID, since uint64) (iter.Seq[Range], error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkReaderLocked(generation); err != nil {
		return nil, fmt.Errorf("list changes: %w", err)
	}
	if since > uint64(m.number) {
		return nil, fmt.Errorf("list changes: %w: %d, last is %d", ErrNotTaken, since, m.number)
	}
	taken, g := bytes.Clone(m.readable), m.geometry
	return func(yield func(Range) bool) {
		for i := 0; i < len(taken); {
			if uint64(taken[i]) <= since {
				i++
				continue
			}
			first := int64(i)
			for i < len(taken) && uint64(taken[i]) > since {
				i++
			}
			off := first << g.shift
			if !yield(Range{Offset: off, Length: min(int64(i)<<g.shift, g.size) - off}) {
				return
			}
		}
	}, nil
}
