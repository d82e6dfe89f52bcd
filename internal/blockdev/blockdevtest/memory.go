package blockdevtest

import (
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// DiscardEffect says what a discarded range of a Memory device reads as
// afterwards: real disks do any of these.
type DiscardEffect uint8

const (
	// DiscardZero makes the range read as zeroes.
	DiscardZero DiscardEffect = iota
	// DiscardKeep leaves the range as it was.
	DiscardKeep
	// DiscardJunk fills the range with JunkByte.
	DiscardJunk
)

// JunkByte is what DiscardJunk leaves behind.
const JunkByte = 0xdb

// pageSize is the unit in which a Memory takes memory.
const pageSize = 4096

// Memory is a file in memory: a block device of fixed size, a regular file
// that grows up to a limit, or a piece of process memory seen as a file. It is
// sparse, so a file of a terabyte costs only what was written.
//
// With LoseUnsynced it keeps the durability rules of blockdev and can lose,
// at PowerFail, whatever they do not promise.
//
// A Memory may be used from several threads.
type Memory struct {
	name string

	mu        sync.Mutex
	size      int64
	limit     int64 // how far a regular file can grow; 0: a device
	blockSize int64
	discards  DiscardEffect
	pages     map[int64]*page // by offset / pageSize
	mapped    []byte          // instead of pages

	// What a power failure could undo; nil unless LoseUnsynced.
	unsynced   map[int64][]version // by offset / sector.Size
	syncedSize int64
	clock      uint64 // counts completions
}

type page struct {
	shared bool // with a Clone: copy before changing
	data   [pageSize]byte
}

// version is what a sector held at one moment since it was last made durable.
// The first of a sector's versions is the durable one, the last is its content.
type version struct {
	data [sector.Size]byte
	by   *landing // nil for the first
}

// landing is the fate of one write, shared by the versions it made.
type landing struct {
	done uint64 // the Memory's clock at its completion, 0 before
}

// NewMemoryDevice makes a block device of size bytes, a multiple of
// sector.Size. It reads as zeroes.
func NewMemoryDevice(name string, size int64) *Memory {
	if size < 0 || size%sector.Size != 0 {
		panic(fmt.Sprintf("blockdevtest: device of %d bytes", size))
	}
	return &Memory{name: name, size: size, blockSize: sector.Size, pages: make(map[int64]*page)}
}

// NewMemoryFile makes an empty regular file that can grow to limit bytes;
// ENOSPC beyond. Like a file opened with O_DIRECT it wants whole sectors.
func NewMemoryFile(name string, limit int64) *Memory {
	m := NewMemoryDevice(name, 0)
	m.limit = max(limit, 1)
	return m
}

// MapMemory makes mem itself a file, like a file in /run that is mapped shared: what
// is written to the one is read from the other. It takes any alignment.
func MapMemory(name string, mem []byte) *Memory {
	return &Memory{name: name, size: int64(len(mem)), blockSize: 1, mapped: mem}
}

// Name is the name given at creation.
func (m *Memory) Name() string { return m.name }

// Size is the file's size in bytes.
func (m *Memory) Size() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.size
}

// Resize sets the size in bytes, as a grown disk or a truncated file has it.
func (m *Memory) Resize(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size < m.size {
		m.fillLocked(size, m.size-size, 0, nil)
	}
	m.size, m.syncedSize = size, size
}

// Limit is how far a regular file can grow, in bytes; 0 for a device.
func (m *Memory) Limit() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.limit
}

// SetLimit changes how far a regular file can grow, in bytes; a device stays as
// it is.
func (m *Memory) SetLimit(limit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.limit != 0 {
		m.limit = max(limit, 1)
	}
}

// SetBlockSize sets the unit, in bytes, that operations must be multiples of;
// EINVAL otherwise.
func (m *Memory) SetBlockSize(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blockSize = n
}

// SetDiscards says what a Discard of a device does. A regular file always
// reads as zeroes where it was discarded.
func (m *Memory) SetDiscards(e DiscardEffect) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.discards = e
}

// LoseUnsynced gives the file a volatile cache: from now on PowerFail undoes
// what was not made durable.
func (m *Memory) LoseUnsynced() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mapped != nil {
		panic("blockdevtest: mapped memory has no durable layer")
	}
	m.unsynced = make(map[int64][]version)
	m.syncedSize = m.size
}

