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

// locate finds the device and the disk of a filter whose record cannot be trusted.
func (d *Daemon) locate(ctx context.Context, l *control.LostDevice) {
	kernelName := d.notedAs("filter", l.Name)
	if id, ok := ublkNumber("/dev/" + kernelName); !ok || !slices.Contains(d.unaccounted(ctx), id) {
		return
	}
	l.Path, l.Waits = "/dev/"+kernelName, true
	if bdev, err := d.host.Lookup(d.notedAs("original", l.Name)); err == nil {
		l.Original = bdev.DisplayPath()
	}
}

func ublkNumber(path string) (id int, ok bool) {
	n, err := fmt.Sscanf(path, "/dev/ublkb%d", &id)
	return id, n == 1 && err == nil
}

// unaccounted are our filters that nobody serves, and of which this daemon has no record.
func (d *Daemon) unaccounted(ctx context.Context) (ids []int) {
	all, err := d.ctl.List(ctx)
	if err != nil {
		d.opts.Log.Warn("cannot look for devices of a dead daemon", "error", err)
	}
	for _, info := range all {
		kind, ours := ublk.IsOurs(info.Tag)
		has := slices.ContainsFunc(d.sortedWaiting(), func(s *survivor) bool { return s.record.ID == info.ID }) ||
			slices.ContainsFunc(d.sortedDevices(), func(dev *device) bool { return dev.ublk.ID == info.ID })
		served := info.Served() && info.PID != os.Getpid()
		if ours && kind == filterKind && !has && !served && info.State != ublk.Dead {
			ids = append(ids, info.ID)
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
	left := d.unaccounted(ctx)
	for _, l := range d.damaged {
		path, has := l.Path, "has"
		if id, ok := ublkNumber(path); ok && !slices.Contains(left, id) || len(left) == 0 {
			continue
		} else if !ok {
			path = fmt.Sprintf("/dev/ublkb%d", left[0])
		}
		if original, err := d.host.Lookup(l.Original); err != nil {
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
func (d *Daemon) forgetDamaged(id int) {
	path := fmt.Sprintf("/dev/ublkb%d", id)
	i := slices.IndexFunc(d.damaged, func(l control.LostDevice) bool { return l.Path == path })
	if i < 0 {
		return
	}
	l := d.damaged[i]
	d.forgetNote(filepath.Base(path))
	if bdev, err := d.host.Lookup(l.Original); err == nil {
		d.forgetNote(bdev.Name)
		rescan(bdev.Name)
		// Nobody marks what is written to the disk from now on.
		if identity, err := d.host.Identify(bdev); err == nil {
			d.stopIdentity(nil, d.here(identity))
		}
	}
	for _, path := range []string{d.cbtFile(l.Name), d.countersFile(l.Name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			d.opts.Log.Warn("a part of a filter stays", "name", l.Name, "error", err)
		}
	}
	d.removeDeviceRecord(l.Name)
	d.mu.Lock()
	d.damaged = slices.Delete(slices.Clone(d.damaged), i, i+1)
	d.mu.Unlock()
}
