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
	// Stores is the queue whose thread writes to the storages and allocates in them. If it
	// is nil, the queue does it that has a reason to.
	Stores blockdev.Queue
	// Seal, if it is not nil, encrypts what is stored. The pool is never encrypted.
	Seal *Seal
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
	storer    *Worker  // of LogConfig.Stores, may be nil
	seal      *sealing // nil: what is stored is not encrypted

	// dead is the errno that broke the log, 0 while it is alive.
	dead atomic.Uint32
	// files are those of sources, and usage is what Usage tells, for readers without the
	// lock.
	files atomic.Pointer[[]blockdev.File]
	usage usage

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
	expected   Region  // chunks of areas to come, and of those that have
	chunks     Region  // of the areas
	lost       Region  // handed out, and no chunk's: their copies died with a process
	low        bool    // told that storage runs low: see warnLocked
	capacity   Region  // of the storage, as it is in state
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
	l.state.format(l.shift, int64(l.poolSlots), l.seal.checkOf())
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
	if c.Stores != nil {
		l.storer = NewWorker(c.Stores)
	}
	if c.Seal != nil {
		l.seal = newSealing(c.Seal)
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

// settle takes the copies out of the log that have ended in a turn, and does what
// all changes of the turn have made possible. It runs at the turn's end, on w's
// thread: see Worker.settleLater. If no copy has ended, the log may have been closed
// by then, and its memory given back: it is dead, and nothing here looks at that.
func (l *Log) settle(w *Worker, ended copyList) {
	l.mu.Lock()
	var woken waitList
	for c := ended.pop(); c != nil; c = ended.pop() {
		c.endLocked(&woken)
	}
	granted := l.grantLocked()
	if l.dead.Load() != 0 {
		// Whoever waits for a place has nothing to wait for any more.
		l.waiting.moveTo(&granted)
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
	o := l.outlookLocked()
	l.warnLocked(o)
	l.publishLocked(o)
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
	granted.start(w)
	for _, e := range events {
		l.onEvent(e)
	}
	woken.wake(w)
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
		if l.next >= l.capacity {
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
	l.mu.Unlock()
	w.settleLater(l)
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
	l.mu.Unlock()
	w.settleLater(l)
}

// Break is Abort with an event, of a log that has broken down: see Waiting.
func (l *Log) Break(w *Worker, errno unix.Errno) {
	l.mu.Lock()
	l.breakLocked(errno, l.victimLocked())
	l.mu.Unlock()
	w.settleLater(l)
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
