package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// RemoveDevice implements control.API.
func (d *Daemon) RemoveDevice(ctx context.Context, r control.RemoveRequest) error {
	end, err := d.begin(ctx, "remove %s", r.Device)
	if err != nil {
		return err
	}
	defer end()
	v, err := d.find(r.Device)
	if err != nil {
		// By the name it had, or by a path.
		for _, path := range []string{filepath.Join(linkDir, r.Device), r.Device} {
			if id, ok := d.orphan(ctx, path); ok {
				return d.removeOrphan(r, id)
			}
		}
		return fail(err, "remove %s", r.Device)
	}
	if r.Force {
		err = d.removeForced(v)
	} else {
		err = d.removeIdle(ctx, v)
	}
	if err != nil {
		return fail(err, "remove %s", r.Device)
	}
	d.o.Log.Info("removed", "name", v.Name, "disk", v.Original, "forced", r.Force)
	return nil
}

// settleLimit is how long a device that is in use may be so by a passer-by: udev
// looks at new and changed devices.
const settleLimit = 2 * time.Second

// orphan is the number of the ublk device at path, if a dead daemon of ours has
// left it behind.
func (d *Daemon) orphan(ctx context.Context, path string) (id int, ok bool) {
	x, err := d.host.Lookup(path)
	if err != nil {
		return 0, false
	}
	if n, err := fmt.Sscanf(x.Name, "ublkb%d", &id); n != 1 || err != nil {
		return 0, false
	}
	i, err := d.ctl.Info(ctx, id)
	if err != nil {
		return 0, false
	}
	_, ours := ublk.IsOurs(i.Tag)
	return id, ours && !i.Served()
}

func (d *Daemon) removeOrphan(r control.RemoveRequest, id int) error {
	if !r.Force {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "remove " + r.Device + ": left by a daemon that died, its I/O waits",
			Fix: "let the I/O fail and remove it: ublk-blksnap remove --force " + r.Device}
	}
	ctx, cancel := d.bounded(context.Background())
	defer cancel()
	if err := d.ctl.DeleteDevice(ctx, id); err != nil {
		return fail(err, "remove %s", r.Device)
	}
	d.mu.Lock()
	d.lost = waitEnded(d.lost, fmt.Sprintf("/dev/ublkb%d", id))
	d.mu.Unlock()
	d.clearLinks(ctx)
	d.o.Log.Info("device of a dead daemon removed", "device", r.Device)
	return nil
}

// idle says who uses the device, if anybody does.
func (d *Daemon) idle(v *device) error {
	if ids := d.holding(v); len(ids) > 0 {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "held by snapshot " + ids[0],
			Fix: "destroy it first: ublk-blksnap snapshot destroy " + ids[0]}
	}
	if err := d.free(v); err != nil {
		return err
	}
	if who := d.openedBy(v.dev.Num); who != "" {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "opened by " + who, Fix: "end that process first"}
	}
	return nil
}

