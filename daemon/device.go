package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// device is a filter over a disk.
type device struct {
	control.Device
	disk     *disk.Disk // the original; if attached, the private device
	attached *attachment
	orig     *blockdev.OSFile
	cbt      *cbtmap.Map
	cbtPath  string // its file
	counters *counters
	intent   *intent // nil: see uncovered
	filter   *filter.Filter
	ublk     *ublk.Device
	geo      ublk.Geometry
	// uncovered is why there is no intent.
	uncovered string

	// use is read-locked by those who look into the above without holding
	// Daemon.opLock. takeDown locks it while the device goes away.
	use  sync.RWMutex
	gone bool
	// removing: the device's removal has begun, and may have to be tried again. Its
	// queues may have ended, so nobody may ask them anything. Daemon.opLock guards
	// this field.
	removing bool
	// repartitioned: at the last look the kernel knew other partitions of the filter
	// device than of the original, or could not know. Daemon.opLock guards this field too.
	repartitioned bool
}

// hold finds a device and keeps it from going away until release.
func (d *Daemon) hold(ref string) (dev *device, release func(), err error) {
	if dev, err = d.findDevice(ref); err != nil {
		return nil, nil, err
	}
	release, err = dev.hold()
	return dev, release, err
}

func (dev *device) hold() (release func(), err error) {
	dev.use.RLock()
	if dev.gone {
		dev.use.RUnlock()
		return nil, &control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: "has no filter any more"}
	}
	return dev.use.RUnlock, nil
}

func (dev *device) closeCBT() {
	_ = dev.cbt.Close()
	_ = os.Remove(dev.cbtPath)
}

// deviceNamed is the device of that very name, nil if there is none.
func (d *Daemon) deviceNamed(name string) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.devices[name]
}

// findDevice is the device that ref names: by its name, or as a path of the original
// or of the filter device.
func (d *Daemon) findDevice(ref string) (*device, error) {
	if ref == "" { // which is also the link of a device that has lost it
		return nil, invalid("no device is named")
	}
	if dev := d.deviceNamed(ref); dev != nil {
		return dev, nil
	}
	if w := d.findWaiting(ref); w != nil {
		return nil, w.waitingError(w.record.Name)
	}
	all := d.sortedDevices()
	bdev, err := d.host.Lookup(ref)
	if err != nil {
		// The original may have been pulled out.
		for _, dev := range all {
			if dev.Original == ref || dev.shown().Node == ref || dev.Link == ref {
				return dev, nil
			}
		}
		e := &control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: "no filter of this name"}
		var de *disk.Error
		if errors.As(err, &de) && (filepath.IsAbs(ref) || errors.Is(err, disk.ErrNoAnswer)) {
			e = diskError(de)
			e.Message, e.Fix = de.What, ""
		}
		return nil, d.explainDevice(e, ref)
	}
	for _, w := range d.sortedWaiting() {
		if w.record.shown().Number == bdev.Num.String() || w.record.Original.Number == bdev.Num.String() || diskName(w.record.ID) == bdev.Name {
			return nil, w.waitingError(w.record.Name)
		}
	}
	for _, dev := range all {
		if dev.disk.Num == bdev.Num || dev.shown().Num == bdev.Num || dev.ublk.Num == bdev.Num {
			return dev, nil
		}
	}
	return nil, d.explainDevice(&control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: "has no filter", Fix: "add it first: ublk-blksnap add " + ref}, ref)
}

// openedBy names a process that has the device open, if one has that is not our prober,
// which claims it for us.
func (d *Daemon) openedBy(n blockdev.Num) string {
	if who := d.openers(n); len(who) > 0 {
		return who[0].String()
	}
	return ""
}

// openers are the processes that have a device open, but ours.
func (d *Daemon) openers(n blockdev.Num) []disk.Process {
	var ours []int
	if d.opts.Prober != nil {
		ours = append(ours, d.opts.Prober.PID())
	}
	return d.host.Openers(n, ours...)
}

func (d *Daemon) sortedDevices() []*device {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*device, 0, len(d.devices))
	for _, dev := range d.devices {
		out = append(out, dev)
	}
	slices.SortFunc(out, func(a, b *device) int { return a.Added.Compare(b.Added) })
	return out
}
