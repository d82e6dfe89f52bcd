package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// DestroySnapshot implements control.API.
func (d *Daemon) DestroySnapshot(ctx context.Context, id string) error {
	s, err := d.beginDestroy(ctx, id)
	if err != nil {
		return err
	}
	// Nobody else has to wait for its storage.
	if err := d.awaitGone(ctx, s); err != nil {
		return snapshotError(err, "destroy snapshot %s", s.id)
	}
	return nil
}

func (d *Daemon) beginDestroy(ctx context.Context, id string) (*snapshot, error) {
	end, err := d.begin(ctx, "destroy snapshot %s", id)
	if err != nil {
		return nil, err
	}
	defer end()
	s, err := d.findSnapshot(id)
	if err != nil {
		return nil, err
	}
	if err := d.end(s); err != nil {
		return nil, snapshotError(err, "destroy snapshot %s", s.id)
	}
	return s, nil
}

// destroyBroken destroys a snapshot because its device v is removed by force.
func (d *Daemon) destroyBroken(id string, v *device) error {
	s, err := d.findSnapshot(id)
	if err != nil {
		return err
	}
	if s.taken != nil && !s.leaving {
		d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCorrupted, Device: v.OriginalNumber, Errno: -int(unix.ENODEV)})
		d.o.Log.Warn("snapshot broken by the removal of its device", "snapshot", s.id, "name", v.Name)
	}
	return d.destroy(s)
}

// undo destroys a snapshot with which something failed; needs change. What does
// not answer has been waited for by then.
func (d *Daemon) undo(s *snapshot, err error) error {
	if errors.Is(err, snapshots.ErrStuck) {
		return errors.Join(err, d.end(s))
	}
	return errors.Join(err, d.destroy(s))
}

// destroy ends a snapshot and waits for it, with an end; needs change.
func (d *Daemon) destroy(s *snapshot) error {
	if err := d.end(s); err != nil {
		return err
	}
	return d.awaitGone(context.Background(), s)
}

// end removes the images of a snapshot and begins to give the rest back; needs
// change. With an error the snapshot is still there, less what of it could be
// removed.
func (d *Daemon) end(s *snapshot) error {
	d.mu.Lock()
	s.leaving = true
	d.mu.Unlock()
	if s.ending {
		return nil
	}
	// First of all, so that whatever hangs below, the original disks do not.
	broken := s.live.Err() == unix.EIO || s.live.Err() == unix.ETIMEDOUT
	s.live.Abort()
	for _, im := range s.images {
		if im.dev == nil {
			continue
		}
		d.step("destroy snapshot %s: remove the image of %s", s.id, im.of.Name)
		if err := d.removeUblk(im.dev, im.link); err != nil {
			return err
		}
		d.mu.Lock()
		im.dev = nil
		d.mu.Unlock()
	}
	d.step("destroy snapshot %s: give the storage back", s.id)
	d.mu.Lock()
	s.ending = true
	d.mu.Unlock()
	go d.giveBack(s, broken)
	return nil
}

// giveBack gives memory and storage of a snapshot without images back, beside
// all other work: a storage that does not answer is waited for without an end.
func (d *Daemon) giveBack(s *snapshot, broken bool) {
	s.live.Destroy()
	s.use.Lock()
	d.mu.Lock()
	s.gone = true
	d.mu.Unlock()
	s.use.Unlock()
	if err := s.live.GiveBack(); err != nil {
		// Nothing uses them any more: what is left is files.
		d.o.Log.Error("storage or state not given back", "snapshot", s.id, "error", asKnown(err.Error()))
		if !broken { // storage that does not work can not be emptied either
			s.failed = err
		}
	}
	d.mu.Lock()
	delete(d.snapshots, s.id)
	d.mu.Unlock()
	d.o.Log.Info("snapshot destroyed", "snapshot", s.id)
	close(s.over)
}

// awaitGone waits until nothing is left of a snapshot that ends, within the
// limit for storage; change is not needed.
func (d *Daemon) awaitGone(ctx context.Context, s *snapshot) error {
	select {
	case <-s.over:
		return s.failed
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d.o.Config.StorageTimeout):
	}
	s.use.RLock()
	hanging := s.hanging()
	s.use.RUnlock()
	d.o.Log.Warn("a disk of a destroyed snapshot does not answer: what is left is given back when it does", "snapshot", s.id, "disks", hanging)
	return fmt.Errorf("%s: %w: what is left of the snapshot goes by itself when it does", strings.Join(hanging, ", "), snapshots.ErrStuck)
}

// hanging are the disks that the log of a snapshot waits for, storage or
// originals, and storage that does not come back; needs use.
func (s *snapshot) hanging() []string {
	names := s.live.Returning()
	if !s.gone {
		names = append(names, s.live.UnderWay()...)
	}
	if len(names) == 0 {
		names = []string{"a disk"} // whose name is not known
	}
	for i, name := range names {
		names[i] = asKnown(name)
	}
	return names
}
