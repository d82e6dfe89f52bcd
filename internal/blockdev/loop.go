package blockdev

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// RingConfig describes a RingQueue.
type RingConfig struct {
	// Name is the thread's name, as ps shows it (15 bytes of it).
	Name string
	// Depth is how many operations the kernel works on at a time; more than
	// that wait in a list. 1 to uring.MaxEntries.
	Depth int
	// Commands is how many entries of Command are in flight at most. It sizes
	// the completion queue: more than that work too, only slower.
	Commands int
	// Files are registered with the ring for its life, so that operations on
	// them save the look-up of the file descriptor. Others work as well.
	Files []*OSFile
	// CPUs is where the thread may run; nil anywhere.
	CPUs *unix.CPUSet
	// Buffers are registered with the ring, each under its place as index (see
	// Buf.Index). The memory lies off the Go heap and stays until Stop. An empty
	// one keeps its place for a driver that puts pages of the kernel there.
	Buffers [][]byte
	// Pins is how many buffers Pin takes at a time.
	Pins int
	// OnCommand gets the result of a Command entry, on the queue's thread.
	OnCommand func(tag uint32, res int32)
}

// RingQueue is the Queue on real files: one thread, one io_uring.
//
// A turn of its thread: run posted tasks, start waiting operations, give all
// new entries to the kernel and wait in one system call, hand out completions.
// What those start (Submit, Command) leaves with the next turn's call.
//
// The kernel is given an operation's slot number, never a pointer. At most
// Depth slots are in use; further operations wait in a list, oldest first.
type RingQueue struct {
	cfg  RingConfig
	ring *uring.Ring

	// The queue's thread alone.
	slots    []slot
	free     []uint32         // unused slots
	waiting  opList           // for a slot
	finished opList           // Done is due without the kernel's doing
	inFlight int              // operations in the ring
	commands int              // commands in the ring
	wakeRead bool             // a read of wakeFd is in the ring
	ending   bool             // that read has been made to complete, for the end
	misses   int              // times that spinning was in vain, in a row
	sleeps   int              // waits that shall not spin
	raw      bool             // waits keep the P: there was work lately
	pinned   []unsafe.Pointer // what Pin put behind cfg.Buffers in the table; nil: a free place

	// Fixed, but for tests.
	maxTransfer uint64 // bytes, see maxTransfer
	maxRaw      int32  // queues that may wait raw at a time
	cqes        [64]uring.CQE

	// Shared with posters.
	posted   atomic.Pointer[Task] // newest first
	armed    atomic.Bool          // the queue may sleep: a poster has to wake it
	stopping atomic.Bool
	leaving  atomic.Bool // the end does not wait for commands
	ended    chan struct{}

	mu      sync.Mutex // guards wakeFd against its close
	wakeFd  int        // eventfd, -1 after the end
	wakeBuf []byte     // where the ring reads wakeFd to, off the Go heap
}

// slot is an operation in the ring.
type slot struct {
	op     *Op
	method method
	tries  uint8 // EAGAIN seen
	async  bool  // leave it to a kernel worker
}

// method is how an operation is done. A file that cannot do it one way is
// asked the next.
type method uint8

const (
	methodPlain       method = iota // read, write, fsync, fallocate
	methodDiscard                   // the block layer's discard
	methodPunch                     // fallocate: deallocate, reads as zeroes
	methodZero                      // fallocate: zero, keep the space
	methodWriteZeroes               // plain writes of zeroes
)

// user_data of a ring entry: what it is in the high half, which one in the low.
const (
	kindOp      uint64 = iota << 32 // low half: slot
	kindCommand                     // low half: tag
	kindWake
	kindMask uint64 = 0xffffffff << 32
)

const (
	// maxTransfer is the most that one ring entry reads or writes. The kernel
	// itself stops a page short of 2 GiB.
	maxTransfer = 1 << 30
	// zeroChunk is how much methodWriteZeroes writes at a time.
	zeroChunk = 1 << 20
	// maxTries bounds the repetitions after EAGAIN.
	maxTries = 16
)

// opList is a first-in first-out list through Op.next.
type opList struct{ head, tail *Op }

