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
func (d *Daemon) DestroySnapshot(ctx context.Context, r control.DestroyRequest) (control.CutOff, error) {
	s, c, err := d.beginDestroy(ctx, r)
	if err != nil {
		return c, err
	}
	// Here opLock is free again, so that nobody else has to wait for the storage.
	if err := d.awaitDestroyed(ctx, s); err != nil {
		return c, snapshotError(err, "destroy snapshot %s", s.id)
	}
	return c, nil
}

func (d *Daemon) beginDestroy(ctx context.Context, r control.DestroyRequest) (s *snapshot, c control.CutOff, err error) {
	end, err := d.begin(ctx, "destroy snapshot %s", r.ID)
	if err != nil {
		return nil, c, err
	}
	defer end()
	if s, err = d.findSnapshot(r.ID); err != nil {
		return nil, c, err
	}
	switch {
	case r.Force:
		c = d.cutOff("destroy snapshot "+s.id, control.CutOff{Users: d.usersOf(usedImages(s)...)})
	case !s.destroying:
		if err := d.checkUnused(ctx, s); err != nil {
			return nil, c, fail(err, "destroy snapshot %s", s.id)
		}
	}
	if dev := d.passedBy(s); dev != nil {
		d.tellBroken(s, dev)
	}
	if err := d.startDestroy(s); err != nil {
		return nil, c, snapshotError(err, "destroy snapshot %s", s.id)
	}
	return s, c, nil
}

// destroyBroken destroys a snapshot because its device dev is removed by force.
func (d *Daemon) destroyBroken(id string, dev *device) error {
	s, err := d.findSnapshot(id)
	if err != nil {
		return err
	}
	d.tellBroken(s, dev)
	return d.destroy(s)
}

// tellBroken tells of a snapshot that ends because dev has no filter any more, or is passed by.
func (d *Daemon) tellBroken(s *snapshot, dev *device) {
	if s.taken != nil && !s.destroying {
		d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCorrupted, Device: dev.OriginalNumber, Errno: -int(unix.ENODEV), Text: dev.whyBypassed()})
		d.opts.Log.Warn("the snapshot is broken, because its device is removed", "snapshot", s.id, "name", dev.Name)
	}
}

// abandon destroys a snapshot because an operation on it failed; needs opLock. If a
// disk does not answer, the operation has waited for it already, so abandon does not
// wait again.
func (d *Daemon) abandon(s *snapshot, err error) error {
	if errors.Is(err, snapshots.ErrNoAnswer) {
		return errors.Join(err, d.startDestroy(s))
	}
	return errors.Join(err, d.destroy(s))
}

// destroy ends a snapshot and waits for that, within the limit for storage; needs
// opLock.
func (d *Daemon) destroy(s *snapshot) error {
	if err := d.startDestroy(s); err != nil {
		return err
	}
	return d.awaitDestroyed(context.Background(), s)
}

// startDestroy removes the images of a snapshot and begins to give the rest back;
// needs opLock. If it fails, the snapshot is still there, without the images that
// could be removed.
func (d *Daemon) startDestroy(s *snapshot) error {
	d.mu.Lock()
	s.destroying = true
	d.mu.Unlock()
	if s.releasing {
		return nil
	}
	// Abort comes first of all, so that the original disks do not wait, whatever hangs
	// below.
	broken := s.snap.Err() == unix.EIO || s.snap.Err() == unix.ETIMEDOUT
	if err := s.snap.Abort(); err != nil {
		d.opts.Log.Warn("it is not on record that a snapshot is being destroyed", "snapshot", s.id, "error", err)
	}
	for i, im := range s.images {
		if im.ublk == nil {
			continue
		}
		d.step("destroy snapshot %s: remove the image of %s", s.id, im.device.Name)
		if err := d.removeUblk(im.ublk, im.link); err != nil {
			return err
		}
		d.mu.Lock()
		im.ublk = nil
		d.mu.Unlock()
		if err := s.snap.SetImage(i, snapshots.Image{Number: snapshots.NoImage}); err != nil {
			d.opts.Log.Warn("it is not on record that an image is gone", "snapshot", s.id, "error", err)
		}
	}
	d.step("destroy snapshot %s: give the storage back", s.id)
	d.mu.Lock()
	s.releasing = true
	d.mu.Unlock()
	go d.release(s, s.snap.Destroy(), broken)
	return nil
}

// release gives back the memory and the storage of a snapshot whose images are gone.
// It runs beside all other work, because it waits without a limit for storage that
// does not answer.
func (d *Daemon) release(s *snapshot, destroyed func(), broken bool) {
	destroyed()
	s.use.Lock()
	d.mu.Lock()
	s.gone = true
	d.mu.Unlock()
	s.use.Unlock()
	d.lookAtTables() // a volume may wait for this
	if err := s.snap.GiveBack(); err != nil {
		// Nothing uses storage and state any more. What is left of them is only files.
		d.opts.Log.Error("storage or state of a destroyed snapshot could not be given back", "snapshot", s.id, "error", publicPaths(err.Error()))
		if !broken { // storage that does not work cannot be emptied either
			s.destroyErr = err
		}
	}
	d.mu.Lock()
	delete(d.snapshots, s.id)
	d.mu.Unlock()
	d.opts.Log.Info("snapshot destroyed", "snapshot", s.id)
	close(s.destroyed)
}

// awaitDestroyed waits until nothing is left of a snapshot that is being destroyed,
// within the limit for storage. It does not need opLock.
func (d *Daemon) awaitDestroyed(ctx context.Context, s *snapshot) error {
	select {
	case <-s.destroyed:
		return s.destroyErr
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d.opts.Config.StorageTimeout):
	}
	s.use.RLock()
	hanging := s.hanging()
	s.use.RUnlock()
	d.opts.Log.Warn("a disk of a destroyed snapshot does not answer: the rest is given back when it does", "snapshot", s.id, "disks", hanging)
	return fmt.Errorf("%s: %w: what is left of the snapshot goes by itself when the disk answers", strings.Join(hanging, ", "), snapshots.ErrNoAnswer)
}

// hanging are the disks that hold a snapshot up: those that its log waits for,
// storage or originals, and storage that is being given back and does not answer;
// needs use.
func (s *snapshot) hanging() []string {
	names := s.snap.Returning()
	if !s.gone {
		names = append(names, s.snap.UnderWay()...)
	}
	if len(names) == 0 {
		names = []string{"a disk"} // whose name is not known
	}
	for i, name := range names {
		names[i] = publicPaths(name)
	}
	return names
}
