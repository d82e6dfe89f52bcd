package snapshots

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// ErrStorageLost: a storage of a dead daemon's snapshot is not there any more, or
// another is in its place.
var ErrStorageLost = errors.New("is not the storage that it was")

// retryClaim is how often a claim is tried while another holds the storage: what
// the dead daemon has under way holds it too.
const retryClaim = 10 * time.Millisecond

// reclaim claims storage n of a dead daemon, while ctx lasts: then nothing of what
// that one began is under way on it.
func (st *state) reclaim(ctx context.Context, n, align int) (*storage, error) {
	type claimed struct {
		s   *storage
		err error
	}
	r := st.recorded().Storage[n]
	until := ctx
	if end, ok := ctx.Deadline(); ok { // before it, so that it can be told from what does not answer
		var cancel context.CancelFunc
		until, cancel = context.WithDeadline(ctx, end.Add(-time.Until(end)/10))
		defer cancel()
	}
	c, late := bounded.Call(ctx, func() (c claimed) {
		s := &storage{state: st, n: n, path: r.Path, fixed: r.Fixed, start: r.Start, size: r.Size, reserve: r.Reserve}
		if c.err = s.reopen(until, &r, align); c.err == nil {
			_, c.err = s.look()
		}
		if c.err != nil {
			s.close()
			return c
		}
		c.s = s
		return c
	}, func(c claimed) {
		if c.s != nil {
			c.s.close()
		}
	})
	if late != nil {
		c.err = ErrNoAnswer
	}
	if c.err != nil {
		return nil, fmt.Errorf("storage %s: %w", r.Path, c.err)
	}
	return c.s, nil
}

func (s *storage) reopen(ctx context.Context, r *recordStorage, align int) error {
	place, err := s.state.pins.place(s.n)
	if errors.Is(err, errGone) {
		return ErrStorageLost
	}
	if err != nil {
		return err
	}
	defer place.Close()
	if r.Fixed {
		if err := s.reopenDevice(ctx, r, place); err != nil {
			return err
		}
		if s.align, err = unix.IoctlGetInt(s.file.Fd(), unix.BLKSSZGET); err != nil {
			return err
		}
		return s.fitAlign(align)
	}
	fd, err := reopen(place, unix.O_RDWR)
	if err != nil {
		return err
	}
	s.file = blockdev.NewOSFile(fd, r.Path)
	if now, err := identify(fd); err != nil || !now.same(*r.File) {
		return errors.Join(ErrStorageLost, err)
	}
	if err := retry(ctx, func() error { return lock(fd) }); err != nil {
		return err
	}
	if s.setDirect(true) == nil {
		s.align = directAlign(fd)
	}
	if r.Base != "" {
		s.name = &name{&disk.Place{Dir: r.openDir(), Base: r.Base}}
	}
	if r.Lender != nil {
		s.lender = r.openLender()
	}
	return s.fitAlign(align)
}

func (s *storage) reopenDevice(ctx context.Context, r *recordStorage, place *os.File) error {
	err := retry(ctx, func() (err error) {
		s.file, err = blockdev.OpenExclusive(reopening(place), r.Path, unix.O_RDWR|unix.O_DIRECT)
		return err
	})
	if err != nil {
		return err
	}
	now, err := identifyDevice(s.file)
	if err != nil {
		return err
	}
	if was := *r.Device; now.Number != was.Number || now.Sequence != was.Sequence || now.Start != was.Start || now.Size < r.Size {
		return ErrStorageLost
	}
	return nil
}

// retry tries to claim something until nobody else has it, while ctx lasts.
func retry(ctx context.Context, claim func() error) error {
	for {
		err := claim()
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, ErrStorageInUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrStorageInUse, err)
		case <-time.After(retryClaim):
		}
	}
}

// close lets go of a storage, which stays for the next one to claim it.
func (s *storage) close() {
	if s.file != nil {
		_ = s.closeFile()
	}
	if s.name != nil {
		s.name.Close()
	}
	if s.lender != nil {
		unix.Close(s.lender.fd)
	}
}

// openDir opens the directory in which a file was made; nil if it is not found.
func (r *recordStorage) openDir() *os.File {
	if r.Dir == nil {
		return nil
	}
	fd, err := r.Dir.open(r.RealPath, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil && !errors.Is(err, errGone) { // by its path, then, which may be that of a file in it
		fd, err = r.Dir.open(filepath.Dir(r.RealPath), unix.O_PATH|unix.O_DIRECTORY)
	}
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), filepath.Dir(r.RealPath))
}

