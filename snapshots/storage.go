package snapshots

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
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
//
// A daemon may die at any step of the making and of the end. So the record says
// what is about to be, a file begins under a hidden name that nobody else has, and
// a pin keeps it before it has another name or none:
//
//	record: MAKING, hidden name ──> file ──> pin ──> name ──> record: USED ──> Append
//	record: LEAVING ──> empty ──> no name ──> lender's space ──> no pin ──> record: GONE
type storage struct {
	state  *state
	n      int    // in state.rec.Storage
	path   string // as it was given
	file   *blockdev.OSFile
	name   *name   // of file, if it has one
	lender *lender // the file that was there
	fixed  bool
	start  int64 // where what is stored begins, bytes
	size   int64 // 0: as much as the filesystem gives
	align  int   // what direct I/O needs, bytes; 0 if it is not done

	reserve int // see StorageConfig.Reserve
	room    room
}

// update changes what is on record of the storage.
func (s *storage) update(change func(*recordStorage)) error {
	return s.state.update(func(r *record) { change(&r.Storage[s.n]) })
}

// StorageConfig says what to use as difference storage.
type StorageConfig struct {
	// Place is where it is to be; whoever it is given to closes it.
	Place *disk.Place
	// RealPath is a path of the place by which another process finds it.
	RealPath string
	// Limit is the most that may be taken, in bytes; 0 is all there is, but for what a file
	// leaves of its filesystem.
	Limit int64
	// Reserve is how many percent of its filesystem a file leaves; 0: without a limit as
	// many as all do, with one none.
	Reserve int
	// Overwrite uses a file or a device whatever it holds.
	Overwrite bool
	// Known is what a block device is known by in another boot, nil if it is not.
	Known disk.Identity
	// Probe says what a block device holds, empty for nothing: see disk.Blkid.
	Probe func(*os.File) (string, error)
	// Note is kept on record, for the owner to find again: see Left.
	Note json.RawMessage
}

// ErrStorageInUse: the file has content, or somebody uses the device.
var ErrStorageInUse = errors.New("in use")

// ErrNoStorageThere: the path leads to something else, for example a character device.
var ErrNoStorageThere = errors.New("neither a file, a directory nor a block device")

// openStorage opens a storage for a snapshot whose smallest logical block is align bytes.
// The error does not name the storage; the caller does. Nothing is left after an error.
func (st *state) openStorage(c StorageConfig, align int) (s *storage, err error) {
	p := c.Place
	defer func() {
		if err != nil || s.name == nil {
			p.Close()
		}
	}()
	kind := p.Kind()
	switch kind {
	case 0, unix.S_IFDIR, unix.S_IFREG, unix.S_IFBLK:
	default:
		return nil, ErrNoStorageThere
	}
	s = &storage{state: st, path: p.Path, size: c.Limit, reserve: c.Reserve}
	if err := st.update(func(r *record) {
		s.n = len(r.Storage)
		r.Storage = append(r.Storage, recordStorage{
			Stage: storageMaking, Path: p.Path, RealPath: c.RealPath, Limit: c.Limit, Reserve: c.Reserve, Overwrite: c.Overwrite, Note: c.Note,
		})
	}); err != nil {
		return nil, err
	}
	switch kind {
	case 0:
		err = s.openNew(p, align)
	case unix.S_IFDIR:
		err = s.makeFile(p.File, "", align)
	case unix.S_IFREG:
		err = s.openBeside(c, align)
	case unix.S_IFBLK:
		err = s.openDevice(c, align)
	}
	if err == nil {
		err = s.checkRoom(st.recorded().Chunk)
	}
	if err == nil {
		err = s.update(func(r *recordStorage) { r.Stage, r.Size, r.Fixed, r.Start = storageUsed, s.size, s.fixed, s.start })
	}
	if err == nil {
		return s, nil
	}
	if left := s.undo(); left != nil {
		err = errors.Join(err, left)
	}
	return nil, err
}

// undo gives back what was made of a storage that is not to be.
func (s *storage) undo() error {
	if s.file == nil {
		return s.leave(nil)
	}
	return s.wipe(0)
}

// ownMode is the mode of a file that holds what was on a disk.
const ownMode = 0o600

func (s *storage) openNew(p *disk.Place, align int) error {
	if err := s.makeFile(p.Dir, p.Base, align); err != nil {
		return err
	}
	s.name = &name{p}
	return nil
}

