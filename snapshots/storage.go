package snapshots

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// storage is a piece of difference storage on this machine. Its file holds data of
// disks, which nobody else may read, now or later. So the file is always one that was
// made for it, and that nobody else can have open:
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

// StorageConfig says what to use as difference storage.
type StorageConfig struct {
	// Place is where it is to be; whoever it is given to closes it.
	Place *disk.Place
	// RealPath is a path of the place by which another process finds it.
	RealPath string
	// Limit is the most that may be taken, in bytes; 0 is all there is.
	Limit int64
	// Overwrite uses a file or a device whatever it holds.
	Overwrite bool
	// Probe says what a block device holds, empty for nothing: see disk.Blkid.
	Probe func(*os.File) (string, error)
}

// ErrStorageInUse: the file has content, or somebody uses the device.
var ErrStorageInUse = errors.New("in use")

// ErrNoStorageThere: the path leads to something else, for example a character device.
var ErrNoStorageThere = errors.New("neither a file, a directory nor a block device")

// open opens the storage for a snapshot whose smallest logical block is align bytes.
// The error does not name the storage; the caller does.
func (c StorageConfig) open(align int) (s *storage, err error) {
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
		return s, s.openTmpfile(p.File, align)
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

func (s *storage) openTmpfile(dir *os.File, align int) error {
	fd, err := tmpfile(dir)
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
	// The file was made without the mode bits that the process masks.
	_ = unix.Fchmod(fd, ownMode)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&0o777 != ownMode {
		return fmt.Errorf("a file here has the mode %o, and others could read what is stored: choose another place", st.Mode&0o777)
	}
	// O_DIRECT is set only now, because some filesystems make the file before they
	// refuse it.
	if s.setDirect(true) == nil {
		s.align = directAlign(fd)
	}
	return s.fitAlign(align)
}

// setDirect changes whether the page cache is passed by.
func (s *storage) setDirect(on bool) error {
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

// fitAlign makes the storage fit for a snapshot whose images are read and written in
// pieces of align bytes. If the storage cannot do pieces so small directly, all its I/O
// goes through the page cache.
func (s *storage) fitAlign(align int) error {
	if s.align <= align {
		return nil
	}
	s.align = 0
	return s.setDirect(false)
}

// reopen opens what was opened as a place, whatever its names lead to by now.
func reopen(f *os.File, flags int) (fd int, err error) {
	return unix.Open(reopening(f), flags|unix.O_CLOEXEC, 0)
}

// reopening is the path that reopens f.
func reopening(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func (s *storage) openDevice(c StorageConfig, align int) (err error) {
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
		if err := c.checkUnused(); err != nil {
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
	return s.fitAlign(align)
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

// wipe gives the storage back with nothing left to read in it. A file is emptied and
// loses its name. A device is zeroed as far as it was used.
func (s *storage) wipe(used int64) error {
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