func (l *opList) push(op *Op) {
	op.next = nil
	if l.tail == nil {
		l.head = op
	} else {
		l.tail.next = op
	}
	l.tail = op
}

func (l *opList) pop() *Op {
	op := l.head
	if op == nil {
		return nil
	}
	l.head = op.next
	if l.head == nil {
		l.tail = nil
	}
	op.next = nil
	return op
}

// NewRingQueue starts a thread with its ring and returns when it runs. The
// error is one of uring.New, or says what of cfg could not be had.
func NewRingQueue(cfg RingConfig) (*RingQueue, error) {
	if cfg.Depth < 1 || cfg.Depth > uring.MaxEntries {
		return nil, fmt.Errorf("start queue %s: depth %d, want 1 to %d", cfg.Name, cfg.Depth, uring.MaxEntries)
	}
	q := &RingQueue{
		cfg:    cfg,
		slots:  make([]slot, cfg.Depth),
		free:   make([]uint32, cfg.Depth),
		ended:  make(chan struct{}),
		wakeFd: -1,
		pinned: make([]unsafe.Pointer, cfg.Pins),

		maxTransfer: maxTransfer,
		maxRaw:      rawLimit(os.Getenv("GODEBUG")),
	}
	for i := range q.free {
		q.free[i] = uint32(cfg.Depth - 1 - i)
	}
	started := make(chan error)
	go q.thread(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start queue %s: %w", cfg.Name, err)
	}
	return q, nil
}

// thread is the queue's thread, from start to end. It is never unlocked: the
// ring's owner, affinity and name end with it.
func (q *RingQueue) thread(started chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread gives the process its name and cannot end. As long
		// as it is locked here, the next goroutine runs on another.
		locked := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(locked)
			q.thread(started)
		}()
		<-locked
		runtime.UnlockOSThread()
		return
	}
	err := q.open()
	if err != nil {
		q.close()
		close(q.ended)
		started <- err
		return
	}
	started <- nil
	q.run()
	q.close()
	close(q.ended)
}

func (q *RingQueue) open() error {
	if q.cfg.Name != "" {
		var name [16]byte
		copy(name[:15], q.cfg.Name)
		if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0); err != nil {
			return fmt.Errorf("name thread: %w", err)
		}
	}
	if q.cfg.CPUs != nil {
		if err := unix.SchedSetaffinity(0, q.cfg.CPUs); err != nil {
			return fmt.Errorf("set affinity: %w", err)
		}
	}
	var err error
	q.wakeBuf, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("map wake-up buffer: %w", err)
	}
	if q.wakeFd, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("make eventfd: %w", err)
	}
	entries := min(uint32(q.cfg.Depth+q.cfg.Commands+1), uring.MaxEntries)
	q.ring, err = uring.New(uring.Config{
		Entries:      entries,
		SingleIssuer: true,
		DeferTaskrun: true,
		CoopTaskrun:  true,
	})
	if err != nil {
		return err
	}
	if len(q.cfg.Files) > 0 {
		fds := make([]int32, len(q.cfg.Files))
		for i, f := range q.cfg.Files {
			fds[i] = int32(f.fd)
		}
		if err := q.ring.RegisterFiles(uint32(len(fds))); err != nil {
			return err
		}
		if err := q.ring.UpdateFiles(0, fds); err != nil {
			return err
		}
	}
	if n := len(q.cfg.Buffers) + len(q.pinned); n > 0 {
		if err := q.ring.RegisterBuffers(uint32(n)); err != nil {
			return err
		}
		if err := q.ring.UpdateBuffers(0, q.cfg.Buffers); err != nil {
			return err
		}
	}
	return q.ring.RegisterRing()
}

// close ends what open made, as far as it came. No entry is in the ring, unless
// commands were abandoned.
func (q *RingQueue) close() {
	// First, so that no poster writes into a file that got the number since.
	q.mu.Lock()
	if q.wakeFd >= 0 {
		unix.Close(q.wakeFd)
		q.wakeFd = -1
	}
	q.mu.Unlock()
	if q.ring != nil {
		q.ring.Close()
	}
	if q.wakeBuf != nil {
		unix.Munmap(q.wakeBuf)
	}
}

