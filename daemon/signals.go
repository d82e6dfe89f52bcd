package daemon

import (
	"os/signal"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ignoreSignals ignores the signals that mean nothing to a daemon and would end it,
// or stop it as Ctrl-Z does. The signals of a fault stay as they are. So does
// SIGABRT, for somebody who wants to end the daemon and see where it was.
func ignoreSignals() {
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE, unix.SIGALRM, unix.SIGVTALRM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGXCPU, unix.SIGXFSZ,
		unix.SIGSTKFLT, unix.SIGIO, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	for n := unix.Signal(32); n <= 64; n++ {
		if n > 34 {
			signal.Ignore(n)
			continue
		}
		// Go leaves these to the C library. Without it they would kill the process.
		ignore := struct {
			handler, flags, restorer uintptr
			mask                     uint64
		}{handler: 1} // SIG_IGN
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(n), uintptr(unsafe.Pointer(&ignore)), 0, unsafe.Sizeof(ignore.mask), 0, 0)
	}
}
