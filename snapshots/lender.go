package snapshots

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// lender is a file that was there, whose space the storage has for the time
// being. It holds none of the data.
type lender struct {
	fd int
	// space is how many bytes were allocated for it, if that was all of it; a
	// sparse file has no claim on any.
	space int64
}

func (s *storage) openBeside(c StorageConfig, align int) (err error) {
	p := c.Place
	fd, err := reopen(p.File, unix.O_RDWR|unix.O_NONBLOCK)
	switch {
	case errors.Is(err, unix.EAGAIN): // see lease
		return fmt.Errorf("%w: another snapshot is about to use the file", ErrStorageInUse)
	case err != nil:
		return err
	}
	defer func() {
		if s.lender == nil {
			unix.Close(fd)
		}
	}()
	if err := lock(fd); err != nil {
		return err
	}
	// Between the look at what the file holds and the taking of its space nobody
	// can put anything there.
	open, release := lease(fd)
	defer release()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	// Allocated space that somebody has looked at counts as data while the zeroes
	// are in the page cache.
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	const instead = "name a new file, a directory or a block device"
	switch _, err := unix.Seek(fd, 0, unix.SEEK_DATA); {
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%w: the file belongs to user %d: %s", ErrStorageInUse, st.Uid, instead)
	case st.Nlink != 1:
		return fmt.Errorf("%w: the file has %d names: %s", ErrStorageInUse, st.Nlink, instead)
	case errors.Is(err, unix.ENXIO): // no data
	case c.Overwrite && open:
		return fmt.Errorf("%w: somebody has the file open, perhaps a loop device or a virtual machine: %s", ErrStorageInUse, instead)
	case c.Overwrite:
	case err != nil:
		return fmt.Errorf("look for data in the file: %w", err)
	default:
		return fmt.Errorf("%w: the file of %d bytes holds data: %s, or overwrite it (--overwrite)", ErrStorageInUse, st.Size, instead)
	}
	if mountOf(fd) != mountOf(int(p.Dir.Fd())) {
		return errors.New("the file is on another filesystem than its directory: name a directory there")
	}
	if err := s.makeFile(p.Dir, "", align); err != nil {
		return err
	}
	space := int64(0)
	if !open && st.Blocks*512 >= st.Size { // else what is written there by now is not ours to lose
		space = st.Size
	}
	id, err := identify(fd)
	if err != nil {
		return err
	}
	if err := s.update(func(r *recordStorage) { r.Lender, r.Space = &id, space }); err != nil {
		return err
	}
	s.state.keepNote()
	s.lender = &lender{fd: fd, space: space} // closes fd and gives the space back from now on
	if open {
		return nil
	}
	return s.borrow(st.Size)
}

// lease says whether somebody else has the file open or mapped, as far as its
// filesystem tells. If nobody has, whoever wants to open the file waits for release.
func lease(fd int) (open bool, release func()) {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	return errors.Is(err, unix.EAGAIN), func() { _, _ = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK) }
}

// mountOf is the number of the mount that an open file was reached by.
func mountOf(fd int) uint64 {
	var st unix.Statx_t
	_ = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st)
	return st.Mnt_id
}

// borrow gives the storage the space of the lender, whose contents, size bytes,
// are lost.
func (s *storage) borrow(size int64) error {
	if size == 0 {
		return nil
	}
	if err := unix.Fallocate(s.lender.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size); err != nil {
		return fmt.Errorf("free the space of the file: %w", err)
	}
	space := s.lender.space
	if s.size != 0 {
		space = min(space, s.size)
	}
	if space == 0 {
		return nil
	}
	if err := unix.Fallocate(s.file.Fd(), 0, 0, space); err != nil {
		return fmt.Errorf("take over the space of the file: %w", err)
	}
	return nil
}

// allocate gives a file space for its first n bytes, or for all of it if it is shorter
// by now. A file without a name gets none.
func allocate(fd int, n int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if n = min(n, st.Size); n == 0 || st.Nlink == 0 {
		return nil
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, n); err != nil {
		return fmt.Errorf("allocate its %d bytes again: %w", n, err)
	}
	return nil
}