// Stop asks the queue to end and waits until it has: once no operation and no
// command is in flight and all tasks posted before have run. The caller sees
// to it that they end. Not on the queue's own thread; a second Stop waits as
// well.
func (q *RingQueue) Stop() {
	q.stopping.Store(true)
	q.wake()
	<-q.ended
}

// Abandon is Stop that does not wait for commands: closing the ring makes the
// kernel cancel them, without a word to OnCommand. It gives up a driver that
// would keep them for ever.
func (q *RingQueue) Abandon() {
	q.leaving.Store(true)
	q.Stop()
}

// Post runs t.Run on the queue's thread. After the end of the queue it does
// nothing.
func (q *RingQueue) Post(t *Task) {
	for {
		head := q.posted.Load()
		t.next = head
		if q.posted.CompareAndSwap(head, t) {
			break
		}
	}
	q.wake()
}

// wake makes a sleeping queue look at what was posted. The order decides that
// no wake-up is lost: a poster publishes, then looks at armed; the queue sets
// armed, then looks for what was published.
func (q *RingQueue) wake() {
	if q.armed.Load() && q.armed.CompareAndSwap(true, false) {
		q.signal()
	}
}

// signal completes the read of the eventfd.
func (q *RingQueue) signal() {
	one := [8]byte{1}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.wakeFd < 0 {
		return
	}
	for {
		_, err := unix.Write(q.wakeFd, one[:])
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (q *RingQueue) run() {
	for {
		q.runTasks()
		q.runFinished()
		q.startWaiting()
		switch {
		case !q.stopping.Load() || !q.idle():
			if !q.wakeRead {
				q.readWake()
			}
		case !q.wakeRead:
			q.cool()
			return
		case !q.ending:
			// The last entry in the ring is the read of the eventfd.
			q.ending = true
			q.signal()
		}
		q.wait()
		if q.reap() {
			q.heat()
		}
	}
}

// idle says whether nothing is left to do.
func (q *RingQueue) idle() bool {
	return q.inFlight == 0 && (q.commands == 0 || q.leaving.Load()) && q.waiting.head == nil &&
		q.finished.head == nil && q.posted.Load() == nil
}

// wait gives new entries to the kernel and sleeps until something completes,
// unless there is work already.
func (q *RingQueue) wait() {
	if q.spins() && q.spin() {
		return
	}
	q.armed.Store(true)
	switch {
	case q.posted.Load() != nil, q.finished.head != nil,
		q.stopping.Load() && !q.ending && q.idle():
		q.armed.Store(false)
		q.enter(0, q.raw)
	case q.raw:
		q.enter(1, true)
		q.armed.Store(false)
		if q.ring.Ready() == 0 {
			q.cool() // interrupted: see rawLimit
		}
	default:
		q.enter(1, false)
		q.armed.Store(false)
	}
}

// spins says whether the next wait begins with spinning.
func (q *RingQueue) spins() bool {
	if !q.raw || int(rawQueues.Load()) > spinners {
		return false
	}
	if q.sleeps > 0 {
		q.sleeps--
		return false
	}
	return q.finished.head == nil && !q.stopping.Load()
}

// spin gives new entries to the kernel, looks for work for a while, and says
// whether there is any.
func (q *RingQueue) spin() bool {
	q.enter(0, true)
	for start := time.Now(); q.ring.Ready() == 0; {
		for range 32 {
			if q.posted.Load() != nil {
				q.misses = 0
				return true
			}
			if q.ring.Due() {
				q.misses = 0
				q.enter(0, true)
				return true
			}
		}
		if time.Since(start) > spinTime {
			q.misses = min(q.misses+1, maxMisses)
			q.sleeps = 1 << q.misses
			return false
		}
	}
	return true
}

// enter is the system call.
func (q *RingQueue) enter(min uint32, raw bool) {
	if err := q.ring.SubmitAndWait(min, raw); err != nil {
		// The ring is ours and its arguments are right: nothing that a disk
		// or a user does leads here.
		panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
	}
}

// How a queue waits
//
// An ordinary wait lets the Go scheduler take the P away, and getting one back
// costs more than all the rest of a turn. A raw wait keeps it. So a queue waits
// raw from its first completion on, until a raw wait brings nothing. What ends
// such a wait is the runtime's own preemption signal: to every thread that had
// the same goroutine on for 10 ms, and at once when the world has to stop. No
// time limit of ours: setting a timer costs microseconds in a virtual machine,
// for each wait. Commands that lie in the ring for ever, as those of ublk do,
// do not keep a queue raw; only completions do.
//
// Falling asleep and being woken costs as much again, the issuer of a request
// too, and most of the time of requests that come one by one. So a raw queue
// first spins for a moment. When that was in vain it sleeps at once the next
// 2, 4, 8… times: what comes less often than spinTime is hardly spun for.

const (
	// spinTime is about what it takes an issuer to be woken and to send its
	// next request.
	spinTime  = 50 * time.Microsecond
	maxMisses = 7
)

// spinners is how many raw queues there are at most while any of them spins:
// one processor stays for those who are waited for.
var spinners = runtime.NumCPU() - 1

// rawQueues is how many queues wait raw, each of which holds a P.
var rawQueues atomic.Int32

// rawLimit is how many may: one P stays for everybody else. None without the
// preemption signal, which godebug can switch off.
func rawLimit(godebug string) int32 {
	if strings.Contains(godebug, "asyncpreemptoff=1") {
		return 0
	}
	return int32(runtime.GOMAXPROCS(0)) - 1
}

// heat makes the next waits raw, if that leaves a P for everybody else.
func (q *RingQueue) heat() {
	if q.raw {
		return
	}
	if rawQueues.Add(1) > q.maxRaw {
		rawQueues.Add(-1)
		return
	}
	q.raw = true
}

// cool makes the next waits ordinary.
func (q *RingQueue) cool() {
	if q.raw {
		q.raw = false
		rawQueues.Add(-1)
	}
}

// runTasks runs what was posted, in the order of posting.
func (q *RingQueue) runTasks() {
	if q.posted.Load() == nil {
		return
	}
	newest := q.posted.Swap(nil)
	var oldest *Task
	for newest != nil {
		next := newest.next
		newest.next = oldest
		oldest, newest = newest, next
	}
	for oldest != nil {
		t := oldest
		oldest = t.next
		t.next = nil
		t.Run()
	}
}

// runFinished hands out the operations that needed no I/O. Those that their
// Done adds wait for the next turn.
func (q *RingQueue) runFinished() {
	list := q.finished
	q.finished = opList{}
	for op := list.pop(); op != nil; op = list.pop() {
		op.Done(op)
	}
}

// Submit starts op. Its File is an *OSFile.
func (q *RingQueue) Submit(op *Op) {
	op.Err = 0
	op.moved = 0
	switch {
	case op.Kind != Flush && (op.Off < 0 || op.Len <= 0):
		op.Err = unix.EINVAL
		q.finished.push(op)
	case op.File.(*OSFile).cutOff(op.Reach):
		op.Err = unix.EIO
		q.finished.push(op)
	case len(q.free) == 0 || q.waiting.head != nil:
		q.waiting.push(op)
	default:
		q.start(op)
	}
}

// Pin implements Pinner: mem takes a place behind the configured buffers.
func (q *RingQueue) Pin(mem []byte) (index int32, err error) {
	n := slices.Index(q.pinned, nil)
	if n < 0 {
		return NoIndex, fmt.Errorf("pin %d bytes: %d buffers are pinned, the most there can be", len(mem), q.cfg.Pins)
	}
	place := len(q.cfg.Buffers) + n
	if err := q.ring.UpdateBuffers(uint32(place), [][]byte{mem}); err != nil {
		return NoIndex, err
	}
	q.pinned[n] = unsafe.Pointer(unsafe.SliceData(mem))
	return int32(place), nil
}

// Unpin implements Pinner.
func (q *RingQueue) Unpin(index int32) {
	// An entry that names the place has to reach the kernel before; what is made
	// an entry later looks first (place).
	if err := q.ring.Submit(); err != nil {
		panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
	}
	if err := q.ring.UpdateBuffers(uint32(index), [][]byte{nil}); err != nil {
		panic(fmt.Sprintf("queue %s: empty place %d: %v", q.cfg.Name, index, err)) // it is ours, and full
	}
	q.pinned[int(index)-len(q.cfg.Buffers)] = nil
}

// place is the place of b in the table, NoIndex if it is pinned no more.
func (q *RingQueue) place(b Buf) int {
	n := int(b.Index) - len(q.cfg.Buffers)
	if n >= 0 && n < len(q.pinned) && q.pinned[n] != b.Mem {
		return NoIndex
	}
	return int(b.Index)
}

// startWaiting gives free slots to the operations that wait longest.
func (q *RingQueue) startWaiting() {
	for q.waiting.head != nil && len(q.free) > 0 {
		q.start(q.waiting.pop())
	}
}

// start gives op a slot and an entry.
func (q *RingQueue) start(op *Op) {
	n := len(q.free) - 1
	i := q.free[n]
	q.free = q.free[:n]
	q.slots[i] = slot{op: op, method: firstMethod(op), async: op.ForceAsync}
	q.inFlight++
	q.issue(i)
}

func firstMethod(op *Op) method {
	file := op.File.(*OSFile)
	switch op.Kind {
	case Discard:
		if file.block {
			return methodDiscard
		}
		return methodPunch
	case WriteZeroes:
		// A hole does not make a regular file grow, as zeroes do.
		if op.NoUnmap || !file.block && !file.holds(op.Off+op.Len) {
			return methodZero
		}
		return methodPunch
	case Read, Write, Flush, Allocate:
	}
	return methodPlain
}

// nextMethod is what to try when the file cannot do m (EOPNOTSUPP); false when
// op cannot be done at all.
//
//	discard, block device: discard -> punch
//	discard, file:         punch
//	write-zeroes:          punch -> zero -> write zeroes
//	write-zeroes, NoUnmap: zero -> write zeroes
func nextMethod(op *Op, m method) (method, bool) {
	switch {
	case m == methodDiscard:
		return methodPunch, true
	case op.Kind == WriteZeroes && m == methodPunch:
		return methodZero, true
	case op.Kind == WriteZeroes && m == methodZero:
		return methodWriteZeroes, true
	}
	return m, false
}

// sqe is a free entry of the submission queue; a full one is submitted.
func (q *RingQueue) sqe() *uring.SQE {
	for {
		if s := q.ring.SQE(); s != nil {
			return s
		}
		if err := q.ring.Submit(); err != nil {
			panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
		}
	}
}

// Command is an entry for a command of the layer above: its result goes to
// OnCommand with tag. The caller fills it with a Prep method at once and
// leaves UserData alone. On the queue's thread only.
func (q *RingQueue) Command(tag uint32) *uring.SQE {
	s := q.sqe()
	s.UserData = kindCommand | uint64(tag)
	q.commands++
	return s
}

func (q *RingQueue) readWake() {
	s := q.sqe()
	s.PrepRead(q.wakeFd, uint64(uintptr(unsafe.Pointer(&q.wakeBuf[0]))), 8, 0, 0)
	s.UserData = kindWake
	q.wakeRead = true
}

// issue makes the entry for the rest of a slot's operation.
func (q *RingQueue) issue(i uint32) {
	sl := &q.slots[i]
	op := sl.op
	file := op.File.(*OSFile)
	s := q.sqe()
	fd, fixed := q.fileRef(file)
	off, n := uint64(op.Off+op.moved), uint64(op.Len-op.moved)
	switch sl.method {
	case methodDiscard:
		s.PrepCommand(fd, blockDiscard)
		s.Addr = off
		s.Addr3 = n
	case methodPunch:
		s.PrepFallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	case methodZero:
		s.PrepFallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
	case methodWriteZeroes:
		addr := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(zeroes()))))
		s.PrepWrite(fd, addr, uint32(min(n, zeroChunk)), off, 0)
	case methodPlain:
		q.preparePlain(s, op, fd, off, n)
	}
	if fixed {
		s.SetFixedFile()
	}
	if sl.async {
		s.Flags |= uring.IOSQE_ASYNC
	}
	s.UserData = kindOp | uint64(i)
}

