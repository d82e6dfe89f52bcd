package snapimage

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// storage is a piece of difference storage on this machine.
type storage struct {
	path  string
	file  *blockdev.OSFile
	made  bool // by us, under this name
	fixed bool
	size  int64 // 0: as much as the filesystem gives
	align int   // what direct I/O needs, bytes; 0 if it is not done
}

// ErrStorageInUse: the file has content, or somebody uses the device.
var ErrStorageInUse = errors.New("in use")

// openStorage opens path for a snapshot whose smallest logical block is align
// bytes: a file that is new or empty, a directory, where it makes a nameless
// file, or a block device that nobody uses. limit is the most bytes it may
// take, 0 for no limit.
func openStorage(path string, limit int64, align int) (*storage, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return openStorageFile(path, unix.O_CREAT|unix.O_EXCL, limit, align)
	case err != nil:
		return nil, err
	case st.IsDir():
		return openStorageFile(path, unix.O_TMPFILE, limit, align)
	case st.Mode().IsRegular():
		if st.Size() != 0 {
			return nil, fmt.Errorf("%s: %w: the file holds %d bytes: name a new file, a directory or a block device", path, ErrStorageInUse, st.Size())
		}
		return openStorageFile(path, unix.O_NOFOLLOW, limit, align)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return openStorageDevice(path, limit, align)
	}
	return nil, fmt.Errorf("%s: neither a file, a directory nor a block device", path)
}

func openStorageFile(path string, flags int, limit int64, align int) (*storage, error) {
	const mode = 0o600
	open := func(extra int) (int, error) {
		return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|flags|extra, mode)
	}
	fd, err := open(unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) { // a filesystem without direct I/O
		if flags&unix.O_CREAT != 0 {
			os.Remove(path) // some make the file before they refuse
		}
		fd, err = open(0)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &storage{path: path, made: flags != unix.O_TMPFILE, size: limit, file: blockdev.NewOSFile(fd, path)}
	if err := s.claim(flags == unix.O_NOFOLLOW, mode, align); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// claim makes the file the snapshot's own, before anything is done to it:
// another snapshot may have it whose storage hangs and that looks empty.
func (s *storage) claim(wasThere bool, mode uint32, align int) error {
	fd := s.file.Fd()
	if errors.Is(unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: another snapshot stores there", ErrStorageInUse)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if wasThere {
		if err := checkOurs(&st); err != nil {
			return err
		}
	}
	if st.Mode&0o777 != mode {
		if err := unix.Fchmod(fd, mode); err != nil {
			return err
		}
	}
	s.align = directAlign(fd)
	return s.suit(align)
}

// suit makes the storage fit for a snapshot whose images are read and written
// in pieces of align bytes. If that is less than it can do directly: through
// the page cache, then, and all of it.
func (s *storage) suit(align int) error {
	if s.align <= align {
		return nil
	}
	s.align = 0
	fd := s.file.Fd()
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags&^unix.O_DIRECT)
	}
	return err
}

// checkOurs refuses a file that was there and may have come to its name since it was looked
// at, or that somebody else may read: what it will hold is all of the disk.
func checkOurs(st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return errors.New("not a regular file any more")
	case st.Size != 0 || st.Nlink > 1:
		return fmt.Errorf("%w: the file holds %d bytes and has %d names: name a new file, a directory or a block device", ErrStorageInUse, st.Size, st.Nlink)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%w: the file belongs to user %d, who could read what is stored: name a new file", ErrStorageInUse, st.Uid)
	}
	return nil
}

func openStorageDevice(path string, limit int64, align int) (*storage, error) {
	f, err := blockdev.OpenDisk(path, blockdev.OpenOptions{Exclusive: true, Direct: true})
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s: %w: the device is mounted or held", path, ErrStorageInUse)
	}
	if err != nil {
		return nil, err
	}
	switch what, err := signature(path); {
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	case what != "":
		f.Close()
		return nil, fmt.Errorf("%s: %w: the device seems to hold %s, which would be overwritten: if it is not needed, wipefs -a %s", path, ErrStorageInUse, what, path)
	}
	s := &storage{path: path, file: f, fixed: true}
	if s.size, err = f.Size(); err != nil {
		f.Close()
		return nil, err
	}
	if limit != 0 {
		s.size = min(s.size, limit)
	}
	if s.align, err = unix.IoctlGetInt(f.Fd(), unix.BLKSSZGET); err == nil {
		err = s.suit(align)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// directAlign is the alignment that direct I/O on fd needs, 0 if the kernel
// does not say.
func directAlign(fd int) int {
	var st unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) != nil || st.Mask&unix.STATX_DIOALIGN == 0 {
		return 0
	}
	return int(st.Dio_offset_align)
}

// engine is the storage as the log knows it.
func (s *storage) engine() diffarea.Storage {
	return diffarea.Storage{File: s.file, Size: s.size, Fixed: s.fixed}
}

// discard gives the storage back with nothing left to read in it: a file is
// emptied and unlinked, a device zeroed as far as it was used.
func (s *storage) discard(used int64) error {
	var err error
	if s.fixed {
		if used > 0 {
			err = unix.Fallocate(s.file.Fd(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, used)
			if err != nil {
				err = unix.Fallocate(s.file.Fd(), unix.FALLOC_FL_ZERO_RANGE, 0, used)
			}
		}
		err = errors.Join(err, unix.Fsync(s.file.Fd()))
	} else {
		err = unix.Ftruncate(s.file.Fd(), 0)
		if s.made {
			if e := os.Remove(s.path); e != nil && !errors.Is(e, os.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	if err != nil {
		err = fmt.Errorf("give back storage %s: %w", s.path, err)
	}
	return errors.Join(err, s.file.Close())
}
