package cbtmap

import (
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

func (m *Map) infoLocked() Info { return infoOf(m.geometry, m.header) }

func infoOf(g geometry, h header) Info {
	return Info{
		DeviceCapacity: g.size,
		BlockSize:      1 << g.shift,
		BlockCount:     g.count,
		GenerationID:   h.generation,
		ChangesNumber:  h.number,
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

// Last is Info as of the last take, and whether the map is corrupted it does not say. It
// waits for nobody.
func (m *Map) Last() Info { return *m.last.Load() }

func (m *Map) checkReaderLocked(generation uuid.UUID) error {
	if m.corrupted() {
		return ErrCorrupted
	}
	if m.generation != generation {
		return fmt.Errorf("%w: %v, now %v", ErrGeneration, generation, m.generation)
	}
	return nil
}

// ReadMap reads the readable map of the generation from block off on, as [io.ReaderAt]
// does. ReadMap reads in parts, and so may the caller. The result is right if every part
// was read, because a take between two parts can only add changes, or ends the
// generation: then the next part fails with ErrGeneration. Bytes above ChangesNumber
// occur only after such a take.
func (m *Map) ReadMap(generation uuid.UUID, dst []byte, off int64) (n int, err error) {
	for {
		part := dst[n:min(len(dst), n+maxHeld)]
		k, err := m.readPart(generation, part, off+int64(n))
		if n += k; err != nil || n == len(dst) {
			return n, err
		}
	}
}

func (m *Map) readPart(generation uuid.UUID, dst []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.release()
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
// device. The map is read in parts as the sequence goes on, as [Map.ReadMap] does
// it: a take meanwhile can only add to it. An error, which is ErrGeneration or
// ErrCorrupted, ends the sequence: it is not whole then. The sequence may be used
// more than once.
func (m *Map) Changes(generation uuid.UUID, since uint64) (iter.Seq2[Range, error], error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.checkReaderLocked(generation); err != nil {
		return nil, fmt.Errorf("list changes: %w", err)
	}
	if since > uint64(m.number) {
		return nil, fmt.Errorf("list changes: %w: %d, last is %d", ErrNotTaken, since, m.number)
	}
	g := m.geometry
	return func(yield func(Range, error) bool) {
		part := make([]byte, min(g.count, maxHeld))
		first := int64(-1) // of the changed blocks that end where we are; -1: none do
		for at := int64(0); at < g.count; {
			n, err := m.ReadMap(generation, part, at)
			if err != nil && !errors.Is(err, io.EOF) {
				yield(Range{}, fmt.Errorf("list changes: %w", err))
				return
			}
			for i, number := range part[:n] {
				changed := uint64(number) > since
				if changed == (first >= 0) {
					continue
				}
				if block := at + int64(i); changed {
					first = block
				} else {
					if !yield(g.bytes(first, block), nil) {
						return
					}
					first = -1
				}
			}
			at += int64(n)
		}
		if first >= 0 {
			yield(g.bytes(first, g.count), nil)
		}
	}, nil
}

// bytes is the range of the blocks from first up to end.
func (g geometry) bytes(first, end int64) Range {
	off := first << g.shift
	return Range{Offset: off, Length: min(end<<g.shift, g.size) - off}
}