// makeFile makes the file, in a directory, under the name base or without one.
func (s *storage) makeFile(dir *os.File, base string, align int) (err error) {
	in, err := identify(int(dir.Fd()))
	if err != nil {
		return err
	}
	hidden := &name{&disk.Place{Dir: dir, Base: hiddenPrefix + uuid.NewString()}}
	point, fstype := mountOn(s.state.pins.root, int(dir.Fd()))
	if err := s.update(func(r *recordStorage) {
		r.Dir, r.Hidden, r.Base, r.Mount, r.FSType = &in, hidden.Base, base, point, fstype
	}); err != nil {
		return err
	}
	s.state.keepNote()
	fd, err := unix.Openat(int(dir.Fd()), hidden.Base, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, ownMode)
	if err != nil {
		return err
	}
	s.file = blockdev.NewOSFile(fd, s.path)
	now := hidden
	defer func() {
		if err != nil {
			_ = now.remove(fd) // what has another name is empty
			if s.state.keep != nil {
				syncDir(dir) // a later note does not name it
			}
		}
	}()
	deathpoint.Point()
	if err := s.claim(align); err != nil {
		return err
	}
	if err := s.state.pins.hold(s.n, fd); err != nil {
		return err
	}
	deathpoint.Point()
	id, err := identify(fd)
	if err != nil {
		return err
	}
	if err := s.update(func(r *recordStorage) { r.File = &id }); err != nil {
		return err
	}
	s.state.keepNote()
	if base == "" {
		err = hidden.remove(fd)
	} else if err = hidden.rename(base); err == nil {
		now = &name{&disk.Place{Dir: dir, Base: base}}
	}
	deathpoint.Point()
	if err == nil && s.state.keep != nil {
		syncDir(dir) // what has no name shall not have one again
	}
	return err
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
	f, err := blockdev.OpenExclusive(reopening(c.Place.File), c.Place.Path, unix.O_RDWR|unix.O_DIRECT)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: the device is mounted or held", ErrStorageInUse)
	case err != nil:
		return err
	}
	s.file, s.fixed = f, true
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
	if err := s.fitAlign(align); err != nil {
		return err
	}
	id, err := identifyDevice(s.file)
	if err != nil {
		return err
	}
	// The node, so that the next daemon finds it whatever its name is by then.
	if err := s.state.pins.hold(s.n, int(c.Place.File.Fd())); err != nil {
		return err
	}
	deathpoint.Point()
	s.start = headerSize
	if err := s.update(func(r *recordStorage) { r.Device, r.Size, r.Start = &id, s.size, s.start }); err != nil {
		return err
	}
	return s.noteDevice(c.Known)
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

// wipe gives the storage back with nothing left to read in it. A file is emptied and
// loses its name. A device is zeroed as far as it was used. If a step fails, the others
// are done all the same.
func (s *storage) wipe(used int64) error {
	err := s.update(func(r *recordStorage) { r.Stage = storageLeaving })
	fd := s.file.Fd()
	if s.fixed {
		err = errors.Join(err, zeroDevice(fd, s.state.readable(max(used, s.start))))
	} else {
		err = errors.Join(err, unix.Ftruncate(fd, 0))
	}
	deathpoint.Point()
	if s.name != nil {
		if s.state.keep != nil { // durably, before the note goes
			err = errors.Join(err, unix.Fsync(fd))
		}
		err = errors.Join(err, s.name.remove(fd))
		if s.state.keep != nil {
			syncDir(s.name.Dir)
		}
		s.name.Close()
		deathpoint.Point()
	}
	return s.leave(errors.Join(err, s.closeFile()))
}

// headSize is how much of a device is zeroed in any case, so that nobody takes what is
// there by chance for a filesystem.
const headSize = 1 << 20

// readable is how much has to be zeroed of a device of which used bytes were used:
// what is encrypted cannot be read any more when the key is gone.
func (st *state) readable(used int64) int64 {
	if st.recorded().Encrypted {
		return min(used, headSize)
	}
	return used
}

// zeroDevice makes the first n bytes of a device read as zeroes, durably. Its header goes
// last. So after a loss of power in between the device is still known, and zeroed again.
func zeroDevice(fd int, n int64) error {
	if n > headerSize {
		if err := errors.Join(zeroRange(fd, headerSize, n-headerSize), unix.Fsync(fd)); err != nil {
			return err
		}
	}
	return errors.Join(zeroRange(fd, 0, min(n, headerSize)), unix.Fsync(fd))
}

func zeroRange(fd int, off, n int64) error {
	if n == 0 {
		return nil
	}
	err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil {
		err = unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
	}
	return err
}

// leave is the end of a storage, whose file is gone: err is what went wrong so far.
func (s *storage) leave(err error) error {
	if s.lender != nil {
		err = errors.Join(err, allocate(s.lender.fd, s.lender.space), unix.Close(s.lender.fd))
		deathpoint.Point()
	}
	err = errors.Join(err, s.state.pins.release(s.n))
	deathpoint.Point()
	err = errors.Join(err, s.update(func(r *recordStorage) { *r = recordStorage{Stage: storageGone} }))
	if err != nil {
		return fmt.Errorf("give back storage %s: %w", s.path, err)
	}
	return nil
}
