package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// A filter whose record cannot be trusted is not taken over. Its device stays, with its I/O,
// until somebody mends the record or removes the device by force. Until then its disk gets no
// other filter. Which device and which disk that are, the notes for udev tell.

// locate finds the devices and the disks of the filters whose records cannot be trusted.
func (d *Daemon) locate(ctx context.Context) {
	if len(d.damaged) == 0 {
		return
	}
	left, _ := d.unaccounted(ctx)
	for i := range d.damaged {
		l := &d.damaged[i]
		if l.Path != "" { // of a record that can be trusted
			continue
		}
		kernelName := d.notedAs("filter", l.Name)
		if id, ok := diskNumber(kernelName); ok && slices.Contains(left, id) {
			l.Path, l.Waits = "/dev/"+kernelName, true
		}
		if bdev, err := d.host.Lookup(d.notedAs("original", l.Name)); err == nil {
			l.Original = bdev.DisplayPath()
		}
	}
}

// stopDamaged has nothing believed that is kept of the disk of a filter whose record cannot
// be trusted: nobody marks what is written to the disk past its device. If the record is
// mended, the filter begins a log of its own. Needs opLock.
func (d *Daemon) stopDamaged(l control.LostDevice) {
	if d.opts.Config.StateDir == "" {
		return
	}
	bdev, err := d.host.Lookup(l.Original)
	var identity disk.Identity
	if err == nil {
		identity, err = d.host.Identify(bdev)
	}
	if identity == nil {
		d.opts.Log.Error("the disk of a filter whose record cannot be trusted is not known: remove what is kept of it before it gets a filter in another boot",
			"name", l.Name, "directory", d.opts.Config.StateDir, "reason", err)
		return
	}
	d.stopIdentity(nil, d.here(identity))
}

// forgetGone forgets those whose device is gone, of which there is nothing to be mended;
// needs opLock.
func (d *Daemon) forgetGone(ctx context.Context) {
	if len(d.damaged) == 0 {
		return
	}
	if left, err := d.unaccounted(ctx); err != nil || len(d.unlocated(left)) > 0 {
		return // one of these may be its device
	}
	for _, l := range slices.Clone(d.damaged) {
		if l.Path == "" && d.isGone(ctx, d.notedAs("filter", l.Name)) {
			d.opts.Log.Warn("what a dead daemon began to add or to remove is removed", "name", l.Name, "disk", l.Original)
			d.forgetDamaged(l)
		}
	}
}

// isGone says whether the driver has no ublk device of that name.
func (d *Daemon) isGone(ctx context.Context, kernelName string) bool {
	id, ok := diskNumber(kernelName)
	if !ok {
		return true
	}
	_, err := d.ctl.Info(ctx, id)
	return errors.Is(err, unix.ENODEV)
}

// unaccounted are our filters that nobody serves, and of which this daemon has no record.
func (d *Daemon) unaccounted(ctx context.Context) (ids []int, err error) {
	all, err := d.ctl.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot look for devices of a dead daemon: %w", err)
	}
	for _, info := range all {
		kind, ours := ublk.IsOurs(info.Tag)
		has := slices.ContainsFunc(d.sortedWaiting(), func(s *survivor) bool { return s.record.ID == info.ID }) ||
			slices.ContainsFunc(d.sortedDevices(), func(dev *device) bool { return dev.ublk.ID == info.ID })
		served := info.Served() && info.PID != os.Getpid()
		if ours && kind == filterKind && !has && !served && info.State != ublk.Dead && !d.ofAnother(linkDir, info.ID) {
			ids = append(ids, info.ID)
		}
	}
	return ids, nil
}

// ofAnother says whether a device is known to be of another run directory's daemon: there
// is no note of it here, and its name, one of those in dir, is not that of a filter whose
// record cannot be trusted.
func (d *Daemon) ofAnother(dir string, id int) (known bool) {
	kernelName := diskName(id)
	if d.opts.Dir.has(filepath.Join(udevName, kernelName)) {
		return false
	}
	for _, e := range dirEntries(dir) {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err != nil || filepath.Base(to) != kernelName {
			continue
		}
		if slices.ContainsFunc(d.damaged, func(l control.LostDevice) bool { return l.Name == e.Name() }) {
			return false
		}
		known = true
	}
	return known
}

// unlocated are those of the unaccounted devices that are not known to be one filter's.
func (d *Daemon) unlocated(left []int) (ids []int) {
	for _, id := range left {
		if !slices.ContainsFunc(d.damaged, func(l control.LostDevice) bool { return l.Path == "/dev/"+diskName(id) }) {
			ids = append(ids, id)
		}
	}
	return ids
}

// checkDamaged refuses a disk that has, or may have, a filter whose record cannot be
// trusted; needs opLock.
func (d *Daemon) checkDamaged(ctx context.Context, bdev *disk.Disk) error {
	if len(d.damaged) == 0 {
		return nil
	}
	left, err := d.unaccounted(ctx)
	return d.refuseDamaged(left, err, bdev, d.host.Lookup)
}

// refuseDamaged is checkDamaged of the unaccounted devices, or of the error why these are
// not known.
func (d *Daemon) refuseDamaged(left []int, unknown error, bdev *disk.Disk, lookup func(string) (*disk.Disk, error)) error {
	if unknown != nil {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY,
			Message: fmt.Sprintf("may have the filter %s already: %s; %v", d.damaged[0].Name, d.damaged[0].Reason, unknown), Fix: "try again"}
	}
	unlocated := d.unlocated(left)
	for _, l := range d.damaged {
		path, has := l.Path, "has"
		if id, ok := diskNumber(filepath.Base(path)); ok && !slices.Contains(left, id) || !ok && len(unlocated) == 0 {
			continue
		} else if !ok {
			path = "/dev/" + diskName(unlocated[0])
		}
		if original, err := lookup(l.Original); err != nil {
			has = "may have"
		} else if original.Num != bdev.Num && original.Parent != bdev.Name && bdev.Parent != original.Name {
			continue
		}
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY,
			Message: fmt.Sprintf("%s the filter %s already, whose I/O waits at %s: %s", has, l.Name, path, l.Reason),
			Fix:     "mend that, or let its I/O fail and remove it: ublk-blksnap remove --force " + path}
	}
	return nil
}

// forgetDamaged removes what is left of a filter whose record cannot be trusted, when its
// device is gone; needs opLock.
func (d *Daemon) forgetDamaged(l control.LostDevice) {
	if kernelName := d.notedAs("filter", l.Name); kernelName != "" {
		d.forgetNote(kernelName)
	}
	if bdev, err := d.host.Lookup(l.Original); err == nil {
		d.forgetNote(bdev.Name)
		rescan(bdev.Name)
	}
	for _, path := range []string{d.cbtFile(l.Name), d.countersFile(l.Name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			d.opts.Log.Warn("a part of a filter stays", "name", l.Name, "error", err)
		}
	}
	d.removeDeviceRecord(l.Name)
	d.dropDamaged(l.Name)
}

// dropDamaged is for a name whose record can be trusted again, or is gone; needs opLock.
func (d *Daemon) dropDamaged(name string) {
	d.damaged = slices.DeleteFunc(slices.Clone(d.damaged), func(l control.LostDevice) bool { return l.Name == name })
}