// PowerFail sets every sector that was not made durable to one of the contents that it
// has had since it last was durable. choose picks one of n. Operations in flight must
// be dealt with first (Sched.PowerFail does both).
func (m *Memory) PowerFail(choose func(n int) int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.unsyncedLocked() {
		history := m.unsynced[s]
		m.storeLocked(s*sector.Size, history[choose(len(history))].data[:])
	}
	clear(m.unsynced)
	if m.size != m.syncedSize && choose(2) == 0 {
		if m.syncedSize < m.size {
			m.fillLocked(m.syncedSize, m.size-m.syncedSize, 0, nil)
		}
		m.size = m.syncedSize
	}
	m.syncedSize = m.size
}

// Left is what a power failure now would leave of the file: see PowerFail.
func (m *Memory) Left(choose func(n int) int) *Memory {
	left := m.Clone()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.unsyncedLocked() {
		history := m.unsynced[s]
		left.storeLocked(s*sector.Size, history[choose(len(history))].data[:])
	}
	return left
}

// Sync makes all of the file durable, past any queue.
func (m *Memory) Sync() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.unsynced)
	m.syncedSize = m.size
}

// unsyncedLocked are the sectors that a power failure could undo, in order.
func (m *Memory) unsyncedLocked() []int64 {
	sectors := make([]int64, 0, len(m.unsynced))
	for s := range m.unsynced {
		sectors = append(sectors, s)
	}
	slices.Sort(sectors)
	return sectors
}

// ReadAt copies the file's bytes at off into p, past any queue. Beyond the end
// it fails.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < 0 || off+int64(len(p)) > m.size {
		return 0, fmt.Errorf("read %s at %d+%d: beyond the end at %d", m.name, off, len(p), m.size)
	}
	m.loadLocked(off, p)
	return len(p), nil
}

// WriteAt stores p at off, past any queue and durable at once. A regular file
// grows.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	end := off + int64(len(p))
	if off < 0 || end > m.size && (m.limit == 0 || end > m.limit) {
		return 0, fmt.Errorf("write %s at %d+%d: beyond the end at %d", m.name, off, len(p), m.size)
	}
	m.size = max(m.size, end)
	m.syncedSize = m.size
	m.storeLocked(off, p)
	for s := off / sector.Size; s < (end+sector.Size-1)/sector.Size; s++ {
		delete(m.unsynced, s)
	}
	return len(p), nil
}

// Clone is a copy of the file as it is now; pages are shared until one of the
// two changes. Only for files that are not mapped.
func (m *Memory) Clone() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Memory{name: m.name, size: m.size, limit: m.limit, blockSize: m.blockSize, discards: m.discards}
	c.pages = make(map[int64]*page, len(m.pages))
	for n, p := range m.pages {
		p.shared = true
		c.pages[n] = p
	}
	return c
}

// check is the errno that op must fail with whatever happens, or 0.
func (m *Memory) check(op *blockdev.Op) unix.Errno {
	m.mu.Lock()
	defer m.mu.Unlock()
	if op.Kind == blockdev.Flush {
		return 0
	}
	end := op.Off + op.Len
	switch {
	case op.Off < 0 || op.Len <= 0 || end < 0:
		return unix.EINVAL
	case op.Off%m.blockSize != 0 || op.Len%m.blockSize != 0:
		return unix.EINVAL
	case op.Kind == blockdev.Allocate && m.limit == 0 && m.mapped == nil:
		return unix.EOPNOTSUPP
	case op.MinSize > m.size && m.limit != 0:
		return unix.EIO
	case end <= m.size:
		return 0
	case m.limit == 0:
		if op.Kind == blockdev.Write {
			return unix.ENOSPC
		}
		return unix.EIO
	case op.Kind == blockdev.Read:
		return unix.EIO
	case end > m.limit:
		return unix.ENOSPC
	}
	return 0
}

