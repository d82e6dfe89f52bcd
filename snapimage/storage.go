package snapimage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// storage is a piece of difference storage on this machine: what its file holds
// is all of a disk, and nobody else may read it, now or later. So the file is
// always one that was made for it and that nobody else can have open:
//
//	nothing there   a file of that name
//	a directory     a nameless file in it
//	a file          a nameless file beside it, which takes over its space unless
//	                somebody has it open. The file keeps name, mode and size,
//	                and gets its space back
//	a block device  the device, which nobody else holds
type storage struct {
	path   string // as it was given
	file   *blockdev.OSFile
	name   *name   // of file, if it has one
	lender *lender // the file that was there
	fixed  bool
	size   int64 // 0: as much as the filesystem gives
	align  int   // what direct I/O needs, bytes; 0 if it is not done
}

// Storage says what to use as difference storage.
type Storage struct {
	// Place is where it is to be; whoever it is given to closes it.
	Place *disk.Place
	// Where is a path of the place by which another process finds it.
	Where string
	// Limit is the most that may be taken, in bytes; 0 is all there is.
	Limit int64
	// Overwrite uses a file or a device whatever it holds.
	Overwrite bool
	// Probe says what a block device holds, empty for nothing: see disk.Blkid.
	Probe func(*os.File) (string, error)
}

// ErrStorageInUse: the file has content, or somebody uses the device.
var ErrStorageInUse = errors.New("in use")

// ErrNoStorageThere: the path leads to something else, as a character device.
var ErrNoStorageThere = errors.New("neither a file, a directory nor a block device")

// open opens the storage for a snapshot whose smallest logical block is align
// bytes. What the error is about, the caller says.
func (c Storage) open(align int) (s *storage, err error) {
	p := c.Place
	defer func() {
		if err != nil || s.name == nil {
			p.Close()
		}
	}()
	s = &storage{path: p.Path, size: c.Limit}
	switch p.Kind() {
	case 0:
		return s, s.openNew(p, align)
	case unix.S_IFDIR:
		return s, s.openNameless(p.File, align)
	case unix.S_IFREG:
		return s, s.openBeside(c, align)
	case unix.S_IFBLK:
		return s, s.openDevice(c, align)
	}
	return nil, ErrNoStorageThere
}

// ownMode is the mode of a file that holds what was on a disk.
const ownMode = 0o600

func (s *storage) openNew(p *disk.Place, align int) error {
	fd, err := unix.Openat(int(p.Dir.Fd()), p.Base, newFile|unix.O_CREAT|unix.O_NOFOLLOW, ownMode)
	if err != nil {
		return err
	}
	s.file = blockdev.NewOSFile(fd, p.Path)
	s.name = &name{p}
	if err := s.claim(align); err != nil {
		return errors.Join(err, s.name.remove(fd), s.file.Close())
	}
	return nil
}

func (s *storage) openNameless(dir *os.File, align int) error {
	fd, err := nameless(dir)
	if err != nil {
		return err
	}
	s.file = blockdev.NewOSFile(fd, s.path)
	if err := s.claim(align); err != nil {
		s.file.Close()
		return err
	}
	return nil
}

const newFile = unix.O_RDWR | unix.O_EXCL | unix.O_CLOEXEC

// nameless makes a file without a name in a directory.
func nameless(dir *os.File) (fd int, err error) {
	fd, err = unix.Openat(int(dir.Fd()), ".", newFile|unix.O_TMPFILE, ownMode)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return namedNameless(dir)
	}
	return fd, err
}

