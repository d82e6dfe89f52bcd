// Package direct reads and writes disks without the page cache, so that what is
// seen is what the disk holds.
package direct

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// File is a disk opened without the page cache.
type File struct {
	FD   int // -1 once it is closed
	path string
}

// Open opens a disk with O_RDONLY, O_WRONLY or O_RDWR.
func Open(path string, flags int) (*File, error) {
	fd, err := unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &File{fd, path}, nil
}

// MustOpen is Open for a disk that must open. The test's end closes it.
func MustOpen(t testing.TB, path string, flags int) *File {
	t.Helper()
	f, err := Open(path, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// Close closes the file, as often as it is called.
func (f *File) Close() {
	if f.FD >= 0 {
		unix.Close(f.FD)
		f.FD = -1
	}
}

// ReadAt reads all of p or fails.
func (f *File) ReadAt(p []byte, off int64) error {
	n, err := unix.Pread(f.FD, p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d", n, len(p))
	}
	if err != nil {
		err = fmt.Errorf("read %d bytes of %s at %d: %w", len(p), f.path, off, err)
	}
	return err
}

// WriteAt writes all of p or fails.
func (f *File) WriteAt(p []byte, off int64) error {
	n, err := unix.Pwrite(f.FD, p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d", n, len(p))
	}
	if err != nil {
		err = fmt.Errorf("write %d bytes to %s at %d: %w", len(p), f.path, off, err)
	}
	return err
}

// Zero writes zeroes without a payload; hole lets the disk forget the place.
func (f *File) Zero(off, n int64, hole bool) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if hole {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	err := unix.Fallocate(f.FD, mode, off, n)
	if hole && errors.Is(err, unix.EOPNOTSUPP) { // not every disk can
		err = unix.Fallocate(f.FD, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if err != nil {
		return fmt.Errorf("zero %d bytes of %s at %d: %w", n, f.path, off, err)
	}
	return nil
}

// BufferSize is the size of each of Buffers, in bytes.
const BufferSize = 1 << 20

// Buffers are *[]byte of BufferSize bytes, fit for direct I/O, and used again.
var Buffers = sync.Pool{New: func() any {
	p, err := unix.Mmap(-1, 0, BufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return &p
}}

// Scan reads the first size bytes of a disk in order and shows them piece by
// piece: p begins at the given sector, of 512 bytes.
func Scan(path string, size int64, show func(p []byte, sector int64) error) error {
	f, err := Open(path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := Buffers.Get().(*[]byte)
	defer Buffers.Put(buf)
	for off := int64(0); off < size; off += BufferSize {
		p := (*buf)[:min(BufferSize, size-off)]
		if err := f.ReadAt(p, off); err != nil {
			return err
		}
		if err := show(p, off>>9); err != nil {
			return err
		}
	}
	return nil
}

// Digest is the checksum of all of a disk.
func Digest(t testing.TB, path string) [32]byte {
	t.Helper()
	h := sha256.New()
	err := Scan(path, guest.SizeOf(t, path), func(p []byte, _ int64) error {
		h.Write(p)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// Pages is memory fit for direct I/O.
func Pages(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}