// apply lets n bytes of op, off bytes into it, take effect.
func (m *Memory) apply(op *blockdev.Op, by *landing, off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := op.Off + off
	switch op.Kind {
	case blockdev.Read:
		m.loadLocked(at, op.Buf.At(off).Bytes(n))
	case blockdev.Write:
		m.growLocked(at + n)
		m.writeLocked(at, op.Buf.At(off).Bytes(n), by)
	case blockdev.WriteZeroes:
		m.growLocked(at + n)
		m.fillLocked(at, n, 0, by)
	case blockdev.Allocate:
		m.growLocked(at + n)
	case blockdev.Flush: // has its effect when it completes
	case blockdev.Discard:
		switch {
		case m.limit != 0 || m.mapped != nil || m.discards == DiscardZero:
			m.fillLocked(at, min(n, m.size-at), 0, by)
		case m.discards == DiscardJunk:
			m.fillLocked(at, n, JunkByte, by)
		}
	}
}

func (m *Memory) growLocked(end int64) { m.size = max(m.size, end) }

// begun is the present moment. A Flush that is submitted now covers the writes up to
// it.
func (m *Memory) begun() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.clock
}

// completed settles op, begun at mark, which has taken effect and succeeds.
func (m *Memory) completed(op *blockdev.Op, by *landing, mark uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock++
	by.done = m.clock
	if m.unsynced == nil {
		return
	}
	switch {
	case op.Kind == blockdev.Flush:
		for s := range m.unsynced {
			m.settleLocked(s, func(w *landing) bool { return w.done != 0 && w.done <= mark })
		}
		m.syncedSize = m.size
	case op.Kind == blockdev.Write && op.FUA:
		for s := op.Off / sector.Size; s < (op.Off+op.Len)/sector.Size; s++ {
			m.settleLocked(s, func(w *landing) bool { return w == by })
		}
	}
}

// settleLocked makes the last version of a sector for which durable says yes the
// sector's first version.
func (m *Memory) settleLocked(sector int64, durable func(*landing) bool) {
	history := m.unsynced[sector]
	for i := len(history) - 1; i > 0; i-- {
		if !durable(history[i].by) {
			continue
		}
		if i == len(history)-1 {
			delete(m.unsynced, sector)
		} else {
			m.unsynced[sector] = history[i:]
		}
		return
	}
}

// fillLocked writes n times b at off.
func (m *Memory) fillLocked(off, n int64, b byte, by *landing) {
	var p [pageSize]byte
	if b != 0 {
		for i := range p {
			p[i] = b
		}
	}
	for n > 0 {
		part := min(n, pageSize-off%pageSize)
		if b == 0 && by == nil && part == pageSize && m.mapped == nil {
			delete(m.pages, off/pageSize)
		} else {
			m.writeLocked(off, p[:part], by)
		}
		off, n = off+part, n-part
	}
}

// writeLocked stores p at off on behalf of a write, nil when it is durable at
// once.
func (m *Memory) writeLocked(off int64, p []byte, by *landing) {
	if m.unsynced == nil || by == nil {
		m.storeLocked(off, p)
		return
	}
	for n := int64(0); n < int64(len(p)); n += sector.Size {
		s := (off + n) / sector.Size
		history := m.unsynced[s]
		if history == nil {
			history = make([]version, 1, 2)
			m.loadLocked(s*sector.Size, history[0].data[:])
		}
		history = append(history, version{by: by})
		copy(history[len(history)-1].data[:], p[n:])
		m.unsynced[s] = history
	}
	m.storeLocked(off, p)
}

func (m *Memory) loadLocked(off int64, p []byte) {
	if m.mapped != nil {
		dma(p, m.mapped[off:])
		return
	}
	for len(p) > 0 {
		at := off % pageSize
		n := int(min(int64(len(p)), pageSize-at))
		if pg := m.pages[off/pageSize]; pg != nil {
			dma(p[:n], pg.data[at:])
		} else {
			clear(p[:n])
		}
		off, p = off+int64(n), p[n:]
	}
}

func (m *Memory) storeLocked(off int64, p []byte) {
	if m.mapped != nil {
		dma(m.mapped[off:], p)
		return
	}
	for len(p) > 0 {
		at := off % pageSize
		pg := m.pages[off/pageSize]
		switch {
		case pg == nil:
			pg = &page{}
			m.pages[off/pageSize] = pg
		case pg.shared:
			pg = &page{data: pg.data}
			m.pages[off/pageSize] = pg
		}
		n := dma(pg.data[at:], p)
		off, p = off+int64(n), p[n:]
	}
}
