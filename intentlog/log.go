package intentlog

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

var (
	// ErrOff means: the log is off, or was given up meanwhile.
	ErrOff = errors.New("write-intent log is off")
	// ErrBusy means: what was written to the log when it was given up is still under
	// way.
	ErrBusy = errors.New("write-intent log is still being written")
	// ErrGeneration means: the last base is of another generation than the take, so
	// that only a new base can make the take durable.
	ErrGeneration = errors.New("no base of this generation yet")
)

// Config is what a log is made of.
type Config struct {
	Size      int64          // of the disk, bytes
	ZoneShift uint8          // log2 of the size of a zone, bytes; see DefaultZoneShift
	Orig      blockdev.File  // the original disk
	Queue     blockdev.Queue // on whose thread the log is written
	File      blockdev.File  // of FileSize bytes, allocated
	Memory    []byte         // FileSize bytes off the Go heap, aligned to 4096
	// Failed is told, once after each Start, that the log cannot be written
	// any more, on the thread of Queue. Writes wait from then on until GiveUp.
	Failed func(error)
}

// Log is the write-intent log of a disk. It is off at first: all writes pass.
type Log struct {
	c Config
	// stamp is what the entry of a zone must be for a write to pass. 0: the log is off.
	stamp atomic.Uint64
	// durable are the entries, by zone, that a power failure cannot take away.
	durable []atomic.Uint64

	mu sync.Mutex
	// under mu:
	state   State
	id      uuid.UUID
	epoch   uint64
	info    cbtmap.Info // of the map, as it is now
	header  header      // as it is to be written: of the generation of the last base
	base    uint64      // the epoch of the last base
	whole   bool        // the file has been written as a whole
	err     error       // why the log failed
	waiting waits       // for the next write of the log
	next    []*take     // and so do these
	flushes int         // of the original disk, under way
	ended   uint64      // writes of the log

	// A write of the log. The memory behind it changes only before.
	writing bool // it is under way, or about to start
	batch   waits
	batched []*take
	touched []bool // sectors to be written
	put     header // as it is in memory

	// of the thread of the log's queue, while writing:
	ops     []blockdev.Op
	pending int
	errno   unix.Errno

	startWrite blockdev.Task
}

// take is a take, or the wish to have the whole file written, that waits for the next
// write of the log.
type take struct {
	info  cbtmap.Info
	start bool
	done  func(error)
	flush blockdev.Op
}

// New makes a log.
func New(c Config) (*Log, error) {
	if c.Size <= 0 || c.ZoneShift < MinZoneShift || c.ZoneShift > MaxZoneShift {
		return nil, fmt.Errorf("write-intent log for %d bytes in zones of 2^%d bytes: impossible", c.Size, c.ZoneShift)
	}
	if n := FileSize(c.Size, c.ZoneShift); int64(len(c.Memory)) != n {
		return nil, fmt.Errorf("write-intent log of %d bytes in memory of %d", n, len(c.Memory))
	}
	l := &Log{
		c:       c,
		durable: make([]atomic.Uint64, zones(c.Size, c.ZoneShift)),
		touched: make([]bool, len(c.Memory)/sector.Size),
		ops:     make([]blockdev.Op, len(c.Memory)/blockSize),
	}
	l.startWrite.Run = l.write
	for i := range l.ops {
		l.ops[i] = blockdev.Op{Kind: blockdev.Write, FUA: true, ForceAsync: true, File: c.File, Done: l.written}
	}
	return l, nil
}

// Follow makes the log follow the map of its disk, in the place of another log. Called once,
// before the first write.
func (l *Log) Follow(m *cbtmap.Map) { m.Follow(l.follow) }

// follow takes what the map says of itself before anything is marked with it.
func (l *Log) follow(info cbtmap.Info, err error) {
	l.mu.Lock()
	if err == nil && info.DeviceCapacity != l.c.Size {
		err = fmt.Errorf("the change map is for %d bytes, the write-intent log for %d", info.DeviceCapacity, l.c.Size)
	}
	failed := err != nil && l.failLocked(err)
	if info.GenerationID != l.info.GenerationID {
		l.epoch++
	}
	l.info = info
	l.setStampLocked()
	l.mu.Unlock()
	if failed {
		l.tell(err)
	}
}

func (l *Log) setStampLocked() {
	if l.state == Off {
		l.stamp.Store(0)
		return
	}
	l.stamp.Store(uint64(makeStamp(l.epoch, l.info.ChangesNumber+1)))
}

