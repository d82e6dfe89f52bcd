package cbtmap

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// ErrRange means: a range does not lie on the device.
var ErrRange = errors.New("range outside the device")

// everyByte times a byte is a word of that byte.
const everyByte = 0x0101010101010101

// Map is the change map of one device. See the package comment for what may be
// called when.
type Map struct {
	// Mark reads these without mu. They change under mu, while the gate is closed.
	layout
	pattern uint64 // the number of the coming take in every byte

	mu sync.Mutex
	// under mu:
	header
	path     string            // of the mapped file, "" if there is none
	follower func(Info, error) // see Follow; may be nil

	last atomic.Pointer[Info] // see Last

	// onRelease is a test's chance to do something whenever work that is done in
	// parts has given mu back.
	onRelease func()
}

// maxHeld is how many blocks are marked or read under one hold of mu: a take, for
// which all writes wait, may wait for that.
const maxHeld = 64 << 10

func (m *Map) release() {
	m.mu.Unlock()
	if m.onRelease != nil {
		m.onRelease()
	}
}

// mark writes the byte of pattern, the highest that the map may hold, for the blocks
// that [off, off+length) touches. The range lies on the device and is not empty.
// Words that already say so are only read.
func (g *geometry) mark(words []uint64, off, length int64, pattern uint64) {
	first, last := int(off>>g.shift), int((off+length-1)>>g.shift)
	for w := first / 8; w <= last/8; w++ {
		mask := ^uint64(0)
		if w == first/8 {
			mask = maskFrom(first % 8)
		}
		if w == last/8 {
			mask &= maskTo(last % 8)
		}
		for {
			old := atomic.LoadUint64(&words[w])
			if (old^pattern)&mask == 0 || atomic.CompareAndSwapUint64(&words[w], old, old&^mask|pattern&mask) {
				break
			}
		}
	}
}

// Mark notes that the bytes [off, off+length) of the device are about to be
// written. It must return before the write is submitted. It never fails: a range
// that is not on the device, thus a device that is not what the map was made
// for, makes the map corrupted.
func (m *Map) Mark(off, length int64) {
	if !m.contains(off, length) {
		m.SetCorrupted()
		return
	}
	if length > 0 {
		m.mark(m.activeWords, off, length, m.pattern)
	}
}

// MarkBoth notes a write to the bytes [off, off+length) of an image of the
// device: from then on they differ from the take's for those who read the image,
// and from the next take's. What is beyond the device is ignored: the device may
// have shrunk since the take.
func (m *Map) MarkBoth(off, length int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.markBothLocked(off, length)
}

func (m *Map) markBothLocked(off, length int64) {
	if off, length = m.clip(off, length); length > 0 {
		m.mark(m.activeWords, off, length, m.pattern)
		m.mark(m.readableWords, off, length, everyByte*uint64(m.number))
	}
}

// MarkDirty counts the ranges as changed, in the active and in the readable map:
// all of them, or none and an error that names a wrong one and wraps ErrRange, or
// ErrCorrupted. Each block is marked once, however many ranges it is in.
//
// A take may fall into the middle of it. What is marked before belongs to that
// take, what is marked after is shown at once to those who read it, and belongs
// to the next take as well: each block as if it had been marked alone. So whoever
// asks after MarkDirty for changes since a take from before it is told of all.
func (m *Map) MarkDirty(ranges []Sectors) error {
	i, err := m.Info()
	if err != nil {
		return fmt.Errorf("mark ranges dirty: %w", err)
	}
	capacity := uint64(i.DeviceCapacity / sector.Size)
	for _, r := range ranges {
		if r.Count == 0 || r.Count > capacity || r.First > capacity-r.Count {
			return fmt.Errorf("mark sectors %d:%d of %d dirty: %w", r.First, r.Count, capacity, ErrRange)
		}
	}
	for _, r := range Merge(slices.Clone(ranges)) {
		off, end := int64(r.First)*sector.Size, int64(r.First+r.Count)*sector.Size
		for off < end {
			if off, err = m.markPart(off, end); err != nil {
				return fmt.Errorf("mark ranges dirty: %w", err)
			}
		}
	}
	return nil
}

// markPart marks blocks of [off, end), as many as may be under one hold of mu,
// and returns where it goes on.
func (m *Map) markPart(off, end int64) (next int64, err error) {
	m.mu.Lock()
	defer m.release()
	if m.corrupted() {
		return off, ErrCorrupted
	}
	part := int64(maxHeld) << m.shift
	next = min(end, off-off%part+part)
	m.markBothLocked(off, next-off)
	return next, nil
}

