package diffarea

import (
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Chunk sizes that a log takes, in bytes.
const (
	MinChunkSize = 4 << 10
	MaxChunkSize = 64 << 20
)

// Limits of the store queue. A small store waits while another is under way or
// copies are about to land, so that the next one is larger; full ones go out
// side by side.
const (
	storeBatch = 1 << 20   // bytes in one write to the storage, or one chunk if that is more
	maxStores  = 4         // writes to the storage at a time
	storeAsync = 256 << 10 // bytes from which a store is left to a kernel worker
)

// Pool is the memory of a log: a ring buffer of slots, one chunk each. Mem and
// File are the same bytes: copies and stores go through Mem, image devices read
// and write File straight from and to the kernel's pages.
type Pool struct {
	Mem  []byte // a multiple of the chunk size, page aligned, off the Go heap
	File blockdev.File
}

// LogConfig is what a log is made of.
type LogConfig struct {
	ChunkSize int64 // bytes, a power of two from MinChunkSize to MaxChunkSize
	Pool      Pool
	// State is LogStateSize bytes of zeroed memory that outlives the process.
	State []byte
	// Portion is by how much storage grows at a time at most, in bytes. Growing
	// starts when less than half of it is left.
	Portion int64
	// OnEvent is called for each event, on any queue's thread and with no lock
	// held; it must not block.
	OnEvent func(Event)
}

// Log is the difference log of one snapshot: equal regions, one chunk each,
// shared by all its devices.
//
//	          stored           landed    copying
//	regions ▓▓▓▓▓▓▓▓▓▓▓▓│░░░░░░░░░░░░░░░│▒▒▒▒▒▒│
//	                    storeNext              next
//	                    └─ region r: pool slot r mod P ─┘
//
// A region is handed out at next, filled in its pool slot, and leaves from
// storeNext together with its neighbours for the storage. Its slot is free
// again when the words say STORED.
//
// Locks: mu guards everything below it, for all queues. It is a leaf: no
// callback, I/O or other lock happens under it.
type Log struct {
	chunkSize int64
	shift     uint
	portion   int64
	pool      Pool
	poolSlots Region
	onEvent   func(Event)
	state     *logState

	// dead is the errno that broke the log, 0 while it is alive.
	dead atomic.Uint32
	// files are those of sources, for readers without the lock.
	files atomic.Pointer[[]blockdev.File]

	mu         sync.Mutex
	areas      []*Area
	slots      []slot
	next       Region // first region not handed out
	storeNext  Region // first region not handed to a store
	landed     Region // from storeNext to here all have landed
	urgent     Region // somebody waits for the store of what is before it
	waiting    copyList
	stores     int // writes to the storage under way
	freeStores *store
	sources    []*source
	growth     growth
	expected   Region // chunks of areas to come, and of those that have
	chunks     Region // of the areas
	lost       Region // handed out, and no chunk's: their copies died with a process
	lowSent    bool
	events     []Event // to be delivered
	busy       int     // copies, stores and growths under way
	ended      uint64  // stores and growths
	released   bool    // dead, and nobody waits for a store any more
	closing    func()
}

// slot is what the pool knows of the region in it.
type slot struct {
	state   slotState
	area    *Area
	chunk   Chunk
	waiters waitList // for STORED
}

// slotState is a slot's part in the ring buffer.
//
//	FREE ──> COPYING ──> LANDED ──> STORING ──> FREE
//	            └──────> DEAD ───────────────────┘   the copy failed
type slotState uint8

const (
	slotFree slotState = iota
	slotCopying
	slotLanded
	slotDead
	slotStoring
)

// CheckChunkSize says whether a log can have chunks of size bytes.
func CheckChunkSize(size int64) error {
	if size < MinChunkSize || size > MaxChunkSize || bits.OnesCount64(uint64(size)) != 1 {
		return fmt.Errorf("chunk size %d: not a power of two from %d (4 KiB) to %d (64 MiB)", size, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// NewLog makes a log with no storage and no areas.
func NewLog(c LogConfig) (*Log, error) {
	l, err := newLog(c, newLogState(c.State))
	if err != nil {
		return nil, err
	}
	l.state.format(l.shift, int64(l.poolSlots))
	return l, nil
}

func newLog(c LogConfig, s *logState) (*Log, error) {
	if err := CheckChunkSize(c.ChunkSize); err != nil {
		return nil, err
	}
	n := int64(len(c.Pool.Mem)) / c.ChunkSize
	if n < 1 {
		return nil, fmt.Errorf("pool of %d bytes: smaller than one chunk of %d", len(c.Pool.Mem), c.ChunkSize)
	}
	l := &Log{
		chunkSize: c.ChunkSize,
		shift:     uint(bits.TrailingZeros64(uint64(c.ChunkSize))),
		portion:   max(c.Portion, c.ChunkSize),
		pool:      c.Pool,
		poolSlots: Region(n),
		onEvent:   c.OnEvent,
		slots:     make([]slot, n),
		state:     s,
	}
	l.files.Store(new([]blockdev.File))
	l.growth.init(l)
	return l, nil
}

// ChunkSize is the size of a chunk and of a region, in bytes.
func (l *Log) ChunkSize() int64 { return l.chunkSize }

// Err is the errno that broke the log, 0 while it is whole.
func (l *Log) Err() unix.Errno { return unix.Errno(l.dead.Load()) }

func (l *Log) slot(r Region) *slot { return &l.slots[r%l.poolSlots] }

// memory is the pool memory of a region that is in it.
func (l *Log) memory(r Region) []byte {
	off := int64(r%l.poolSlots) << l.shift
	return l.pool.Mem[off : off+l.chunkSize : off+l.chunkSize]
}

// locate says where the data of a chunk with word w begins; w is IN_MEMORY or
// STORED.
func (l *Log) locate(w Word) (blockdev.File, int64) {
	r := w.Region()
	if w.State() == InMemory {
		return l.pool.File, int64(r%l.poolSlots) << l.shift
	}
	ext := l.state.find(r)
	return l.file(ext.source), ext.off + int64(r-ext.first)<<l.shift
}

// settle ends every change of the log: it does what the change made possible.
// mu is held on entry and released. woken are waiters that the change itself
// set free. w is the worker of the calling thread.
func (l *Log) settle(w *Worker, woken waitList) {
	granted := l.grantLocked()
	if l.dead.Load() != 0 {
		// Whoever waits for a place has nothing to wait for any more.
		granted.append(&l.waiting)
		for i := 0; !l.released && i < len(l.slots); i++ {
			l.slots[i].waiters.moveTo(&woken)
		}
		l.released = true
	}
	refused := l.refusedLocked()
	var stores *store
	for last := &stores; ; last = &(*last).next {
		if *last = l.nextStoreLocked(); *last == nil {
			break
		}
	}
	grow := l.nextGrowthLocked()
	l.warnLocked()
	events := l.events
	l.events = nil
	var closed func()
	if l.busy == 0 && l.closing != nil {
		closed, l.closing = l.closing, nil
	}
	l.mu.Unlock()

	for stores != nil {
		s := stores
		stores = s.next
		s.submit(w)
	}
	if grow {
		l.growth.submit(w)
	}
	for c := granted.pop(); c != nil; c = granted.pop() {
		if c.w == w {
			w.ready.push(c)
		} else {
			c.w.q.Post(&c.task)
		}
	}
	w.startReady()
	for _, e := range events {
		l.onEvent(e)
	}
	wakeAll(w, woken.head)
	for _, done := range refused {
		done(fmt.Errorf("the snapshot is broken: %w", l.Err()))
	}
	if closed != nil {
		closed()
	}
}

// grantLocked hands out regions to waiting copies, first come first served,
// as long as there is a free slot and storage to back it.
func (l *Log) grantLocked() (granted copyList) {
	for l.waiting.head != nil && l.dead.Load() == 0 {
		s := l.slot(l.next)
		if s.state != slotFree {
			break // back-pressure: a store in progress will free it
		}
		if l.next >= l.state.capacity() {
			if !l.canGrowLocked() {
				l.events = append(l.events, Event{Kind: NoSpace})
				l.breakLocked(unix.ENOSPC, l.waiting.head.area)
			}
			break
		}
		c := l.waiting.pop()
		c.region, c.granted = l.next, true
		s.state, s.area, s.chunk = slotCopying, c.area, c.chunk
		l.next++
		l.state.setNext(l.next)
		granted.push(c)
	}
	return granted
}

// breakLocked ends the log's life: images give errors from now on, nothing
// more is copied, original I/O goes on.
func (l *Log) breakLocked(errno unix.Errno, a *Area) {
	if l.dead.Load() != 0 {
		return
	}
	l.state.setDead(errno)
	l.dead.Store(uint32(errno))
	e := Event{Kind: Corrupted, Errno: errno}
	if a != nil {
		e.Device = a.device
	}
	l.events = append(l.events, e)
}

// Close ends the log's life without an event and calls done, on any queue's
// thread, when no operation of the log is under way. Memory and files may be
// given back after that and after every queue has forgotten the areas.
func (l *Log) Close(w *Worker, done func()) {
	l.mu.Lock()
	l.endLocked()
	l.closing = done
	l.settle(w, waitList{})
}

// endLocked ends the log's life without an event. Like a break it is on record
// before a write goes by uncopied: the next process must not take the images for
// whole.
func (l *Log) endLocked() {
	if l.dead.Load() != 0 {
		return
	}
	l.state.setDead(unix.ESHUTDOWN)
	l.dead.Store(uint32(unix.ESHUTDOWN))
}

// Abort ends the log's life without an event and waits for nothing: images give
// errors from now on, and original I/O that waits for a copy goes on, even if
// the storage answers no more. Close comes later.
func (l *Log) Abort(w *Worker) {
	l.mu.Lock()
	l.endLocked()
	l.settle(w, waitList{})
}

// Break is Abort with an event, of a log that has broken down: see Waiting.
func (l *Log) Break(w *Worker, errno unix.Errno) {
	l.mu.Lock()
	l.breakLocked(errno, l.victimLocked())
	l.settle(w, waitList{})
}

// Waiting says whether original I/O waits for another disk than its own, the
// storage or the original of another device, and how far the log is: when the
// one stays true and the other what it is, that disk does not answer, and
// nobody but the log's owner can tell when that is too long.
func (l *Log) Waiting() (waits bool, done uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.victimLocked() != nil, l.ended + uint64(l.next)
}

// UnderWay names the disks that the log waits for: those of the storage that are
// being written, and the originals that are being read.
func (l *Log) UnderWay() (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	add := func(f blockdev.File) {
		if !slices.Contains(names, f.Name()) {
			names = append(names, f.Name())
		}
	}
	for r := l.next - min(l.next, l.poolSlots); r < l.next; r++ {
		switch s := l.slot(r); s.state {
		case slotCopying:
			add(s.area.orig)
		case slotStoring:
			add(l.file(l.state.find(r).source))
		case slotFree, slotLanded, slotDead:
		}
	}
	if l.growth.active {
		add(l.growth.op.File)
	}
	return names
}

// victimLocked is the area of a copy that waits for another disk, nil if there
// is none. What waits for room that reads of the same disk take has nothing to
// gain from the end of the snapshot.
func (l *Log) victimLocked() *Area {
	if l.waiting.head == nil {
		return nil
	}
	if l.stores > 0 || l.growth.active {
		return l.waiting.head.area
	}
	for c := l.waiting.head; c != nil; c = c.next {
		reads := func(s slot) bool { return s.state == slotCopying && s.area == c.area }
		if !slices.ContainsFunc(l.slots, reads) {
			return c.area
		}
	}
	return nil
}

// store is one write of neighbouring regions to the storage.
type store struct {
	l     *Log
	w     *Worker
	first Region
	n     Region
	op    blockdev.Op
	next  *store
}

// nextStoreLocked takes the stretch of landed regions at storeNext, if it is
// worth a write now.
func (l *Log) nextStoreLocked() *store {
	if l.dead.Load() != 0 || l.stores >= maxStores {
		return nil
	}
	for l.storeNext < l.next && l.slot(l.storeNext).state == slotDead {
		l.slot(l.storeNext).state = slotFree
		l.storeNext++
	}
	first := l.storeNext
	if first == l.next {
		return nil
	}
	// A write ends where the pool wraps, the storage continues elsewhere, or
	// the batch is full.
	ext := l.state.find(first)
	most := min(max(Region(storeBatch>>l.shift), 1), l.poolSlots-first%l.poolSlots, ext.first+ext.count-first)
	l.landed = max(l.landed, first)
	for l.landed < l.next && l.slot(l.landed).state == slotLanded {
		l.landed++
	}
	n := min(l.landed-first, most)
	wanted := first < l.urgent || l.waiting.head != nil
	grows := l.landed < l.next && l.slot(l.landed).state == slotCopying
	if n == 0 || n < most && (l.stores > 0 || grows && !wanted) {
		return nil
	}
	s := l.freeStores
	if s == nil {
		s = &store{l: l}
		s.op.Kind = blockdev.Write
		s.op.Done = s.done
	} else {
		l.freeStores = s.next
	}
	for r := first; r < first+n; r++ {
		l.slot(r).state = slotStoring
	}
	s.first, s.n = first, n
	s.op.File = l.file(ext.source)
	s.op.Off = ext.off + int64(first-ext.first)<<l.shift
	s.op.MinSize = l.minSizeLocked(ext.source)
	l.storeNext += n
	l.stores++
	l.busy++
	return s
}

func (s *store) submit(w *Worker) {
	l := s.l
	s.w = w
	s.op.Len = int64(s.n) << l.shift
	s.op.Buf = w.slots(l, s.first)
	if s.op.ForceAsync = s.op.Len >= storeAsync; s.op.ForceAsync {
		// The worker comes to it later: the place may be empty by then.
		s.op.Buf.Index = blockdev.NoIndex
	}
	w.q.Submit(&s.op)
}

// done runs when the regions have reached the storage. The words say so before
// the slots are given away: a reader that saw IN_MEMORY sees a changed word if
// its slot was used again.
func (s *store) done(op *blockdev.Op) {
	l := s.l
	if op.Err == 0 {
		for r := s.first; r < s.first+s.n; r++ {
			slot := l.slot(r)
			slot.area.table.set(slot.chunk, makeWord(Stored, r))
		}
	}
	var woken waitList
	l.mu.Lock()
	if op.Err != 0 {
		l.breakLocked(op.Err, l.slot(s.first).area)
	} else {
		for r := s.first; r < s.first+s.n; r++ {
			slot := l.slot(r)
			slot.state = slotFree
			slot.waiters.moveTo(&woken)
		}
	}
	l.stores--
	l.ended++
	l.busy--
	s.next, l.freeStores = l.freeStores, s
	l.settle(s.w, woken)
}

// Usage is how full a log is.
type Usage struct {
	ChunkSize int64 // bytes
	Regions   int64 // handed out
	Unstored  int64 // of these, not yet in the storage
	Capacity  int64 // regions that the storage holds now
	PoolSlots int64
}

// Usage says how full the log is.
func (l *Log) Usage() Usage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Usage{
		ChunkSize: l.chunkSize,
		Regions:   int64(l.next),
		Unstored:  int64(l.next - l.storeNext),
		Capacity:  int64(l.state.capacity()),
		PoolSlots: int64(l.poolSlots),
	}
}
