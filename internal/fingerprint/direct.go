package fingerprint

import (
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Direct reads a disk past the page cache, in which there may be something older or
// newer than what the disk holds.
type Direct struct {
	fd   int
	unit int64
	buf  []byte // aligned to pages, a multiple of unit
}

// OpenDirect opens the disk that the descriptor fd is of once more, for reading. The
// disk reads in blocks of block bytes.
func OpenDirect(fd, block int) (*Direct, error) {
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	for {
		own, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open the disk for its fingerprint: %w", err)
		}
		buf, err := unix.Mmap(-1, 0, mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			unix.Close(own)
			return nil, fmt.Errorf("make a buffer for the fingerprint: %w", err)
		}
		return &Direct{own, int64(max(block, 4096)), buf}, nil
	}
}

// ReadAt implements io.ReaderAt. Not for use from several goroutines.
func (d *Direct) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		start := at &^ (d.unit - 1)
		want := min((at-start+int64(len(p)-done)+d.unit-1)&^(d.unit-1), int64(len(d.buf)))
		n, err := unix.Pread(d.fd, d.buf[:want], start)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		if int64(n) <= at-start {
			return done, io.ErrUnexpectedEOF
		}
		done += copy(p[done:], d.buf[at-start:n])
	}
	return done, nil
}

// Close ends it.
func (d *Direct) Close() {
	unix.Close(d.fd)
	_ = unix.Munmap(d.buf)
}
