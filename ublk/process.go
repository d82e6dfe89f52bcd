package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PrepareProcess makes this process fit for serving disks that the machine itself
// depends on. It is called once, early, before the first device. It returns an error
// for each step that did not succeed. The process works without that step, with the
// risk that the error names.
//
//   - Its threads become I/O flushers (prctl(2)). To get memory for them the kernel
//     never waits for a disk, which may be one that this process serves.
//   - Its memory is locked as it comes into use, so that no page of it is ever read
//     back from a disk. To lock all of it in advance would fill every address range
//     that the Go runtime reserves.
//   - The kernel never kills it to get memory.
//   - No limit that it was started with ends it or makes its I/O fail.
//   - It leaves no core. While a core is written the process serves nobody, and the
//     core might go to a disk that it serves. A core also holds users' data.
//   - It has the name of its program, whatever started it.
//
// The garbage collector keeps its settings, because payloads, rings and tables lie off
// the Go heap. The heap stays at the runtime's minimum of 4 MiB. A lower goal would
// only make the collector interrupt the queues more often.
//
// The caller sees to the mount namespace. The process must not be the last one to
// hold a mount on a disk that it serves, because it could never exit then.
func PrepareProcess() []error {
	var failed []error
	for _, step := range []func() error{RaiseLimits, becomeFlusher, lockMemory, avoidKill, nameThreads, leaveNoCore} {
		if err := step(); err != nil {
			failed = append(failed, err)
		}
	}
	return failed
}

// limits are what this process needs at least. Whoever starts it may have set less.
var limits = []struct {
	resource int
	name     string // as in /proc/PID/limits
	want     uint64
}{
	{unix.RLIMIT_CPU, "cpu time", unix.RLIM_INFINITY},
	{unix.RLIMIT_FSIZE, "file size", unix.RLIM_INFINITY},
	{unix.RLIMIT_DATA, "data size", unix.RLIM_INFINITY},
	{unix.RLIMIT_STACK, "stack size", 8 << 20},
	{unix.RLIMIT_NPROC, "processes", unix.RLIM_INFINITY},
	{unix.RLIMIT_NOFILE, "open files", 65536}, // bounds the number of devices
	{unix.RLIMIT_AS, "address space", unix.RLIM_INFINITY},
	{unix.RLIMIT_LOCKS, "file locks", unix.RLIM_INFINITY},
	{unix.RLIMIT_SIGPENDING, "pending signals", 4096},
	{unix.RLIMIT_RTTIME, "realtime timeout", unix.RLIM_INFINITY},
}

// RaiseLimits lifts those limits of this process that could end it, or break what it
// serves. PrepareProcess does this too, but some processes need it earlier.
func RaiseLimits() error {
	var errs []error
	for _, l := range limits {
		var old unix.Rlimit
		if err := unix.Getrlimit(l.resource, &old); err != nil {
			errs = append(errs, fmt.Errorf("read the limit of %s: %w", l.name, err))
			continue
		}
		if old.Cur >= l.want {
			continue
		}
		// Only root may go above the hard limit. Everybody may go up to it.
		err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.want, Max: max(l.want, old.Max)})
		if err != nil && old.Max < l.want {
			_ = unix.Setrlimit(l.resource, &unix.Rlimit{Cur: old.Max, Max: old.Max})
			errs = append(errs, fmt.Errorf("raise the limit of %s, which is %d: %w", l.name, old.Max, err))
		}
	}
	return errors.Join(errs...)
}

func leaveNoCore() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("switch core dumps off (a core that goes to a disk served here would never end): %w", err)
	}
	return nil
}

// processName is what ps and top call the process. After an exec of /proc/self/exe
// they would call it "exe".
const processName = "ublk-blksnap"

// nameThreads names the threads that there are. A thread to come gets the name of the
// one that makes it, or a name of its own. The runtime makes none meanwhile, which would
// have the old name.
func nameThreads() error {
	name, err := unix.BytePtrFromString(processName)
	if err != nil {
		return fmt.Errorf("name the process: %w", err)
	}
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
	runtime.KeepAlive(name)
	if errno != 0 {
		return fmt.Errorf("name the process: %w", errno)
	}
	return nil
}

func becomeFlusher() error {
	fail := func(err error) error {
		return fmt.Errorf("become an I/O flusher (without it, lack of memory may stop the machine's I/O): %w", err)
	}
	// Every thread needs it, because the runtime makes new threads from any of them.
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	if errno == syscall.ENOTSUP {
		return fail(errors.New("the program was built with cgo: build it with CGO_ENABLED=0"))
	}
	if errno != 0 {
		return fail(errno)
	}
	return nil
}

func lockMemory() error {
	fail := func(err error) error {
		return fmt.Errorf("lock the process's memory (without it, swapping may stop the machine's I/O): %w", err)
	}
	// The limit goes first. If it were in force when the memory is locked, the
	// runtime's next reservation of addresses would fail, and the process would die.
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
