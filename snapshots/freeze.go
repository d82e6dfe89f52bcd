package snapshots

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// ErrFreezeTimeout: a filesystem took longer than allowed to stop.
var ErrFreezeTimeout = errors.New("the filesystem did not freeze in time: try again, or take without freezing")

// frozenMounts are the filesystems that a take holds frozen.
type frozenMounts struct {
	mounts []*os.File
	since  time.Time // of the first
	limit  time.Duration
}

// freeze freezes the filesystems that the directories in mounts lie on, all or
// none, within limit.
func freeze(mounts []*os.File, limit time.Duration) (*frozenMounts, error) {
	f := &frozenMounts{since: time.Now(), limit: limit}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, m := range mounts {
		if err := freezeMount(ctx, m); err != nil {
			return nil, errors.Join(fmt.Errorf("freeze %s: %w", m.Name(), err), f.thaw())
		}
		f.mounts = append(f.mounts, m)
	}
	return f, nil
}

// freezeMount freezes the filesystem that m lies on. A request that takes too long
// cannot be taken back: if it succeeds after all, it is undone at once.
func freezeMount(ctx context.Context, m *os.File) error {
	own, err := dup(m) // m may be closed while the request is under way
	if err != nil {
		return err
	}
	err, late := bounded.Call(ctx, func() error { return ioctlMount(own, uapi.FIFREEZE) }, func(err error) {
		if err == nil {
			_ = ioctlMount(own, uapi.FITHAW) // nobody is left to tell
		}
		own.Close()
	})
	if late != nil {
		return ErrFreezeTimeout
	}
	own.Close()
	return err
}

// thaw lets all of them go on. Its error says for which of them that failed. The last
// one that was frozen goes on first, because to thaw a filesystem in a file writes to
// the filesystem that the file is on.
func (f *frozenMounts) thaw() error {
	var errs []error
	for _, m := range slices.Backward(f.mounts) {
		switch err := Thaw(m, f.limit); {
		case err == nil:
		case errors.Is(err, ErrNoAnswer):
			errs = append(errs, fmt.Errorf("%w: it goes on when its disk answers", err))
		case errors.Is(err, unix.EINVAL):
			errs = append(errs, fmt.Errorf("thaw %s: somebody else thawed it first: the images may show it as it was in use", m.Name()))
		default:
			errs = append(errs, fmt.Errorf("%w: thaw it with fsfreeze -u", err))
		}
	}
	f.mounts = nil
	return errors.Join(errs...)
}

// Thaw lets the filesystem that f lies on go on. It fails with EINVAL if the filesystem
// is not frozen. To thaw it may have to write to the disk. If the disk does not answer
// within limit, Thaw fails with ErrNoAnswer, and the filesystem goes on when the disk
// answers.
func Thaw(f *os.File, limit time.Duration) error {
	own, err := dup(f) // f may be closed while the request is under way
	if err != nil {
		own = f
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	thawed, err := bounded.Call(ctx, func() error {
		if own != f {
			defer own.Close()
		}
		return ioctlMount(own, uapi.FITHAW)
	}, func(error) {})
	if err != nil {
		thawed = ErrNoAnswer
	}
	if thawed != nil {
		return fmt.Errorf("thaw %s: %w", f.Name(), thawed)
	}
	return nil
}

func ioctlMount(f *os.File, req uint) error {
	return unix.IoctlSetInt(int(f.Fd()), req, 0)
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