// Switch is the take: what was marked until now becomes readable, under the
// number in the Info it returns. It cannot fail. After number 254, and if the map
// was corrupted, it begins a new generation instead, with this take as number 0.
func (m *Map) Switch() Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.corrupted() || m.number == maxNumber {
		m.beginLocked(0)
		return m.infoLocked()
	}
	m.eachPiece(func(from, to int) { copy(m.readable[from:to], m.active[from:to]) })
	m.commitLocked(m.generation, m.number+1)
	return m.infoLocked()
}

// MaxNumber is the highest number of a take: the take after it begins a generation.
const MaxNumber = maxNumber

// Void makes good a take that did not come to be after all, on this device or on
// another of the same snapshot: before is the Info from before it. The number is
// not used again; instead everything marked until the void take counts as changed
// since it, so that not even a reader who believed in it loses anything. Without
// a take since before, or if it was voided already, Void changes nothing.
func (m *Map) Void(before Info) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.generation == before.GenerationID && m.number == before.ChangesNumber {
		return
	}
	m.rewrite(m.active, func(_ int, old byte) byte {
		if old == m.number {
			return old + 1
		}
		return old
	})
}

// NewGeneration forgets the history: every block counts as changed. A corrupted
// map is whole again.
func (m *Map) NewGeneration() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.beginLocked(1)
}

// beginLocked starts a generation with every byte of the active map set to start.
// A process that dies in between leaves a corrupted map.
func (m *Map) beginLocked(start byte) {
	m.store(flagWord, 1)
	m.commitLocked(uuid.New(), 0)
	m.fill(m.active, start)
	m.fill(m.readable, 0)
	m.store(flagWord, 0)
}

func (m *Map) commitLocked(generation uuid.UUID, number uint8) {
	h := m.header
	h.sequence++
	h.generation, h.number = generation, number
	m.tellLocked(m.geometry, h, nil)
	m.commit(h)
	m.setHeader(h)
}

func (m *Map) setHeader(h header) {
	m.header = h
	m.pattern = everyByte * uint64(h.number+1)
	info := m.infoLocked()
	m.last.Store(&info)
}

// Next is what a map is going to be for a device of another size.
type Next struct{ m *Map }

// Prepare makes what the map is to be for a device of size bytes, with the parameters it was
// made with, in a new generation. Nothing changes before [Map.Replace].
func (m *Map) Prepare(size int64) (*Next, error) {
	m.mu.Lock()
	path, params := m.path, m.params
	m.mu.Unlock()
	next, err := prepare(path, size, params, 1)
	if err != nil {
		return nil, fmt.Errorf("resize change map: %w", err)
	}
	return &Next{next}, nil
}

// Discard is for what is not to replace the map after all.
func (n *Next) Discard() {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	_ = n.m.unmapLocked()
	n.m.removeNew()
}

// Replace makes the map what Prepare has made, which every block counts as changed in. After
// an error the map is as it was.
func (m *Map) Replace(n *Next) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := n.m
	if err := next.nameNew(); err != nil {
		return fmt.Errorf("resize change map: %w", err)
	}
	m.tellLocked(next.geometry, next.header, nil)
	err := m.unmapLocked()
	m.layout = next.layout
	m.setHeader(next.header)
	return err
}

// Resize makes the map one for a device of size bytes, in a new generation, with
// the parameters it was made with. On an error the map is corrupted: it
// describes a device that is not there any more.
func (m *Map) Resize(size int64) error {
	next, err := m.Prepare(size)
	if err == nil {
		err = m.Replace(next)
	}
	if err != nil {
		m.SetCorrupted()
	}
	return err
}

// SetCorrupted makes readers fail with ErrCorrupted until the next take, Resize
// or NewGeneration.
func (m *Map) SetCorrupted() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.corruptLocked()
}

func (m *Map) corruptLocked() {
	m.store(flagWord, 1)
	m.tellLocked(m.geometry, m.header, ErrCorrupted)
}

// Corrupted says whether readers fail with ErrCorrupted.
func (m *Map) Corrupted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.corrupted()
}

// Memory is what the map lies in, for [Adopt]. It is another one after Resize.
func (m *Map) Memory() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.memory
}
