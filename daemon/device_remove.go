package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// RemoveDevice implements control.API.
func (d *Daemon) RemoveDevice(ctx context.Context, r control.RemoveRequest) (c control.CutOff, err error) {
	end, err := d.begin(ctx, "remove %s", r.Device)
	if err != nil {
		return c, err
	}
	defer end()
	if w := d.findWaiting(r.Device); w != nil {
		if !r.Force {
			return c, w.waitingError("remove " + r.Device)
		}
		c = d.cutOff("remove "+r.Device, control.CutOff{Users: d.usersOfLeft(w.record.ID)})
		ctx, cancel := d.withDiskTimeout(context.Background())
		defer cancel()
		if err := d.removeWaiting(ctx, w); err != nil {
			return c, fail(err, "remove %s", r.Device)
		}
		d.noteRemoved(w.record.Name, w.record.shown().Sequence)
		d.opts.Log.Info("a device that waited is removed", "name", w.record.Name)
		return c, nil
	}
	dev, err := d.findDevice(r.Device)
	if err != nil {
		// A device that a dead daemon left: r names it by the name it had, or by a
		// path.
		for _, path := range []string{filepath.Join(linkDir, r.Device), r.Device} {
			if id, ok := d.orphan(ctx, path); ok {
				if r.Force {
					c = d.cutOff("remove "+r.Device, control.CutOff{Users: d.usersOfLeft(id)})
				}
				return c, d.removeOrphan(r, id)
			}
		}
		return c, fail(err, "remove %s", r.Device)
	}
	if r.Force {
		c = d.cutOff("remove "+r.Device, d.usersAndHolders(dev))
		err = d.removeForced(dev)
	} else {
		err = d.removeIdle(ctx, dev)
	}
	if err != nil {
		return c, fail(err, "remove %s", r.Device)
	}
	d.noteRemoved(dev.Name, dev.shown().Sequence)
	d.opts.Log.Info("removed", "name", dev.Name, "disk", dev.Original, "forced", r.Force)
	return c, nil
}

// settleLimit is how long a removal or stop waits for a passer-by that has the device
// open, as udev has when it looks at new and changed devices.
const settleLimit = 2 * time.Second

// orphan is the number of the ublk device at path, if a dead daemon of ours has
// left it behind.
func (d *Daemon) orphan(ctx context.Context, path string) (id int, ok bool) {
	bdev, err := d.host.Lookup(path)
	if err != nil {
		return 0, false
	}
	if id, ok = diskNumber(bdev.Name); !ok {
		return 0, false
	}
	info, err := d.ctl.Info(ctx, id)
	if err != nil {
		return 0, false
	}
	_, ours := ublk.IsOurs(info.Tag)
	return id, ours && !info.Served()
}

func (d *Daemon) removeOrphan(r control.RemoveRequest, id int) error {
	if !r.Force {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "remove " + r.Device + ": it was left by a daemon that died, and its I/O waits",
			Fix: "let the I/O fail and remove it: ublk-blksnap remove --force " + r.Device}
	}
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	// Whoever dies from here on has taken back what is kept of the disk.
	i := slices.IndexFunc(d.damaged, func(l control.LostDevice) bool { return l.Path == "/dev/"+diskName(id) })
	if i >= 0 {
		d.stopDamaged(d.damaged[i])
	}
	over, filter := d.attachmentOver(id)
	if err := d.ctl.DeleteDevice(ctx, id); err != nil {
		return fail(err, "remove %s", r.Device)
	}
	d.giveBackForced(ctx, over, filter)
	if i >= 0 {
		d.forgetDamaged(d.damaged[i])
	}
	d.forgetGone(ctx)
	d.clearLinks(ctx)
	d.opts.Log.Info("device of a dead daemon removed", "device", r.Device)
	return nil
}

// checkIdle says who uses the device, if anybody does.
func (d *Daemon) checkIdle(dev *device) error {
	if ids := d.holders(dev); len(ids) > 0 {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "held by snapshot " + ids[0],
			Fix: "destroy it first: ublk-blksnap snapshot destroy " + ids[0]}
	}
	if dev.attached != nil {
		return nil // whoever uses it goes on without the filter
	}
	return d.checkUsers(dev)
}

// checkUsers says who uses the filter device, if anybody does but snapshots.
func (d *Daemon) checkUsers(dev *device) error {
	if err := d.checkFree(dev); err != nil {
		return err
	}
	if who := d.openedBy(dev.ublk.Num); who != "" {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "opened by " + who, Fix: "end that process first"}
	}
	return nil
}

// awaitClosed waits until nobody has the devices open, for settleLimit at most.
func (d *Daemon) awaitClosed(ctx context.Context, devices []disk.Num) {
	d.step("wait until nobody has a device open")
	until := time.Now().Add(settleLimit)
	open := func(n disk.Num) bool { return d.openedBy(n) != "" }
	for slices.ContainsFunc(devices, open) && time.Now().Before(until) && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond)
	}
}

