package snapshots

import (
	"errors"
	"io/fs"
	"os"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// name is where a file that we made was in its directory.
type name struct{ *disk.Place }

// errMoved: a file has another name than the one that it was given.
var errMoved = errors.New("the file was moved away or given another name: it remains there, and it is empty")

// remove takes the name from the file fd, if the name is still that file's. Between the
// look and the removal somebody may put another file under the name. But only somebody
// who may remove that other file can do so. So nothing is lost that he could not have
// removed himself.
func (n *name) remove(fd int) error {
	dir := int(n.Dir.Fd())
	var own, st unix.Stat_t
	if err := unix.Fstat(fd, &own); err != nil {
		return err
	}
	err := unix.Fstatat(dir, n.Base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Dev == own.Dev && st.Ino == own.Ino:
		if err := unix.Unlinkat(dir, n.Base, 0); err != nil {
			return err
		}
		own.Nlink--
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if own.Nlink > 0 {
		return errMoved
	}
	return nil
}

const newFile = unix.O_RDWR | unix.O_EXCL | unix.O_CLOEXEC

// tmpfile makes a file without a name in a directory, with O_TMPFILE.
func tmpfile(dir *os.File) (fd int, err error) {
	fd, err = unix.Openat(int(dir.Fd()), ".", newFile|unix.O_TMPFILE, ownMode)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return unlinkedFile(dir)
	}
	return fd, err
}

// unlinkedFile is tmpfile on a filesystem that has no O_TMPFILE.
func unlinkedFile(dir *os.File) (fd int, err error) {
	n := &name{&disk.Place{Dir: dir, Base: ".ublk-blksnap-" + uuid.NewString()}}
	fd, err = unix.Openat(int(dir.Fd()), n.Base, newFile|unix.O_CREAT|unix.O_NOFOLLOW, ownMode)
	if err != nil {
		return -1, err
	}
	if err := n.remove(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