// free refuses a filter device that is mounted or has a device on it. One whose
// disk is gone is free.
func (d *Daemon) free(v *device) error {
	x, err := d.host.ByNumber(v.dev.Num)
	if errors.Is(err, disk.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	x.Path = v.Path
	return d.host.CheckFree(x)
}

// removeIdle removes a device that nobody uses; needs change.
func (d *Daemon) removeIdle(ctx context.Context, v *device) error {
	if ids := d.holding(v); len(ids) > 0 {
		return d.idle(v)
	}
	d.step("remove %s: sync", v.Name)
	until := time.Now().Add(settleLimit)
	for {
		// Before Linux 7.0 the driver does not know of users that do not claim the
		// device, such as a loop device over it.
		if err := d.free(v); err != nil {
			return err
		}
		d.lookAtPartitions(v)
		// Once begun it is not given up half-way.
		c, cancel := d.bounded(context.WithoutCancel(ctx))
		err := v.dev.TryStop(c)
		cancel()
		if err == nil {
			break
		}
		if !errors.Is(err, ublk.ErrBusy) {
			// Given up half-way, it serves nobody any more.
			v.leaving = v.leaving || v.dev.Ending()
			return d.late(v, err)
		}
		// It may be udev, soon done with it.
		if time.Now().After(until) || ctx.Err() != nil {
			return d.inUse(v)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return d.takeDown(v)
}

// sync changes nothing, and says whether the device could be removed now.
func (d *Daemon) sync(ctx context.Context, v *device) error {
	d.step("sync %s", v.Name)
	ctx, cancel := d.bounded(ctx)
	defer cancel()
	err := v.dev.Sync(ctx)
	if errors.Is(err, ublk.ErrBusy) {
		return d.inUse(v)
	}
	if err != nil {
		return d.late(v, err)
	}
	return nil
}

// late explains a removal that took too long, or for which the disk does no work
// any more.
func (d *Daemon) late(v *device, err error) error {
	if errors.Is(err, unix.EIO) {
		return &control.Error{Code: control.Internal, Errno: unix.EIO, Message: fmt.Sprintf("what is written cannot reach %s: %v", v.Original, err),
			Fix: "give that up: ublk-blksnap remove --force " + v.Name}
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	e := &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: fmt.Sprintf("%s does not answer: %v", v.Original, err),
		Fix: "nothing has changed; remove it when the disk answers"}
	if v.leaving {
		e.Fix = "I/O under way has to end first; remove it again when the disk answers: ublk-blksnap remove --force " + v.Name
	}
	return e
}

// inUse tells who uses the device, as far as can be found out.
func (d *Daemon) inUse(v *device) error {
	if who := d.idle(v); who != nil {
		return who
	}
	return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "in use", Fix: "find the user first: fuser -v " + v.Path}
}

// removeForced removes a device under its users; needs change.
func (d *Daemon) removeForced(v *device) error {
	for _, id := range d.holding(v) {
		if err := d.destroyBroken(id, v); err != nil {
			return snapshotError(err, "destroy snapshot %s", id)
		}
	}
	d.lookAtPartitions(v)
	return d.takeDown(v)
}

// takeDown frees what a device is made of.
func (d *Daemon) takeDown(v *device) error {
	d.step("remove %s", v.Name)
	v.leaving = true
	if err := d.removeUblk(v.dev, v.Link); err != nil {
		return d.late(v, err)
	}
	reread := v.repartitioned
	d.closeOriginal(v, func() {
		// Who reads the disk from now on shall not see what its page cache had kept
		// from before.
		_ = unix.IoctlSetInt(v.orig.Fd(), unix.BLKFLSBUF, 0)
		if reread {
			_ = unix.IoctlSetInt(v.orig.Fd(), unix.BLKRRPART, 0)
		}
	})
	v.use.Lock()
	v.gone = true
	v.closeCBT()
	v.use.Unlock()
	d.forgetNote(v.disk.Name)
	rescan(v.disk.Name)
	d.mu.Lock()
	delete(d.devices, v.Name)
	d.mu.Unlock()
	return nil
}

// closeOriginal closes the original, after a last act on it. Both may have to wait
// for it, the closing to write what its page cache holds.
func (d *Daemon) closeOriginal(v *device, last func()) {
	ctx, cancel := d.bounded(context.Background())
	defer cancel()
	_, err := bounded.Call(ctx, func() error {
		last()
		return v.orig.Close()
	}, func(error) {})
	if err != nil {
		d.o.Log.Warn("the disk does not answer: it is closed when it does", "disk", v.disk.DisplayPath())
	}
}

// lookAtPartitions notes whether the kernel has to read the partitions of the
// original again when the filter device is gone; needs change.
func (d *Daemon) lookAtPartitions(v *device) {
	if x, err := d.host.ByNumber(v.dev.Num); err == nil && v.disk.Parent == "" {
		v.repartitioned = !d.host.SamePartitions(x, v.disk)
	}
}