// namedNameless is nameless on a filesystem that wants a name to begin with.
func namedNameless(dir *os.File) (fd int, err error) {
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

// lock claims a file for one snapshot, until the last I/O on it has ended.
func lock(fd int) error {
	if errors.Is(unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: another snapshot stores there", ErrStorageInUse)
	}
	return nil
}

// claim makes a new file fit for its purpose.
func (s *storage) claim(align int) error {
	fd := s.file.Fd()
	if err := lock(fd); err != nil {
		return err
	}
	// The mode it was made with is less what the process masks.
	_ = unix.Fchmod(fd, ownMode)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&0o777 != ownMode {
		return fmt.Errorf("a file here has the mode %o, and others could read what is stored: choose another place", st.Mode&0o777)
	}
	// Not at the opening: some filesystems make the file before they refuse.
	if s.direct(true) == nil {
		s.align = directAlign(fd)
	}
	return s.suit(align)
}

// direct changes whether the page cache is passed by.
func (s *storage) direct(on bool) error {
	fd := uintptr(s.file.Fd())
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if on {
		flags |= unix.O_DIRECT
	} else {
		flags &^= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(fd, unix.F_SETFL, flags)
	return err
}

// suit makes the storage fit for a snapshot whose images are read and written
// in pieces of align bytes. If that is less than it can do directly: through
// the page cache, then, and all of it.
func (s *storage) suit(align int) error {
	if s.align <= align {
		return nil
	}
	s.align = 0
	return s.direct(false)
}

// lender is a file that was there, whose space the storage has for the time
// being. It holds none of the data.
type lender struct {
	fd int
	// space is how many bytes were allocated for it, if that was all of it; a
	// sparse file has no claim on any.
	space int64
}

func (s *storage) openBeside(c Storage, align int) (err error) {
	p := c.Place
	fd, err := reopen(p.File, unix.O_RDWR|unix.O_NONBLOCK)
	switch {
	case errors.Is(err, unix.EAGAIN): // see lease
		return fmt.Errorf("%w: another is about to use the file", ErrStorageInUse)
	case err != nil:
		return err
	}
	defer func() {
		if err != nil {
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
		return fmt.Errorf("look for data: %w", err)
	default:
		return fmt.Errorf("%w: the file holds data, among %d bytes: %s, or overwrite it (--overwrite)", ErrStorageInUse, st.Size, instead)
	}
	if mountOf(fd) != mountOf(int(p.Dir.Fd())) {
		return errors.New("the file is on another filesystem than its directory: name a directory there")
	}
	if err := s.openNameless(p.Dir, align); err != nil {
		return err
	}
	s.lender = &lender{fd: fd}
	if open {
		return nil // what is written there by now is not ours to lose
	}
	if st.Blocks*512 >= st.Size {
		s.lender.space = st.Size
	}
	if err := s.borrow(st.Size); err != nil {
		return errors.Join(err, s.file.Close(), allocate(fd, s.lender.space))
	}
	return nil
}

// lease says whether the file is open or mapped by other means than fd, as far as
// its filesystem tells. If it is not, whoever wants to open it waits for release.
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

// allocate gives a file space for its first n bytes, as far as it still has as
// many, and a name.
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

// reopen opens what was opened as a place, whatever its names lead to by now.
func reopen(f *os.File, flags int) (fd int, err error) {
	return unix.Open(reopening(f), flags|unix.O_CLOEXEC, 0)
}

// reopening is the path that reopens f.
func reopening(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func (s *storage) openDevice(c Storage, align int) (err error) {
	s.file, err = blockdev.OpenExclusive(reopening(c.Place.File), c.Place.Path, unix.O_RDWR|unix.O_DIRECT)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: the device is mounted or held", ErrStorageInUse)
	case err != nil:
		return err
	}
	s.fixed = true
	defer func() {
		if err != nil {
			s.file.Close()
		}
	}()
	if !c.Overwrite {
		if err := c.unused(); err != nil {
			return err
		}
	}
	size, err := s.file.Size()
	if err != nil {
		return err
	}
	if s.size == 0 || s.size > size {
		s.size = size
	}
	if s.align, err = unix.IoctlGetInt(s.file.Fd(), unix.BLKSSZGET); err != nil {
		return err
	}
	return s.suit(align)
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
// emptied and loses its name, a device is zeroed as far as it was used.
func (s *storage) discard(used int64) error {
	fd := s.file.Fd()
	var errs []error
	if s.fixed {
		if used > 0 {
			err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, used)
			if err != nil {
				err = unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 0, used)
			}
			errs = append(errs, err)
		}
		errs = append(errs, unix.Fsync(fd))
	} else {
		errs = append(errs, unix.Ftruncate(fd, 0))
	}
	if s.name != nil {
		errs = append(errs, s.name.remove(fd))
		s.name.Close()
	}
	errs = append(errs, s.file.Close())
	if s.lender != nil {
		errs = append(errs, allocate(s.lender.fd, s.lender.space), unix.Close(s.lender.fd))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("give back storage %s: %w", s.path, err)
	}
	return nil
}

// name is where a file that we made was in its directory.
type name struct{ *disk.Place }

// errMoved: a file has another name than the one that it was given.
var errMoved = errors.New("was moved away or given another name: a file remains somewhere, and it is empty")

// remove takes the name from the file fd, if it still is that file's. Between
// the look and the removal somebody may exchange what has the name, but only who
// may remove it as well: all that can be lost is what he could have removed
// himself.
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
