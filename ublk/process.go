package ublk

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// PrepareProcess makes this process fit for serving disks that the machine
// itself depends on. It is called once, early, before the first device; each
// step that did not succeed is an error, and the process works without it, with
// the risk that the error names.
//
//   - Its threads become I/O flushers (prctl(2)): to get memory for them the
//     kernel never waits for a disk, which may be one of theirs.
//   - Its memory is locked as it comes into use: no page of it is ever read
//     back from a disk. Locking all of it in advance would fill every address
//     range that the Go runtime reserves.
//   - The kernel never picks it when it is out of memory.
//   - Its limits on locked memory and open files are raised.
//
// Nothing is done to the collection of garbage: payloads, rings and tables lie
// off the Go heap, which stays at the runtime's minimum of 4 MiB; a lower goal
// would only make it interrupt the queues more often.
//
// The mount namespace is the caller's affair: the process must not be the last
// one to hold a mount on a disk of its own, or it can never exit.
func PrepareProcess() []error {
	var failed []error
	for _, step := range []func() error{becomeFlusher, raiseFiles, lockMemory, avoidKill} {
		if err := step(); err != nil {
			failed = append(failed, err)
		}
	}
	return failed
}

func becomeFlusher() error {
	fail := func(err error) error {
		return fmt.Errorf("become an I/O flusher (without it, lack of memory may stop the machine's I/O): %w", err)
	}
	// Every thread, as the runtime makes new ones from any of them.
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	if errno == syscall.ENOTSUP {
		return fail(errors.New("the program was built with cgo: build it with CGO_ENABLED=0"))
	}
	if errno != 0 {
		return fail(errno)
	}
	return nil
}

func raiseFiles() error {
	const want = 65536
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read the limit on open files: %w", err)
	}
	if l.Cur >= want {
		return nil
	}
	raised := unix.Rlimit{Cur: want, Max: max(want, l.Max)}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &raised) == nil {
		return nil
	}
	raised = unix.Rlimit{Cur: l.Max, Max: l.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil || l.Max < want {
		return fmt.Errorf("raise the limit on open files (it bounds the number of devices) from %d to %d: %w", l.Cur, want, unix.EPERM)
	}
	return nil
}

func lockMemory() error {
	fail := func(err error) error {
		return fmt.Errorf("lock the process's memory (without it, swapping may stop the machine's I/O): %w", err)
	}
	// First the limit: locking with one in force would make the runtime's next
	// reservation of addresses fail, and the process die of it.
	none := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &none); err != nil {
		return fail(fmt.Errorf("raise RLIMIT_MEMLOCK: %w", err))
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fail(err)
	}
	return nil
}

func avoidKill() error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return fmt.Errorf("keep the kernel from killing the process when it is out of memory: %w", err)
	}
	return nil
}
