package control

import (
	"context"

	"golang.org/x/sys/unix"
)

// process is a process of this machine: its pidfd.
type process int

// openProcess is the process of that number, if it can be waited for.
func openProcess(pid int) (p process, ok bool) {
	fd, err := unix.PidfdOpen(pid, 0)
	return process(fd), err == nil
}

func (p process) close() { _ = unix.Close(int(p)) }

// wait waits until the process has ended, or for ctx.
func (p process) wait(ctx context.Context) error {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}, 100)
		if n > 0 || err != nil && err != unix.EINTR {
			return nil //nolint:nilerr // how it ends cannot be seen
		}
	}
	return ctx.Err()
}