// checkFree refuses a filter device that is mounted or has a device on it. A device
// whose ublk disk is gone counts as free.
func (d *Daemon) checkFree(dev *device) error {
	bdev, err := d.host.ByNumber(dev.ublk.Num)
	if errors.Is(err, disk.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	bdev.Path = dev.Path
	return d.host.CheckFree(bdev)
}

// removeIdle removes a device that nobody uses; needs opLock.
func (d *Daemon) removeIdle(ctx context.Context, dev *device) error {
	if ids := d.holders(dev); len(ids) > 0 {
		return d.checkIdle(dev)
	}
	if dev.attached != nil {
		if err := d.detachTables(ctx, dev); err != nil {
			return err
		}
		return d.takeDown(dev, false)
	}
	d.step("remove %s: sync", dev.Name)
	if err := d.foreseeEnd(context.WithoutCancel(ctx), dev); err != nil {
		return d.removalError(dev, err)
	}
	deathpoint.Point()
	if err := d.stopIdle(ctx, dev); err != nil {
		d.forgetEnd(dev.Name)
		return err
	}
	deathpoint.Point()
	return d.takeDown(dev, true)
}

// stopIdle stops a device that nobody uses; needs opLock.
func (d *Daemon) stopIdle(ctx context.Context, dev *device) error {
	until := time.Now().Add(settleLimit)
	for {
		// Before Linux 7.0 the driver does not know of users that do not claim the
		// device, such as a loop device over it.
		if err := d.checkFree(dev); err != nil {
			return err
		}
		d.comparePartitions(dev)
		// The stop is not given up half-way if the caller goes away.
		c, cancel := d.withDiskTimeout(context.WithoutCancel(ctx))
		err := dev.ublk.TryStop(c)
		cancel()
		if err == nil {
			return nil
		}
		if !errors.Is(err, ublk.ErrBusy) {
			// If the stop was given up half-way, the device serves nobody any more.
			dev.removing = dev.removing || dev.ublk.Ending()
			return d.removalError(dev, err)
		}
		// The user may be udev, which is done soon.
		if time.Now().After(until) || ctx.Err() != nil {
			return d.busyError(dev)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// sync writes the page cache of the filter device back. Its error says why the
// device could not be removed now. It changes nothing else.
func (d *Daemon) sync(ctx context.Context, dev *device) error {
	if dev.attached != nil {
		return nil // its users sync, and nobody else
	}
	d.step("sync %s", dev.Name)
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	err := dev.ublk.Sync(ctx)
	if errors.Is(err, ublk.ErrBusy) {
		return d.busyError(dev)
	}
	if err != nil {
		return d.removalError(dev, err)
	}
	return nil
}

// removalError explains a removal that took too long, or that failed because the
// disk takes no writes any more.
func (d *Daemon) removalError(dev *device, err error) error {
	if errors.Is(err, unix.EIO) || errors.Is(err, ublk.ErrUnsynced) {
		return &control.Error{Code: control.Internal, Errno: unix.EIO, Message: fmt.Sprintf("data that was written cannot be brought to %s: %v", dev.Original, err),
			Fix: "remove the filter and lose that data: ublk-blksnap remove --force " + dev.Name}
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	e := &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: fmt.Sprintf("%s does not answer: %v", dev.Original, err),
		Fix: "nothing has changed; try again when the disk answers"}
	if dev.removing {
		e.Fix = "the I/O under way has to end first; when the disk answers, remove it again: ublk-blksnap remove --force " + dev.Name
	}
	return e
}

// busyError tells who uses the device, as far as can be found out.
func (d *Daemon) busyError(dev *device) error {
	if who := d.checkIdle(dev); who != nil {
		return who
	}
	return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "in use", Fix: "find the user first: fuser -v " + dev.Path}
}

// removeForced removes a device under its users; needs opLock.
func (d *Daemon) removeForced(dev *device) error {
	for _, id := range d.holders(dev) {
		if err := d.destroyBroken(id, dev); err != nil {
			return snapshotError(err, "destroy snapshot %s", id)
		}
	}
	if dev.attached != nil {
		err := d.detachTables(context.Background(), dev)
		if control.CodeOf(err) == control.Busy {
			return err // soon it is not
		}
		if err != nil {
			return d.takeDownUsed(dev)
		}
		return d.takeDown(dev, false)
	}
	d.comparePartitions(dev)
	d.forgetEnd(dev.Name)
	return d.takeDown(dev, false)
}

// takeDown frees what a device is made of. clean: nobody used it any more, and all
// that was written to it is in the disk's hands.
func (d *Daemon) takeDown(dev *device, clean bool) error {
	d.step("remove %s", dev.Name)
	dev.removing = true
	if err := d.removeUblk(dev.ublk, dev.Link); err != nil {
		return d.removalError(dev, err)
	}
	if clean {
		d.keepHistory(dev)
	} else {
		d.stopHistory(dev)
	}
	reread := dev.repartitioned
	d.closeOriginal(dev, func() {
		// The disk's page cache is from before the filter. Nobody shall read that from
		// now on.
		_ = unix.IoctlSetInt(dev.orig.Fd(), unix.BLKFLSBUF, 0)
		if reread {
			_ = unix.IoctlSetInt(dev.orig.Fd(), unix.BLKRRPART, 0)
		}
	})
	dev.use.Lock()
	dev.gone = true
	dev.closeCBT()
	dev.counters.remove()
	dev.use.Unlock()
	d.forgetNote(dev.disk.Name)
	if dev.attached == nil {
		rescan(dev.disk.Name)
	} else {
		d.dropPrivate(dev.attached)
	}
	d.removeDeviceRecord(dev.Name)
	d.dropDamaged(dev.Name)
	d.mu.Lock()
	delete(d.devices, dev.Name)
	d.mu.Unlock()
	return nil
}

// closeOriginal calls last and closes the original. Both may have to wait for the
// disk, because closing writes what its page cache holds.
func (d *Daemon) closeOriginal(dev *device, last func()) {
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	_, err := bounded.Call(ctx, func() error {
		last()
		return dev.orig.Close()
	}, func(error) {})
	if err != nil {
		d.opts.Log.Warn("a disk whose filter was removed does not answer: the daemon closes it when it does", "disk", dev.disk.DisplayPath())
	}
}
