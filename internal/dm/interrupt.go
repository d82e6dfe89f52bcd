package dm

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// interruption is the signal that ends a thread's wait in the kernel. The Go runtime has the
// kernel begin a system call again after each signal (SA_RESTART), and since Linux 6.11 a
// suspend of device-mapper does. So this signal, which nobody uses, is set up otherwise.
const interruption = unix.Signal(62)

const (
	saRestart = 0x10000000
	// flagsAt is where a kernel's struct sigaction has the flags: behind the handler, on every
	// 64-bit machine. Its mask has 8 bytes.
	flagsAt, maskSize = 8, 8
)

var interruptible = sync.OnceValue(func() error {
	signal.Notify(make(chan os.Signal, 1), interruption) // nobody reads: what is told there is of no interest
	var action [64]byte
	p := unsafe.Pointer(&action)
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(interruption), 0, uintptr(p), maskSize, 0, 0); errno != 0 {
		return fmt.Errorf("read how signal %d is handled: %w", interruption, errno)
	}
	*(*uint64)(unsafe.Pointer(&action[flagsAt])) &^= saRestart
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(interruption), uintptr(p), 0, maskSize, 0, 0); errno != 0 {
		return fmt.Errorf("set how signal %d is handled: %w", interruption, errno)
	}
	return nil
})

// interruptPause is the time between two signals: one may come before the thread waits.
const interruptPause = 10 * time.Millisecond

// interrupt sends signals to a thread from the end of ctx on until ended.
func interrupt(ctx context.Context, thread int, ended <-chan struct{}) {
	select {
	case <-ended:
		return
	case <-ctx.Done():
	}
	for {
		_ = unix.Tgkill(os.Getpid(), thread, interruption)
		select {
		case <-ended:
			return
		case <-time.After(interruptPause):
		}
	}
}