// Hold says whether a change of the bytes [off, off+length), which has been marked, has
// to wait until the log is written. If so, what w was made with is called later. w must
// not be used until then. What is beyond the disk needs no log.
func (l *Log) Hold(w *Wait, off, length int64) bool {
	need := l.stamp.Load()
	last := min((off+length-1)>>l.c.ZoneShift, int64(len(l.durable))-1)
	for z := max(off, 0) >> l.c.ZoneShift; z <= last; z++ {
		if l.durable[z].Load() < need {
			return l.hold(w, z, last)
		}
	}
	return false
}

func (l *Log) hold(w *Wait, first, last int64) bool {
	l.mu.Lock()
	if l.state == Off {
		l.mu.Unlock()
		return false
	}
	w.first, w.last = first, last
	l.waiting.add(w)
	post := l.beginLocked()
	l.mu.Unlock()
	if post {
		l.c.Queue.Post(&l.startWrite)
	}
	return true
}

// beginLocked says whether write is to be posted.
func (l *Log) beginLocked() bool {
	if l.writing || l.state != On {
		return false
	}
	l.writing = true
	return true
}

// Start switches a log on that is off, under a new ID. Whatever base there was of this
// log has to be gone, and no other process may still be writing to its file. Writes wait for their entries from now on. done is called, as that of
// Taken, when the original disk has been flushed, because of takes that were made while the
// log was off, and when the whole file is durable. After that make a base.
func (l *Log) Start(id uuid.UUID, done func(error)) {
	l.mu.Lock()
	switch {
	case l.writing:
		l.mu.Unlock()
		done(fmt.Errorf("start write-intent log: %w", ErrBusy))
		return
	case l.state != Off:
		l.mu.Unlock()
		done(errors.New("start write-intent log: it is on"))
		return
	}
	clear(l.c.Memory)
	for i := range l.touched {
		l.touched[i] = true
	}
	for i := range l.durable {
		l.durable[i].Store(0)
	}
	l.id, l.epoch, l.base = id, 1, 0
	l.header, l.put = header{size: l.c.Size, zoneShift: l.c.ZoneShift}, header{}
	l.state, l.err, l.errno = On, nil, 0 // no write is under way
	l.setStampLocked()
	l.flushes++
	l.mu.Unlock()
	l.flush(&take{start: true, done: done})
}

// beginEpoch begins an epoch for a base.
func (l *Log) beginEpoch() (id uuid.UUID, epoch uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != On || !l.whole {
		return id, 0, ErrOff
	}
	l.epoch++
	l.setStampLocked()
	return l.id, l.epoch, nil
}

