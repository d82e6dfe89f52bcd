package machine

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// archive writes a cpio archive in the "newc" format, which the kernel unpacks into its first root. One is written
// for every boot: it is small, and it carries the guest's orders too.
type archive struct {
	buf bytes.Buffer
	ino int
}

func (a *archive) add(name string, mode uint32, data []byte) {
	a.ino++
	// Thirteen numbers of eight hex digits: ino, mode, uid, gid, nlink, mtime, filesize, device and rdevice, name
	// length with its NUL, checksum. Name and data are both padded to four bytes.
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) dir(name string)               { a.add(name, unix.S_IFDIR|0o755, nil) }
func (a *archive) file(name string, data []byte) { a.add(name, unix.S_IFREG|0o755, data) }

// memfd returns the finished archive as a file without a name.
func (a *archive) memfd() (*os.File, error) {
	a.add("TRAILER!!!", 0, nil)
	fd, err := unix.MemfdCreate("initramfs", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create initramfs: %w", err)
	}
	f := os.NewFile(uintptr(fd), "initramfs")
	if _, err := f.Write(a.buf.Bytes()); err != nil {
		f.Close()
		return nil, fmt.Errorf("write initramfs: %w", err)
	}
	return f, nil
}
