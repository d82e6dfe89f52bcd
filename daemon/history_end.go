package daemon

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// A daemon may die while it removes a device, when the driver does not have that any more
// and its change map is not kept yet. Or while it adds one, when the map that was kept is
// used up and the driver has no device yet. Nobody holds the disk then. So what the disk is
// like goes on record before the device ends (foreseeEnd), or before it is made (open), and
// the next daemon keeps the map if the disk is still like that (finishEnd): then nobody has
// written to it past the map.

// foreseeEnd syncs a device that is about to be removed, and puts on record what its disk is
// like. If somebody writes at this moment, or the disk cannot be looked at, nothing is on
// record. The error is that of the sync; needs opLock.
func (d *Daemon) foreseeEnd(ctx context.Context, dev *device) error {
	if d.opts.Config.StateDir == "" || dev.removing || d.checkFree(dev) != nil {
		return nil
	}
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	if err := dev.ublk.Sync(ctx); err != nil {
		if errors.Is(err, ublk.ErrBusy) {
			return nil // stopIdle waits for a passer-by
		}
		return err
	}
	r, err := d.readDeviceRecord(dev.Name)
	if err == nil {
		r.Ending, err = d.lookForEnd(ctx, dev)
	}
	if err == nil {
		err = d.writeDeviceRecord(r)
	}
	if err != nil {
		d.opts.Log.Debug("if this daemon dies during the removal, the change map is not kept", "name", dev.Name, "reason", err)
	}
	return nil
}

// lookForEnd is what the disk of a device is like that writes nothing at this moment.
func (d *Daemon) lookForEnd(ctx context.Context, dev *device) (*cbtstate.Disk, error) {
	fd, err := duplicate(dev)
	if err != nil {
		return nil, err
	}
	type look struct {
		disk cbtstate.Disk
		err  error
	}
	l, err := bounded.Call(ctx, func() (l look) {
		defer unix.Close(fd)
		var id disk.Identity
		if id, l.err = d.host.Identify(dev.disk); l.err == nil {
			l.disk, l.err = d.lookAt(ctx, fd, dev, id, fingerprint.Read)
		}
		return l
	}, func(look) {})
	if err == nil {
		err = l.err
	}
	if err != nil {
		return nil, err
	}
	return &l.disk, nil
}

// forgetEnd is for a device that is there now, that does not end after all, or not as it
// should; needs opLock.
func (d *Daemon) forgetEnd(name string) {
	if r, err := d.readDeviceRecord(name); err == nil && r.Ending != nil {
		r.Ending = nil
		d.changeDeviceRecord(r)
	}
}

// finishEnd keeps the change map of a device that a dead daemon was adding or removing, if the
// dead one has not and may have; needs opLock.
func (d *Daemon) finishEnd(ctx context.Context, r deviceRecord) {
	if r.Ending == nil || r.ClaimedByOther || d.opts.Config.StateDir == "" {
		return
	}
	err := d.tryFinishEnd(ctx, r)
	switch {
	case err == nil:
		d.opts.Log.Info("the change map of a device that a dead daemon was adding or removing is kept", "name", r.Name, "disk", r.Original.Path)
	case !errors.Is(err, fs.ErrNotExist): // the dead daemon had come further
		d.opts.Log.Warn("the change map of a device that a dead daemon was adding or removing is not kept: the next filter over this disk begins a new generation",
			"name", r.Name, "disk", r.Original.Path, "reason", err)
	}
}

func (d *Daemon) tryFinishEnd(ctx context.Context, r deviceRecord) (err error) {
	dev := &device{geo: r.Geometry}
	dev.Name = r.Name
	if dev.cbt, err = openLeftMap(d.cbtFile(r.Name), r.Geometry.Size); dev.cbt != nil {
		defer dev.cbt.Close()
	}
	if err != nil {
		return err
	}
	if dev.disk, err = r.Original.find(d.host); err != nil {
		return err
	}
	if dev.orig, err = d.claimOriginal(ctx, dev.disk); err != nil {
		return err
	}
	defer d.closeOriginal(dev, func() {})
	before := &cbtstate.Record{Disk: *r.Ending}
	return d.tryKeepHistory(dev, func(now cbtstate.Disk) error {
		if no := before.Judge(now); no != nil {
			return no
		}
		return nil
	})
}
