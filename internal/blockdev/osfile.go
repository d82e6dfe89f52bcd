package blockdev

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OSFile is a file of the operating system for a RingQueue: a block device or
// a regular file. It may be used on any number of queues at a time.
type OSFile struct {
	name  string
	fd    int
	block bool

	closing  sync.Once
	closeErr error
}

// OpenExclusive opens the block device at path and claims it. Until the file is
// closed nobody else can mount the device, put another device on it, or claim it.
// access is unix.O_RDONLY or O_RDWR, with O_DIRECT or without. name is what Name
// returns.
//
// The error is the errno of open(2). It is EBUSY if somebody has claimed the device.
func OpenExclusive(path, name string, access int) (*OSFile, error) {
	for {
		fd, err := unix.Open(path, access|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return NewOSFile(fd, name), nil
	}
}

// ErrUnsynced: what was written to a disk may not have got there. The kernel says so only
// once. It hides the number of the error, which of an opening would mean something else.
var ErrUnsynced = errors.New("not all that was written is durable")

// OpenSynced opens a disk so that nobody else can claim it, and makes durable what was
// written to it.
func OpenSynced(path string) (*OSFile, error) {
	f, err := OpenExclusive(path, path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if err := unix.Fsync(f.Fd()); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%w: %s", ErrUnsynced, err.Error())
	}
	return f, nil
}

// NewOSFile wraps an open file descriptor, which belongs to the OSFile from then on.
// The descriptor should be close-on-exec.
func NewOSFile(fd int, name string) *OSFile {
	f := &OSFile{name: name, fd: fd}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil {
		f.block = st.Mode&unix.S_IFMT == unix.S_IFBLK
	}
	return f
}

// Name is what the file was called when it was opened.
func (f *OSFile) Name() string { return f.name }

// Fd is the file descriptor. It still belongs to the OSFile.
func (f *OSFile) Fd() int { return f.fd }

// Size is the size in bytes, as it is now.
func (f *OSFile) Size() (int64, error) {
	if f.block {
		var size uint64
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
		if errno != 0 {
			return 0, fmt.Errorf("read size of %s: %w", f.name, errno)
		}
		return int64(size), nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, fmt.Errorf("read size of %s: %w", f.name, err)
	}
	return st.Size, nil
}

// holds says whether the file reaches to byte end.
func (f *OSFile) holds(end int64) bool {
	size, err := f.Size()
	return err == nil && end <= size
}

// truncated says whether the file is a regular file of less than minSize bytes. It uses
// the size that this machine knows. So it never waits for a file server.
func (f *OSFile) truncated(minSize int64) bool {
	if f.block || minSize == 0 {
		return false
	}
	var st unix.Statx_t
	_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(f.fd), uintptr(unsafe.Pointer(&noPath)),
		unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_SIZE, uintptr(unsafe.Pointer(&st)), 0)
	return errno == 0 && int64(st.Size) < minSize
}

// noPath is the empty string, as the kernel wants it: a zero byte.
var noPath byte

// Close closes the file, once. Later calls return the result of the first one. No
// operation on the file may be in flight, and none may follow. A RingQueue with which
// the file is registered keeps it open until the queue has stopped.
func (f *OSFile) Close() error {
	f.closing.Do(func() {
		if err := unix.Close(f.fd); err != nil {
			f.closeErr = fmt.Errorf("close %s: %w", f.name, err)
		}
	})
	return f.closeErr
}