func (q *RingQueue) preparePlain(s *uring.SQE, op *Op, fd int, off, n uint64) {
	length := uint32(min(n, q.maxTransfer))
	// For kernel pages Mem is nil, and the offset itself is the address.
	addr := uint64(uintptr(op.Buf.Mem)) + uint64(op.Buf.Off+op.moved)
	index := q.place(op.Buf)
	switch op.Kind {
	case Read:
		if index == NoIndex {
			s.PrepRead(fd, addr, length, off, 0)
		} else {
			s.PrepReadFixed(fd, addr, length, off, 0, index)
		}
	case Write:
		var flags uint32
		if op.FUA {
			flags = unix.RWF_DSYNC
		}
		if index == NoIndex {
			s.PrepWrite(fd, addr, length, off, flags)
		} else {
			s.PrepWriteFixed(fd, addr, length, off, flags, index)
		}
	case Flush:
		s.PrepFsync(fd, uring.IORING_FSYNC_DATASYNC)
	case Allocate:
		s.PrepFallocate(fd, 0, off, n)
	default:
		panic("blockdev: unknown kind of operation")
	}
}

// fileRef is how an entry names file: by its place among the registered ones,
// else by file descriptor. There are a few of them at most.
func (q *RingQueue) fileRef(file *OSFile) (fd int, fixed bool) {
	for i, f := range q.cfg.Files {
		if f == file {
			return i, true
		}
	}
	return file.fd, false
}

