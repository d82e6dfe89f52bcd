package blockdev

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// The life of a RingQueue, from NewRingQueue to Stop. The rest of it is in
// ring_turn.go (what its thread does, again and again), ring_wait.go (how it waits
// for the kernel), ring_op.go (an operation, from Submit to its result),
// ring_method.go (the ways to discard and to zero) and ring_pin.go (registered
// memory).

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
