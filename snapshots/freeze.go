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

// Freezer freezes the filesystem that dir lies on, and returns what thaws it. If ctx ends
// before that is done, the filesystem is thawed as soon as it is frozen.
type Freezer func(ctx context.Context, dir *os.File) (thaw func(context.Context) error, err error)

// frozenMounts are the filesystems that a take holds frozen.
type frozenMounts struct {
	mounts []frozenMount
	since  time.Time // of the first
	limit  time.Duration
}

type frozenMount struct {
	name string
	thaw func(context.Context) error
}

// freeze freezes the filesystems that the directories in mounts lie on, all or
// none, within limit.
func freeze(freezer Freezer, mounts []*os.File, limit time.Duration) (*frozenMounts, error) {
	f := &frozenMounts{since: time.Now(), limit: limit}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, m := range mounts {
		thaw, err := freezer(ctx, m)
		if ctx.Err() != nil && err != nil {
			err = ErrFreezeTimeout
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("freeze %s: %w", m.Name(), err), f.thaw())
		}
		f.mounts = append(f.mounts, frozenMount{m.Name(), thaw})
	}
	return f, nil
}

// Freeze is the Freezer for who has no other. If this process is killed while a
// filesystem on a filter of its own is about to be frozen or thawed, it does not end: see
// disk.Freeze.
func Freeze(ctx context.Context, dir *os.File) (thaw func(context.Context) error, err error) {
	own, err := dup(dir) // dir may be closed while the request is under way
	if err != nil {
		return nil, err
	}
	err, late := bounded.Call(ctx, func() error { return ioctlMount(own, uapi.FIFREEZE) }, func(err error) {
		if err == nil {
			_ = ioctlMount(own, uapi.FITHAW) // nobody is left to tell
		}
		own.Close()
	})
	if late != nil {
		return nil, late
	}
	if err != nil {
		own.Close()
		return nil, err
	}
	return func(ctx context.Context) error {
		defer own.Close()
		return Thaw(ctx, own)
	}, nil
}

// thaw lets all of them go on. Its error says for which of them that failed. The last
// one that was frozen goes on first, because to thaw a filesystem in a file writes to
// the filesystem that the file is on.
func (f *frozenMounts) thaw() error {
	var errs []error
	for _, m := range slices.Backward(f.mounts) {
		ctx, cancel := context.WithTimeout(context.Background(), f.limit)
		err := m.thaw(ctx)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			errs = append(errs, fmt.Errorf("thaw %s: %w: it goes on when its disk answers", m.name, ErrNoAnswer))
		case errors.Is(err, unix.EINVAL):
			errs = append(errs, fmt.Errorf("thaw %s: somebody else thawed it first: the images may show it as it was in use", m.name))
		default:
			errs = append(errs, fmt.Errorf("thaw %s: %w: thaw it with fsfreeze -u", m.name, err))
		}
		cancel()
	}
	f.mounts = nil
	return errors.Join(errs...)
}

// Thaw lets the filesystem that f lies on go on. It fails with EINVAL if the filesystem
// is not frozen. To thaw it may have to write to the disk. If that does not answer until
// ctx ends, the filesystem goes on when it does.
func Thaw(ctx context.Context, f *os.File) error {
	own, err := dup(f) // f may be closed while the request is under way
	if err != nil {
		return err
	}
	err, late := bounded.Call(ctx, func() error {
		defer own.Close()
		return ioctlMount(own, uapi.FITHAW)
	}, func(error) {})
	return errors.Join(err, late)
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