// reap hands out completions and says whether there were any.
func (q *RingQueue) reap() bool {
	any := false
	for {
		n := q.ring.Reap(q.cqes[:])
		for i := range n {
			c := &q.cqes[i]
			which := uint32(c.UserData)
			switch c.UserData & kindMask {
			case kindOp:
				q.completed(which, c.Res)
			case kindCommand:
				q.commands--
				q.cfg.OnCommand(which, c.Res)
			case kindWake:
				q.wakeRead = false
				q.ending = false
			}
		}
		any = any || n > 0
		if n < len(q.cqes) {
			return any
		}
	}
}

// completed goes on with slot i after the kernel's answer res.
func (q *RingQueue) completed(i uint32, res int32) {
	sl := &q.slots[i]
	op := sl.op
	transfer := op.Kind == Read || op.Kind == Write || sl.method == methodWriteZeroes
	var errno unix.Errno
	switch {
	case res < 0:
		errno = unix.Errno(-res)
		switch errno {
		case unix.EINTR:
			q.issue(i)
			return
		case unix.EAGAIN:
			if sl.tries < maxTries {
				sl.tries++
				sl.async = true // it cannot be had without blocking
				q.issue(i)
				return
			}
		case unix.ECANCELED:
			if sl.async {
				// The kernel had no worker and no memory for one.
				sl.async = false
				q.issue(i)
				return
			}
		case unix.EOPNOTSUPP:
			if m, ok := nextMethod(op, sl.method); ok {
				sl.method = m
				q.issue(i)
				return
			}
		}
	case transfer && res == 0:
		// The end of the file or device: nothing more will come.
		errno = unix.EIO
	case transfer:
		op.moved += int64(res)
		if op.moved < op.Len {
			sl.tries, sl.async = 0, op.ForceAsync
			q.issue(i)
			return
		}
	}
	if errno == 0 && op.File.(*OSFile).cutOff(op.Reach) {
		errno = unix.EIO
	}
	*sl = slot{}
	q.free = append(q.free, i)
	q.inFlight--
	op.Err = errno
	op.Done(op)
}

// blockDiscard is BLOCK_URING_CMD_DISCARD of <linux/blkdev.h>, Linux 6.12: on
// a block device, sqe.addr is the start and sqe.addr3 the length in bytes.
const blockDiscard = 0x12 << 8

// zeroes is zeroChunk of memory that reads as zeroes, for all queues. Nobody
// writes to it, so it takes no memory, locked or not.
var zeroes = sync.OnceValue(func() []byte {
	mem, err := unix.Mmap(-1, 0, zeroChunk, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("map zeroes: %v", err))
	}
	return mem
})
