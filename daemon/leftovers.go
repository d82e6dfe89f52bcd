package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// removeLeftovers removes what a dead daemon left and nobody takes over: ublk devices
// without a disk, images, and files, links and notes of devices that are not there.
func (d *Daemon) removeLeftovers(ctx context.Context) {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	left, err := d.ctl.List(ctx)
	if err != nil {
		d.opts.Log.Warn("cannot look for devices of a dead daemon", "error", err)
		return
	}
	names, noted := d.known()
	for _, info := range left {
		kind, ours := ublk.IsOurs(info.Tag)
		kernelName := diskName(info.ID)
		if !ours || noted[kernelName] {
			continue
		}
		if now, err := d.ctl.SettledInfo(ctx, info.ID); err == nil {
			info = now
		}
		// An image that was noted here is of no use without its snapshot.
		if info.State != ublk.Dead && !(kind == imageKind && d.opts.Dir.has(filepath.Join(udevName, kernelName)) && !info.Served()) {
			// Somebody may have it mounted: not ours to throw away.
			noted[kernelName] = true
			d.opts.Log.Warn("a device of another daemon is left alone", "device", "/dev/"+kernelName, "state", info.State.String(), "pid", info.PID)
			continue
		}
		if isOpen(fmt.Sprintf("/dev/ublkc%d", info.ID)) {
			noted[kernelName] = true
			d.opts.Log.Info("a device that another daemon makes or removes is left alone", "device", info.ID)
			continue
		}
		if err := d.ctl.DeleteDevice(ctx, info.ID); err != nil {
			d.opts.Log.Warn("cannot remove the device of a dead daemon", "device", info.ID, "error", err)
		}
		deathpoint.Point()
	}
	d.dropPrivates()
	d.clearLinks(ctx)
	for _, dir := range []string{d.cbtDir(), d.countersDir()} {
		for _, e := range dirEntries(dir) {
			if !names[e.Name()] {
				_ = os.Remove(filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, e := range dirEntries(d.opts.Dir.udev()) {
		if !noted[e.Name()] {
			d.forgetNote(e.Name())
		}
	}
}

func dirEntries(dir string) []os.DirEntry {
	entries, _ := os.ReadDir(dir)
	return entries
}

// known are the names of the devices that there are, or wait, or whose record cannot be
// trusted; and the kernel's names that there are notes of.
func (d *Daemon) known() (names, noted map[string]bool) {
	names, noted = map[string]bool{}, map[string]bool{}
	for _, dev := range d.sortedDevices() {
		names[dev.Name], noted[filepath.Base(dev.Path)], noted[dev.disk.Name] = true, true, true
	}
	for _, s := range d.sortedWaiting() {
		names[s.record.Name], noted[diskName(s.record.ID)], noted[s.record.Original.Name] = true, true, true
	}
	for _, s := range d.gone { // a change map may be kept of them yet
		names[s.record.Name] = true
	}
	for _, l := range d.damaged {
		names[l.Name], noted[filepath.Base(l.Path)] = true, true
		if bdev, err := d.host.Lookup(l.Original); err == nil {
			noted[bdev.Name] = true
		}
	}
	for _, s := range d.sortedSnapshots() {
		for _, im := range s.images {
			if im.ublk != nil {
				noted[filepath.Base(im.ublk.Path)] = true
			}
		}
	}
	return names, noted
}