// openLender opens the file that lent its space, and claims it as far as that can
// be; nil if it is gone.
func (r *recordStorage) openLender() *lender {
	fd, err := r.Lender.open(r.RealPath, unix.O_RDWR)
	if err != nil {
		return nil
	}
	_ = lock(fd)
	return &lender{fd: fd, space: r.Space}
}

// clear ends storage n of a dead daemon, which died at any step of its making, its
// use or its end. A device that somebody else claims within timeout is left to him.
func (st *state) clear(n int, timeout time.Duration) error {
	r := st.recorded().Storage[n]
	if r.Stage == storageGone {
		return nil
	}
	s := &storage{state: st, n: n, path: r.Path}
	err := s.update(func(r *recordStorage) { r.Stage = storageLeaving })
	place, open := st.pins.place(n)
	switch {
	case errors.Is(open, errGone): // nothing was stored, or it is gone
		err = errors.Join(err, r.clearHidden())
	case open != nil:
		err = errors.Join(err, fmt.Errorf("copied data may remain: %w", open))
	default:
		defer place.Close()
		if st := statOf(place); st.Mode&unix.S_IFMT == unix.S_IFBLK {
			err = errors.Join(err, s.clearDevice(&r, place, timeout))
		} else {
			err = errors.Join(err, r.clearFile(place))
		}
	}
	deathpoint.Point()
	if r.Lender != nil {
		s.lender = r.openLender()
	}
	return s.leave(err)
}

func statOf(f *os.File) (st unix.Stat_t) {
	_ = unix.Fstat(int(f.Fd()), &st)
	return st
}

// clearFile empties the file and takes its names.
func (r *recordStorage) clearFile(place *os.File) error {
	fd, err := reopen(place, unix.O_WRONLY)
	if err != nil {
		return fmt.Errorf("copied data may remain: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 0); err != nil {
		return fmt.Errorf("copied data may remain: %w", err)
	}
	deathpoint.Point()
	if r.Base != "" {
		_ = unix.Fsync(fd)
	}
	return r.removeNames(fd)
}

// removeNames removes the names of the file that is open, if they are still its own.
func (r *recordStorage) removeNames(fd int) (err error) {
	dir := r.openDir()
	if dir != nil {
		defer dir.Close()
	}
	for _, base := range []string{r.Hidden, r.Base} {
		if base != "" {
			err = (&name{&disk.Place{Dir: dir, Base: base}}).remove(fd)
			deathpoint.Point()
		}
	}
	syncDir(dir)
	return err
}

// clearHidden removes a file that had been made, and nothing else yet.
func (r *recordStorage) clearHidden() error {
	dir := r.openDir()
	if r.Hidden == "" || dir == nil {
		return nil
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), r.Hidden, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("a file remains, and it is empty: %w", err)
	}
	defer unix.Close(fd)
	err = (&name{&disk.Place{Dir: dir, Base: r.Hidden}}).remove(fd)
	syncDir(dir) // a note names it no more
	return err
}

// clearDevice zeroes what was used of the device.
func (s *storage) clearDevice(r *recordStorage, place *os.File, timeout time.Duration) error {
	used, err := s.usedBefore(r)
	if err != nil || used == 0 {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// What the dead daemon has under way may hang, and is waited for.
	timer := time.NewTicker(timeout)
	defer timer.Stop()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
				if !inFlight(r.Device.Number) {
					cancel()
				}
			}
		}
	}()
	err = s.reopenDevice(ctx, r, place)
	if s.file != nil {
		defer s.file.Close()
	}
	if err == nil {
		if err = zeroDevice(s.file.Fd(), s.state.readable(used)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("copied data may remain among its first %d bytes: %w", used, err)
}

// usedBefore is how much of the device was used.
func (s *storage) usedBefore(r *recordStorage) (int64, error) {
	log, err := readOwn(filepath.Join(s.state.dir, logName), diffarea.LogStateSize)
	if errors.Is(err, fs.ErrNotExist) || r.Device == nil {
		return r.Start, nil // it was not there before the take
	}
	if err == nil {
		var used int64
		if used, err = diffarea.Used(log, s.n); err == nil {
			return min(max(used, r.Start), r.Size), nil
		}
	}
	return r.Size, nil //nolint:nilerr // all of it may be
}

// inFlight says whether something is under way on a block device.
func inFlight(number uint64) bool {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/inflight", unix.Major(number), unix.Minor(number)))
	if err != nil {
		return false
	}
	for _, n := range strings.Fields(string(b)) {
		if n != "0" {
			return true
		}
	}
	return false
}
