package blockdev

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// This file has the life of a RingQueue, from NewRingQueue to Stop. The rest of the
// RingQueue is in
//
//	ring_turn.go    what its thread does, again and again
//	ring_wait.go    how it waits for the kernel
//	ring_op.go      an operation, from Submit to its result
//	ring_pause.go   an operation for which the kernel has no worker
//	ring_method.go  the ways to discard and to write zeroes
//	ring_pin.go     registered memory

// RingConfig describes a RingQueue.
type RingConfig struct {
	// Name is the thread's name, as ps shows it (15 bytes of it).
	Name string
	// Depth is how many operations the kernel works on at a time, 1 to
	// uring.MaxEntries. Further operations wait in a list.
	Depth int
	// Commands is how many entries of Command are in flight at most. The ring is made
	// large enough for them. More entries work too, but they are slower.
	Commands int
	// Files are registered with the ring for its life, so that operations on them
	// save the look-up of the file descriptor. Other files work as well.
	Files []*OSFile
	// CPUs are those on which the thread may run; nil means all.
	CPUs *unix.CPUSet
	// Buffers are registered with the ring. A buffer's place in the slice is its index
	// (see Buf.Index). The memory lies off the Go heap and stays until Stop. An empty
	// buffer keeps its place free, for a driver that puts pages of the kernel there.
	Buffers [][]byte
	// Pins is how many buffers can be pinned at a time.
	Pins int
	// OnCommand gets the result of a Command entry, on the queue's thread.
	OnCommand func(tag uint32, res int32)
}

// RingQueue is the Queue on real files: one thread, one io_uring.
//
// In each turn its thread runs the posted tasks, starts the waiting operations, gives
// all new entries to the kernel and waits, in one system call, and hands out the
// completions. What the completions start (Submit, Command) leaves with the next
// turn's call.
//
// The kernel gets an operation's slot number, never a pointer. At most Depth slots are
// in use. Further operations wait in a list, oldest first.
type RingQueue struct {
	cfg  RingConfig
	ring *uring.Ring

	// The queue's thread alone.
	slots    []slot
	free     []uint32         // unused slots
	waiting  opList           // for a slot
	finished opList           // Done is due, and the kernel had nothing to do
	inFlight int              // operations in the ring
	commands int              // commands in the ring
	wakeRead bool             // a read of wakeFd is in the ring
	ending   bool             // the queue ends, and has made that read complete
	misses   int              // times that spinning was in vain, in a row
	sleeps   int              // waits that shall not spin
	raw      bool             // waits keep the P: there was work lately
	pinned   []unsafe.Pointer // what Pin put into the table, behind cfg.Buffers; nil: a free place

	// Fixed, but for tests.
	maxTransfer uint64 // bytes, see maxTransfer
	maxRaw      int32  // queues that may wait raw at a time
	cqes        [64]uring.CQE

	// Shared with posters.
	posted    atomic.Pointer[Task] // newest first
	armed     atomic.Bool          // the queue may sleep: a poster has to wake it
	stopping  atomic.Bool
	abandoned atomic.Bool // the end does not wait for commands
	ended     chan struct{}

	mu      sync.Mutex // guards wakeFd against its close
	wakeFd  int        // eventfd, -1 after the end
	wakeBuf []byte     // where the ring reads wakeFd to, off the Go heap
}

// NewRingQueue starts a thread with its ring, and returns when the thread runs. The
// error is one of uring.New, or says which wish of cfg could not be met.
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

// thread is the queue's thread, from start to end. It is never unlocked, so that the
// system thread ends with it: its name, its affinity and the ring belong to no other
// goroutine.
func (q *RingQueue) thread(started chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread must not be the queue's, because it gives the process its name
		// and cannot end. While it is locked here, the next goroutine runs on another
		// thread.
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

// close ends what open made, even if open did not finish. No entry is in the ring,
// unless commands were abandoned.
func (q *RingQueue) close() {
	// wakeFd goes first. Otherwise a poster might write to another file that gets its
	// number.
	q.mu.Lock()
	if q.wakeFd >= 0 {
		unix.Close(q.wakeFd)
		q.wakeFd = -1
	}
	q.mu.Unlock()
	switch {
	case q.ring == nil:
	case q.commands > 0:
		_ = q.ring.Abandon()
	default:
		q.ring.Close()
	}
	if q.wakeBuf != nil {
		unix.Munmap(q.wakeBuf)
	}
}

// Stop asks the queue to end, and waits until it has ended. It ends once no operation
// and no command is in flight and all tasks posted before have run. The caller sees to
// it that the operations and commands end. Stop must not be called on the queue's own
// thread. A second Stop waits as well.
func (q *RingQueue) Stop() {
	q.stopping.Store(true)
	q.wake()
	<-q.ended
}

// Abandon is a Stop that does not wait for commands. When the ring is closed, the
// kernel cancels them, and OnCommand is not called for them. It is for a driver that
// would keep its commands for ever.
func (q *RingQueue) Abandon() {
	q.abandoned.Store(true)
	q.Stop()
}

// Answers waits until the queue's thread has run a task, or has ended. The error is
// that of ctx: the thread does not do its turns.
func (q *RingQueue) Answers(ctx context.Context) error {
	ran := make(chan struct{})
	q.Post(&Task{Run: func() { close(ran) }})
	select {
	case <-ran:
	case <-q.ended:
	case <-ctx.Done():
		return fmt.Errorf("queue %s does not answer: %w", q.cfg.Name, ctx.Err())
	}
	return nil
}
