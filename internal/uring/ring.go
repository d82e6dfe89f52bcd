// Package uring is a small io_uring. It has one ring type, which neither allocates
// nor locks on the way of an entry.
//
//	sqe := ring.SQE()              // nil: queue full, Submit first
//	sqe.PrepRead(fd, addr, n, off, 0)
//	sqe.UserData = 7
//	ring.SubmitAndWait(1, raw)     // one io_uring_enter for both
//	n := ring.Reap(cqes[:])        // copies out, frees the queue
//
// There are two builds of the same type, chosen at compile time. The default
// build sets up and drives the ring by itself, on golang.org/x/sys/unix. With
// -tags giouring the queues are those of github.com/pawelgaczynski/giouring; that
// module needs -ldflags=-checklinkname=0 too. The builds differ in queues_own.go
// and queues_giouring.go alone, and both pass the same tests.
//
// # Concurrency
//
// A Ring belongs to one thread. With SingleIssuer or DeferTaskrun the kernel
// insists on that: call runtime.LockOSThread before New, and use the ring on that
// thread only. Only Close may be called on another thread, once the ring's own
// thread does not use it any longer.
//
// # Waiting and the Go scheduler
//
// An ordinary system call tells the Go scheduler that the thread may block. The
// scheduler then gives the thread's P, its right to run Go code, to another thread.
// To get a P back is what costs most in a busy server. A raw wait keeps the P. The
// price is that whoever stops the world has to wait for this thread: the runtime's
// preemption signal makes the wait return EINTR, and then SubmitAndWait enters the
// scheduler once. So a caller waits raw while it expects completions soon, and
// ordinarily otherwise. GOMAXPROCS must be larger than the number of threads that
// wait raw.
package uring

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reasons for which New fails that a caller may want to tell apart. The
// message of the error says what to do.
var (
	// ErrDisabled: the administrator or a sandbox forbids io_uring.
	ErrDisabled = errors.New("io_uring is disabled")
	// ErrNotSupported: the kernel has no io_uring, or not one recent enough.
	ErrNotSupported = errors.New("io_uring is not supported")
	// ErrMemlock: the locked-memory limit is too low for the queues.
	ErrMemlock = errors.New("not enough lockable memory for io_uring")
)

// MaxEntries is the largest submission queue the kernel makes.
const MaxEntries = 32768

// Config describes a ring.
type Config struct {
	// Entries is the size of the submission queue, rounded up to a power of two.
	// The completion queue has twice as many.
	Entries uint32
	// SQE128 makes entries of 128 bytes, for commands with long arguments.
	SQE128 bool
	// SingleIssuer promises that one thread submits. DeferTaskrun (with
	// SingleIssuer) delivers completions only inside SubmitAndWait;
	// CoopTaskrun does not interrupt the thread for them. A kernel that does
	// not know them makes the ring without.
	SingleIssuer bool
	DeferTaskrun bool
	CoopTaskrun  bool
}

// Ring is a submission and a completion queue shared with the kernel.
type Ring struct {
	q           queues
	fd          int
	flags       uint32 // of the setup, as the kernel accepted them
	enterFd     int    // fd, or the index of the registered ring
	enterFlags  uint32 // ioringEnterRegisteredRing, or 0
	registered  bool
	closed      bool
	filesInUse  bool
	buffersUsed bool
}

// New makes a ring. The error is ErrDisabled, ErrNotSupported, ErrMemlock, or
// another errno of io_uring_setup(2) or mmap(2).
func New(cfg Config) (*Ring, error) {
	if cfg.Entries == 0 || cfg.Entries > MaxEntries {
		return nil, fmt.Errorf("make ring: %d entries, want 1 to %d", cfg.Entries, MaxEntries)
	}
	if cfg.DeferTaskrun && !cfg.SingleIssuer {
		return nil, errors.New("make ring: DeferTaskrun needs SingleIssuer")
	}
	var p params
	p.flags = ioringSetupClamp
	if cfg.SQE128 {
		p.flags |= ioringSetupSQE128
	}
	// Newest first: each step leaves out what a kernel one step older refuses.
	wanted := uint32(ioringSetupSubmitAll)
	if cfg.CoopTaskrun {
		wanted |= ioringSetupCoopTaskrun | ioringSetupTaskrunFlag
	}
	newer := uint32(0)
	if cfg.SingleIssuer {
		newer |= ioringSetupSingleIssuer
	}
	if cfg.DeferTaskrun {
		newer |= ioringSetupDeferTaskrun
	}
	r := &Ring{}
	var errno unix.Errno
	for _, optional := range []uint32{wanted | newer | ownSetup, wanted | newer, wanted, 0} {
		attempt := p
		attempt.flags |= optional
		r.fd, errno = r.q.setup(cfg.Entries, &attempt)
		if errno != unix.EINVAL {
			p = attempt
			break
		}
	}
	if errno != 0 {
		return nil, setupError(errno, readDisabledSysctl())
	}
	r.flags = p.flags
	r.enterFd = r.fd
	// EXT_ARG stands for the version.
	const needed = ioringFeatSingleMmap | ioringFeatNodrop | ioringFeatExtArg
	if p.features&needed != needed {
		r.q.close(r.fd, p.flags)
		return nil, fmt.Errorf("make ring: %w: Linux 5.11 or newer is needed", ErrNotSupported)
	}
	return r, nil
}

