package daemon

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// snapshot is a snapshot with its image devices.
type snapshot struct {
	id      string
	snap    *snapshots.Snapshot
	chunk   int64
	created time.Time
	// encrypted: what is stored is.
	encrypted bool
	// engineEvents carries events from the queue threads, which must not wait.
	// destroyed is closed when all of the snapshot is gone. destroyErr says then what
	// could not be given back.
	engineEvents chan diffarea.Event
	destroyed    chan struct{}
	destroyErr   error
	pace         pace

	// use is held by those who look into snap without holding Daemon.opLock, and
	// by release while it goes away. gone changes under Daemon.mu too.
	use  sync.RWMutex
	gone bool

	// Daemon.mu guards what follows.
	destroying bool // its end has begun; nothing can be asked of it any more
	releasing  bool // all of it but the images is on its way back
	images     []*image
	storage    []control.Storage
	taken      *time.Time
	frozen     time.Duration
	note       snapshotNote
	warnings   []string // of its take
	overdue    string   // who uses it although its time is over
}

// image is one device of a snapshot.
type image struct {
	device *device
	ublk   *ublk.Device // nil until taken
	link   string
	take   cbtmap.Info
}

// snapshotError gives the engine's errors their codes.
func snapshotError(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	e := fail(err, format, args...)
	set := func(c control.Code, n unix.Errno) { e.Code, e.Errno = c, n }
	switch {
	case errors.Is(err, snapimage.ErrNoDevices):
		set(control.NotFound, unix.ENODEV)
	case errors.Is(err, snapimage.ErrNoStorage):
		set(control.NoSpace, unix.ENOSPC)
	case errors.Is(err, snapimage.ErrTaken), errors.Is(err, snapimage.ErrAdded):
		set(control.Exists, unix.EALREADY)
	case errors.Is(err, snapimage.ErrCancelled), errors.Is(err, snapshots.ErrFreezeTimeout), errors.Is(err, snapshots.ErrNoAnswer):
		set(control.Timeout, unix.ETIMEDOUT)
	case errors.Is(err, snapshots.ErrGrown):
		set(control.Busy, unix.EBUSY)
	case errors.Is(err, snapshots.ErrStorageInUse):
		set(control.Busy, unix.EBUSY)
	case errors.Is(err, snapshots.ErrNoStorageThere):
		set(control.Invalid, unix.EINVAL)
	}
	return e
}

// sortedSnapshots are in the order in which they were created, whatever became of the clock
// on the wall since: the latest one may be destroyed by that name.
func (d *Daemon) sortedSnapshots() []*snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*snapshot, 0, len(d.snapshots))
	for _, s := range d.snapshots {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *snapshot) int {
		return cmp.Or(cmp.Compare(a.note.Began, b.note.Began), a.created.Compare(b.created))
	})
	return out
}

// holders are the UUIDs of the snapshots that hold the device.
func (d *Daemon) holders(dev *device) []string {
	ids := []string{}
	for _, s := range d.sortedSnapshots() {
		if d.holds(s, dev) {
			ids = append(ids, s.id)
		}
	}
	return ids
}

func (d *Daemon) holds(s *snapshot, dev *device) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	// A snapshot that only has its storage left to give back needs the disk no more.
	return !s.gone && slices.ContainsFunc(s.images, func(im *image) bool { return im.device == dev })
}

// beginOnSnapshot is begin for a change to the snapshot that is called so. A
// broken snapshot is refused.
func (d *Daemon) beginOnSnapshot(ctx context.Context, id, format string, args ...any) (s *snapshot, end func(), err error) {
	if end, err = d.begin(ctx, format, args...); err != nil {
		return nil, nil, err
	}
	if s, err = d.usable(id); err != nil {
		end()
		return nil, nil, err
	}
	return s, end, nil
}

// usable is findSnapshot, but refuses a snapshot that is broken or being destroyed;
// needs opLock.
func (d *Daemon) usable(id string) (*snapshot, error) {
	s, err := d.findSnapshot(id)
	if err == nil && s.destroying {
		return nil, &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "snapshot " + s.id + ": is being destroyed", Fix: "create another"}
	}
	if err == nil && s.snap.Err() != 0 {
		errno := s.snap.Err()
		return nil, &control.Error{Code: control.Corrupted, Errno: errno, Message: "snapshot " + s.id + ": is corrupted: " + errno.Error(), Fix: "destroy it, and take another"}
	}
	return s, err
}
