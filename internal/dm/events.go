package dm

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// EventReader hears what the kernel tells of device-mapper's devices: each new table and each
// end (kobject-uevent, as udev does).
type EventReader struct{ socket *os.File }

// Events begins to listen.
func Events() (*EventReader, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		if err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listen to the kernel's events: %w", err)
	}
	return &EventReader{os.NewFile(uintptr(fd), "uevents")}, nil
}

// Next waits for an event. It does not say of which device, and some are told as one.
func (e *EventReader) Next() error {
	message := make([]byte, 8<<10)
	for {
		n, err := e.socket.Read(message)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			return nil // some are lost
		case err != nil:
			return err
		case bytes.Contains(message[:n], []byte("/block/dm-")):
			return nil
		}
	}
}

// Close ends it, and what waits in Next.
func (e *EventReader) Close() { e.socket.Close() }