// Close gives the ring back: queues, registered files and buffers. Operations
// in flight are cancelled or completed by the kernel in the background, so
// their memory must stay; better to have none. A second Close does nothing.
func (r *Ring) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	// Registered files would otherwise be let go some time after the close,
	// by a kernel worker; a device that must see its last close waits for it.
	if r.filesInUse {
		r.register(ioringUnregisterFiles, nil, 0)
	}
	if r.buffersUsed {
		r.register(ioringUnregisterBuffers, nil, 0)
	}
	return r.close()
}

// Abandon is Close for a ring with commands in flight that do not end before the kernel
// cancels them, which it does after the close. Before Linux 6.13 Close would wait for
// them for ever, because they use the registered files.
func (r *Ring) Abandon() error {
	if r.closed {
		return nil
	}
	r.closed = true
	return r.close()
}

func (r *Ring) close() error {
	if r.registered {
		_ = r.unregisterRing() // closing ends it as well
	}
	return r.q.close(r.fd, r.flags)
}

// SQE is the next free entry of the submission queue, zeroed, or nil when the
// queue is full. The entry reaches the kernel with the next submit.
func (r *Ring) SQE() *SQE {
	s := r.q.next()
	if s == nil {
		return nil
	}
	*s = SQE{}
	if r.flags&ioringSetupSQE128 != 0 {
		*(*SQE)(unsafe.Add(unsafe.Pointer(s), unsafe.Sizeof(SQE{}))) = SQE{}
	}
	return s
}

// Submit gives all filled entries to the kernel without waiting for any. It is
// done when the kernel took what it could: on a shortage of memory some stay
// in the queue for the next submit.
func (r *Ring) Submit() error {
	n := r.q.flush()
	if n == 0 {
		return nil
	}
	return r.enter(n, 0, 0, false)
}

// SubmitAndWait gives all filled entries to the kernel and waits until at
// least min completions are in the queue, in one system call; with min 0 it
// only fetches the completions that are due. It may return early with fewer,
// even none: callers loop on what Reap hands out. raw keeps the thread's P;
// see the package comment.
func (r *Ring) SubmitAndWait(min uint32, raw bool) error {
	return r.enter(r.q.flush(), min, ioringEnterGetevents, raw)
}

// Reap copies completions into dst, frees their places in the queue, and
// returns how many. It does not wait; it lets the kernel move completions that
// had not found room into the queue.
func (r *Ring) Reap(dst []CQE) int {
	n := r.q.reap(dst)
	if n == 0 && r.q.overflowed() {
		if r.enter(0, 0, ioringEnterGetevents, false) == nil {
			n = r.q.reap(dst)
		}
	}
	return n
}

// Ready is how many completions lie in the queue.
func (r *Ring) Ready() uint32 { return r.q.ready() }

// Due says that a wait for one completion would not sleep: there are some in
// the queue, or the kernel has some to deliver, which shows with CoopTaskrun
// only.
func (r *Ring) Due() bool { return r.q.ready() > 0 || r.q.due() }

// enter calls io_uring_enter. All that a caller answers by looking at the
// completion queue and calling again is no error: a signal, a passing lack of
// memory, a full completion queue.
func (r *Ring) enter(submit, min, flags uint32, raw bool) error {
	flags |= r.enterFlags
	var errno unix.Errno
	if raw {
		_, _, errno = syscall.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.enterFd),
			uintptr(submit), uintptr(min), uintptr(flags), 0, 0)
		// A signal that came after entries were submitted shows as success.
		// Only the scheduler can say whether it was a request to stop: without
		// this call a garbage collection might wait for ever.
		if errno == unix.EINTR || (min > 0 && errno == 0 && r.q.ready() == 0) {
			runtime.Gosched()
		}
	} else {
		errno = r.q.enter(r.enterFd, submit, min, flags)
	}
	switch errno {
	case 0, unix.EINTR, unix.EBUSY:
		return nil
	case unix.EAGAIN:
		// No memory for a request: let others run before the next attempt.
		runtime.Gosched()
		return nil
	}
	return fmt.Errorf("enter ring: %w", errno)
}

// readDisabledSysctl is the value of kernel.io_uring_disabled, "" if unknown.
func readDisabledSysctl() string {
	b, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// setupError turns the errno of io_uring_setup into what a person can act on;
// sysctl is the value of kernel.io_uring_disabled.
func setupError(errno unix.Errno, sysctl string) error {
	switch errno {
	case unix.EPERM, unix.EACCES:
		switch sysctl {
		case "2":
			return fmt.Errorf("make ring: %w by sysctl kernel.io_uring_disabled=2: set it to 0 (or to 1 and run as root)", ErrDisabled)
		case "1":
			return fmt.Errorf("make ring: %w for unprivileged users by sysctl kernel.io_uring_disabled=1: run as root, or join the group of sysctl kernel.io_uring_group", ErrDisabled)
		}
		return fmt.Errorf("make ring: %w by a seccomp filter or security module (sysctl kernel.io_uring_disabled is not the cause): allow the io_uring system calls in the container or service", ErrDisabled)
	case unix.ENOSYS:
		return fmt.Errorf("make ring: %w: the kernel was built without CONFIG_IO_URING, or a seccomp filter hides it", ErrNotSupported)
	case unix.ENOMEM:
		return fmt.Errorf("make ring: %w: raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=)", ErrMemlock)
	}
	return fmt.Errorf("make ring: %w", errno)
}
