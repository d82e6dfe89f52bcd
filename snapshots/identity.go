package snapshots

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// identity is what a file is known by, whatever its names are. Its handle finds the
// file without any name, and tells it from a later file of the same number. On a
// filesystem that has no handles the time of the file's birth has to do that.
type identity struct {
	Dev    uint64 `json:"dev"`
	Ino    uint64 `json:"ino"`
	Born   int64  `json:"born,omitempty"` // nanoseconds since 1970
	Type   int32  `json:"type,omitempty"` // of the handle
	Handle []byte `json:"handle,omitempty"`
}

func identify(fd int) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return identity{}, err
	}
	id := identity{Dev: st.Dev, Ino: st.Ino}
	var sx unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &sx) == nil && sx.Mask&unix.STATX_BTIME != 0 {
		id.Born = sx.Btime.Sec*1e9 + int64(sx.Btime.Nsec)
	}
	if h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH); err == nil {
		id.Type, id.Handle = h.Type(), h.Bytes()
	}
	return id, nil
}

// same says whether it is the same file: a number may be another's by now, but not
// with the same time of birth.
func (id identity) same(as identity) bool {
	return id.Dev == as.Dev && id.Ino == as.Ino && id.Born == as.Born
}

// errGone: a file does not exist any more, under whatever name.
var errGone = errors.New("does not exist any more")

// open opens the file, which was at path. It fails with errGone, or with
// fs.ErrNotExist if the file is not found, wherever it may be.
func (id identity) open(path string, flags int) (fd int, err error) {
	// It is opened as a place only at first, because to open what somebody else put
	// there may have effects.
	const place = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	at, err := id.openHandle(path, place)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EPERM) { // a container may lack the capability
		at, err = unix.Open(path, place, 0)
	}
	if err != nil {
		return -1, err
	}
	f := os.NewFile(uintptr(at), path)
	defer f.Close()
	switch now, err := identify(at); {
	case err != nil:
		return -1, err
	case !now.same(id):
		return -1, fmt.Errorf("another file is there: %w", fs.ErrNotExist)
	}
	return reopen(f, flags|unix.O_NONBLOCK)
}

func (id identity) openHandle(path string, flags int) (fd int, err error) {
	if id.Handle == nil {
		return -1, errors.ErrUnsupported
	}
	mount, err := openOn(id.Dev, path)
	if err != nil {
		return -1, err
	}
	defer unix.Close(mount)
	fd, err = unix.OpenByHandleAt(mount, unix.NewFileHandle(id.Type, id.Handle), flags)
	if errors.Is(err, unix.ESTALE) {
		err = errGone
	}
	return fd, err
}

// openOn opens something on the filesystem dev: path, if it is a directory, or the
// nearest one above it that is there.
func openOn(dev uint64, path string) (int, error) {
	for ; ; path = filepath.Dir(path) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Dev == dev {
				return fd, nil
			}
			unix.Close(fd)
		}
		if path == filepath.Dir(path) {
			return -1, fmt.Errorf("its filesystem is not mounted there any more: %w", fs.ErrNotExist)
		}
	}
}

// deviceIdentity is what a block device is known by: the kernel gives a number to
// another disk when one is gone, but a sequence number only once.
type deviceIdentity struct {
	Number   uint64 `json:"number"`   // as unix.Mkdev makes it
	Sequence uint64 `json:"sequence"` // of the whole disk
	Start    string `json:"start"`    // of a partition, in sectors
	Size     int64  `json:"size"`     // bytes
}

// identifyDevice is the identity of an open block device.
func identifyDevice(f *blockdev.OSFile) (id deviceIdentity, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.Fd(), &st); err != nil {
		return id, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return id, errors.New("not a block device")
	}
	id.Number = st.Rdev
	if id.Size, err = f.Size(); err != nil {
		return id, err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.Fd()), unix.BLKGETDISKSEQ, uintptr(unsafe.Pointer(&id.Sequence))); errno != 0 {
		return id, fmt.Errorf("ask for the disk's sequence number: %w", errno)
	}
	sys := fmt.Sprintf("/sys/dev/block/%d:%d/start", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	if b, err := os.ReadFile(sys); err == nil {
		id.Start = strings.TrimSpace(string(b))
	}
	return id, nil
}