// Committed says that base, which Base has made, is durable, and the one that counts.
func (l *Log) Committed(base []byte) error {
	h, err := decodeHead(base)
	if err != nil {
		return fmt.Errorf("commit base: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == Off || h.id != l.id {
		return fmt.Errorf("commit base: %w", ErrOff)
	}
	if l.header.generation != h.info.GenerationID {
		l.header.generation, l.header.number = h.info.GenerationID, h.info.ChangesNumber
	}
	l.base = h.epoch
	return nil
}

// Taken makes a take durable that has just been cut: info is what the map says of it.
// Until done is called with no error nobody may be told of the take. With ErrGeneration
// a new base makes it durable, once that is committed. With ErrOff there is nothing to
// wait for. If the log fails, done is called after GiveUp, and in no case before the disk
// has answered. It runs on the thread of the log's queue, or within GiveUp or Taken, and must
// not block.
func (l *Log) Taken(info cbtmap.Info, done func(error)) {
	l.mu.Lock()
	if l.state == Off {
		l.mu.Unlock()
		done(ErrOff)
		return
	}
	l.flushes++
	l.mu.Unlock()
	l.flush(&take{info: info, done: done})
}

// flush flushes the original disk, and then goes on with a take.
func (l *Log) flush(t *take) {
	t.flush = blockdev.Op{Kind: blockdev.Flush, File: l.c.Orig, Done: func(*blockdev.Op) { l.flushed(t) }}
	l.c.Queue.Post(&blockdev.Task{Run: func() { l.c.Queue.Submit(&t.flush) }})
}

// flushed goes on with a take: what its images show cannot be lost any more.
func (l *Log) flushed(t *take) {
	var err error
	if t.flush.Err != 0 {
		err = fmt.Errorf("flush %s: %w", l.c.Orig.Name(), t.flush.Err)
	}
	l.mu.Lock()
	l.flushes--
	failed := err != nil && l.failLocked(err)
	var result error
	switch {
	case l.state == Off:
		result = ErrOff
	case l.state == On && !t.start && l.header.generation != t.info.GenerationID:
		result = ErrGeneration
	default:
		l.next = append(l.next, t)
	}
	start := l.beginLocked()
	l.mu.Unlock()
	if failed {
		l.tell(err)
	}
	if result != nil {
		t.done(result)
	}
	if start {
		l.write()
	}
}

// write writes the log, for all that wait for it.
func (l *Log) write() {
	l.mu.Lock()
	if l.state != On {
		l.writing = false
		l.mu.Unlock()
		return
	}
	n := l.gatherLocked()
	l.pending = n
	l.mu.Unlock()
	for i := range n {
		l.c.Queue.Submit(&l.ops[i])
	}
	if n == 0 {
		l.over()
	}
}

// gatherLocked makes the memory what is to be written, and the first n operations those
// that write it. None are needed if the last write had all the entries.
func (l *Log) gatherLocked() (n int) {
	l.batch, l.waiting = l.waiting, waits{}
	l.batched, l.next = l.next, nil
	now := stamp(l.stamp.Load())
	for w := l.batch.head; w != nil; w = w.next {
		for z := w.first; z <= w.last; z++ {
			if entry(l.c.Memory, z) < now {
				at := entryAt(z)
				order.PutUint64(l.c.Memory[at:], uint64(now))
				l.touched[at/sector.Size] = true
			}
		}
	}
	for _, t := range l.batched {
		if !t.start && l.header.generation == t.info.GenerationID {
			l.header.number = max(l.header.number, t.info.ChangesNumber)
		}
	}
	if l.header != l.put {
		l.put = l.header
		l.header.put(l.c.Memory)
		l.touched[0] = true
	}
	end := int64(-1) // of the last operation
	for i, touched := range l.touched {
		if !touched {
			continue
		}
		l.touched[i] = false
		s := l.c.Memory[i*sector.Size:][:sector.Size]
		seal(s, l.id, uint64(i))
		from := int64(i) * sector.Size &^ (blockSize - 1)
		switch {
		case from < end: // in the same block
		case from == end:
			l.ops[n-1].Len += blockSize
			end += blockSize
		default:
			op := &l.ops[n]
			op.Off, op.Len, op.Buf = from, blockSize, blockdev.MemBuf(l.c.Memory[from:])
			n++
			end = from + blockSize
		}
	}
	return n
}

// written runs as each operation has ended.
func (l *Log) written(op *blockdev.Op) {
	if op.Err != 0 {
		l.errno = op.Err
	}
	if l.pending--; l.pending == 0 {
		l.over()
	}
}

// over is the end of a write of the log: what it has written counts.
func (l *Log) over() {
	var err error
	if l.errno != 0 {
		err = fmt.Errorf("write %s: %w", l.c.File.Name(), l.errno)
	}
	l.mu.Lock()
	l.ended++
	l.writing = false
	failed := err != nil && l.failLocked(err)
	if l.state != On {
		// Off: nobody waits any more. Failed: all wait for GiveUp.
		l.mu.Unlock()
		if failed {
			l.tell(err)
		}
		return
	}
	for w := l.batch.head; w != nil; w = w.next {
		for z := w.first; z <= w.last; z++ {
			l.durable[z].Store(uint64(entry(l.c.Memory, z)))
		}
	}
	ready, takes := l.batch.take(), l.batched
	l.batched = nil
	for _, t := range takes {
		l.whole = l.whole || t.start
	}
	again := (l.waiting.head != nil || len(l.next) > 0) && l.beginLocked()
	l.mu.Unlock()
	wake(ready)
	for _, t := range takes {
		t.done(nil)
	}
	if again {
		l.write()
	}
}

// failLocked ends the work of a log that is on. If it returns true, tell has to be
// called, without mu.
func (l *Log) failLocked(err error) bool {
	if l.state != On {
		return false
	}
	l.state, l.err = Failed, err
	return true
}

func (l *Log) tell(err error) {
	l.c.Queue.Post(&blockdev.Task{Run: func() { l.c.Failed(err) }})
}

// GiveUp switches the log off: all that wait go, and from now on all writes pass. Before
// that the base or the log must have been made unbelievable, durably. GiveUp may be
// called in any state.
func (l *Log) GiveUp() {
	l.mu.Lock()
	l.state, l.whole = Off, false
	l.setStampLocked()
	lists := []*Wait{l.batch.take(), l.waiting.take()}
	takes := append(l.batched, l.next...)
	l.batched, l.next = nil, nil
	l.mu.Unlock()
	for _, w := range lists {
		wake(w)
	}
	for _, t := range takes {
		t.done(ErrOff)
	}
}
