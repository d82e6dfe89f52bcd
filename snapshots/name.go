package snapshots

import (
	"errors"
	"io/fs"

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
	var own, st unix.Stat_t
	if err := unix.Fstat(fd, &own); err != nil {
		return err
	}
	if n.Dir == nil { // of a dead daemon's file, and it is not found
		if own.Nlink > 0 {
			return errMoved
		}
		return nil
	}
	dir := int(n.Dir.Fd())
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

// hiddenPrefix is what the name of every file begins with that is being made.
const hiddenPrefix = ".ublk-blksnap-"

// rename gives a file another name in its directory, which nothing there may have.
func (n *name) rename(base string) error {
	dir := int(n.Dir.Fd())
	err := unix.Renameat2(dir, n.Base, dir, base, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not every file server can
		if err = unix.Linkat(dir, n.Base, dir, base, 0); err == nil {
			err = unix.Unlinkat(dir, n.Base, 0)
		}
	}
	return err
}
