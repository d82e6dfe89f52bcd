package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// validName is what a device can be called: a file name that needs no quoting.
var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return invalid("name %q: use up to 64 letters, digits and . _ + -", name)
	}
	if name == imageDir {
		return invalid("name %q: the folder of images has this name: choose another", name)
	}
	return nil
}

// AddDevice implements control.API.
func (d *Daemon) AddDevice(ctx context.Context, r control.AddRequest) (control.Device, error) {
	end, err := d.beginNew(ctx, "add %s", r.Path)
	if err != nil {
		return control.Device{}, err
	}
	defer end()
	dev, err := d.add(ctx, r)
	if err != nil {
		return control.Device{}, fail(err, "add %s", r.Path)
	}
	if r.DryRun {
		return dev.Device, nil
	}
	d.opts.Log.Info("added", "name", dev.Name, "disk", dev.Original, "device", dev.Path, "queues", dev.Queues, "depth", dev.Depth, "mode", dev.Mode)
	return dev.Device, nil
}

// add needs opLock.
func (d *Daemon) add(ctx context.Context, r control.AddRequest) (*device, error) {
	if err := d.applyDefaults(&r); err != nil {
		return nil, err
	}
	dev := &device{}
	var err error
	if dev.disk, err = d.host.Lookup(r.Path); err != nil {
		return nil, err
	}
	if err := d.checkNotOurs(dev.disk); err != nil {
		return nil, err
	}
	attach, err := d.attaches(ctx, dev.disk, r.Attach, d.host.CheckUsable(dev.disk))
	if err != nil {
		return nil, d.explainUser(dev.disk, err)
	}
	if d.host.ToBeDetached(dev.disk) {
		return nil, &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "it is to be detached as soon as nobody has it open, and would be when the daemon dies",
			Fix: "set up another loop device, with losetup"}
	}
	if r.Name == "" {
		r.Name = dev.disk.DisplayName()
	}
	if err := checkName(r.Name); err != nil {
		return nil, err
	}
	for _, w := range d.sortedWaiting() {
		if w.record.Name == r.Name || w.record.shown().Number == dev.disk.Num.String() {
			return nil, w.waitingError(w.record.Name)
		}
	}
	if old := d.deviceNamed(r.Name); old != nil {
		return nil, &control.Error{Code: control.Exists, Errno: unix.EEXIST,
			Message: fmt.Sprintf("the name %s is taken by the filter over %s", r.Name, old.Original), Fix: "choose another with --name"}
	}
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	if err := d.checkDamaged(ctx, dev.disk); err != nil {
		return nil, err
	}
	if err := d.checkFreeName(ctx, r.Name); err != nil {
		return nil, err
	}
	switch {
	case r.DryRun:
		return dev, d.plan(ctx, dev, r, attach)
	case attach:
		err = d.attach(ctx, dev, r)
	default:
		err = d.open(ctx, dev, r)
	}
	if err != nil && dev.ublk == nil {
		return nil, err
	}
	d.mu.Lock()
	d.devices[dev.Name] = dev
	d.mu.Unlock()
	d.dropDamaged(dev.Name)
	if err != nil {
		return nil, &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: fmt.Sprintf("%s does not answer, so its filter could not be removed again: %v", dev.Original, err),
			Fix: "remove the filter when the disk answers: ublk-blksnap remove --force " + dev.Name}
	}
	return dev, nil
}

// applyDefaults gives a request the configured values and refuses impossible ones.
func (d *Daemon) applyDefaults(r *control.AddRequest) error {
	c := d.opts.Config
	if r.Queues == 0 {
		r.Queues = int(c.Queues)
	}
	if r.Depth == 0 {
		r.Depth = int(c.QueueDepth)
	}
	if r.Mode == "" {
		r.Mode = c.Mode
	}
	if r.IntentLog == nil {
		r.IntentLog = &c.IntentLog
	}
	if r.IntentLogZone == 0 {
		r.IntentLogZone = c.IntentLogZone
	}
	if n := r.IntentLogZone; n != 0 && !validZone(n) {
		return invalid("zones of %s: want a power of two from 1M to 1T", control.FormatSize(n))
	}
	if n := ublk.MaxQueues(); r.Queues < 1 || r.Queues > n {
		return invalid("%d queues: this machine has processors for 1 to %d", r.Queues, n)
	}
	if r.Depth < 1 || r.Depth > ublk.MaxDepth {
		return invalid("queue depth %d: want 1 to %d", r.Depth, ublk.MaxDepth)
	}
	if _, err := control.ParseMode(string(r.Mode)); err != nil {
		return invalid("%v", err)
	}
	switch r.Attach {
	case control.AttachInUse, control.AttachAlways, control.AttachPossible, control.AttachNever:
	default:
		return invalid("attach %q: want always, possible or never", r.Attach)
	}
	return checkQueueMemory(*r, availableMemory())
}

// checkQueueMemory refuses queues whose buffers might take more than half of the
// available memory. The buffers cannot be swapped out, and the kernel does not kill
// this process when memory runs out. available is in bytes, 0 if it is not known.
func checkQueueMemory(r control.AddRequest, available int64) error {
	need := int64(r.Queues) * int64(r.Depth) * ublk.DefaultMaxIO
	if r.Mode == control.ModeZeroCopy || available == 0 || need <= available/2 {
		return nil
	}
	return &control.Error{Code: control.Invalid, Errno: unix.ENOMEM, Fix: "choose fewer or shorter queues with --queues and --depth",
		Message: fmt.Sprintf("%d queues of depth %d may need %d MiB of memory, but only %d MiB are available", r.Queues, r.Depth, need>>20, available>>20)}
}

// checkNotOurs refuses a disk that has a filter, or is one, or an image.
func (d *Daemon) checkNotOurs(bdev *disk.Disk) error {
	for _, dev := range d.sortedDevices() {
		if dev.disk.Num == bdev.Num || dev.shown().Num == bdev.Num {
			return &control.Error{Code: control.Exists, Errno: unix.EALREADY, Message: "already added as " + dev.Name}
		}
		if dev.ublk.Num == bdev.Num || filepath.Base(dev.Path) == bdev.Parent {
			return &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "is itself the filter over " + dev.Original}
		}
	}
	for _, s := range d.sortedSnapshots() {
		for _, im := range s.images {
			if im.ublk != nil && (im.ublk.Num == bdev.Num || filepath.Base(im.ublk.Path) == bdev.Parent) {
				return &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "is an image of snapshot " + s.id}
			}
		}
	}
	return nil
}

// explainUser says so if the exclusive user of a disk is one of our own filters,
// over a partition of the disk or over the whole disk of the partition.
func (d *Daemon) explainUser(bdev *disk.Disk, err error) error {
	if !errors.Is(err, disk.ErrInUse) {
		return err
	}
	for _, dev := range d.sortedDevices() {
		if dev.disk.Parent == bdev.Name || bdev.Parent == dev.disk.Name {
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: fmt.Sprintf("%s, on the same disk, has the filter %s", dev.disk.DisplayPath(), dev.Name)}
		}
	}
	return err
}

// open makes everything that a filter is made of, or nothing. There is one
// exception: if the driver does not let go of the new device, dev.ublk stays with
// all that it uses, and the caller has to take it down.
func (d *Daemon) open(ctx context.Context, dev *device, r control.AddRequest) (err error) {
	var undo []func()
	defer func() {
		if err != nil && dev.ublk == nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()

	if dev.orig, err = d.openOriginal(ctx, dev.disk); err != nil {
		return d.explainUser(dev.disk, err)
	}
	undo = append(undo, func() { d.closeOriginal(dev, func() {}) })
	recorded := false
	undo = append(undo, func() {
		if recorded { // which goes after all that it tells the next daemon of
			d.removeDeviceRecord(r.Name)
		}
	})

	if dev.geo, err = readGeometry(ctx, dev.disk); err != nil {
		return err
	}
	if err = d.createChangeMap(dev, r.Name); err != nil {
		return err
	}
	undo = append(undo, dev.closeCBT)
	// Before the history, whose end ends who looks at them.
	if dev.counters, err = openCounters(d.countersFile(r.Name), r.Queues); err != nil {
		return err
	}
	undo = append(undo, dev.counters.remove)
	var found foundHistory
	if dev.attached == nil {
		found = d.loadHistory(ctx, dev, r.Name)
	} else {
		found = d.noHistory(dev, r.Name)
	}
	undo = append(undo, func() {
		// It was used up, for nothing.
		dev.Name = r.Name
		if dev.History.Continued {
			d.keepHistory(dev)
		} else {
			d.stopHistory(dev)
		}
	})
	zone := int64(-1)
	if *r.IntentLog && dev.attached == nil {
		zone = r.IntentLogZone
	}
	d.makeFilter(dev, r.Name, r.Queues, zone)
	added := time.Now()

	dev.ublk, err = d.addUblk(ctx, filterKind, dev.noteKind(), r.Name, ublk.Config{
		Name: r.Name, Queues: r.Queues, Depth: r.Depth, MaxIO: ublk.DefaultMaxIO,
		Mode: ublkMode(r.Mode), Geometry: dev.geo,
		NoPartScan: d.ctl.ScansInStart() || dev.attached != nil,
		Files:      []*blockdev.OSFile{dev.orig},
		NewHandler: func(q int, bq blockdev.Queue) ublk.Handler { return dev.filter.NewQueue(q, bq) },
	}, func(id int, tag uint64) error {
		record := deviceRecord{Name: r.Name, ID: id, Tag: tag, Original: originalOf(dev.disk), Geometry: dev.geo, Added: added, History: dev.History}
		if dev.attached != nil {
			record.Attached = d.attachedRecord(dev.attached)
		}
		record.Unpartitioned = dev.attached == nil && d.ctl.ScansInStart() && len(d.host.PartitionTable(dev.disk)) > 0
		if dev.intent != nil {
			record.Identity, record.IntentLogZone, record.StateDir = dev.intent.identity, r.IntentLogZone, d.opts.Config.StateDir
		}
		if found.refusal == nil {
			record.Ending = found.now // which finishEnd needs if there will be no device
		}
		if err := d.writeDeviceRecord(record); err != nil || recorded {
			return err
		}
		recorded = true
		// Only now, because the next daemon takes back what it finds of a device that is
		// on record and was never made.
		d.beginHistory(ctx, dev, r.Name, found)
		if record.History == dev.History {
			return nil
		}
		record.History = dev.History
		return d.writeDeviceRecord(record)
	})
	deathpoint.Point()
	if dev.ublk == nil {
		return err
	}
	d.forgetEnd(r.Name)
	dev.describe(r.Name, added)
	if err == nil && dev.attached == nil {
		dev.Link, err = d.link(ctx, r.Name, dev.ublk)
	}
	if err == nil {
		err = d.note(dev.disk.Name, "original", r.Name)
	}
	if err == nil {
		err = d.addPartitions(ctx, dev)
	}
	if err != nil {
		dev.removing = true
		if e := d.removeUblk(dev.ublk, dev.Link); e == nil {
			dev.ublk = nil
		}
		return err
	}
	deathpoint.Point()
	if dev.attached == nil {
		rescan(dev.disk.Name)
	}
	return nil
}

// beginHistory begins the log of a device that nobody writes to yet, and uses up what was
// found of its disk.
func (d *Daemon) beginHistory(ctx context.Context, dev *device, name string, found foundHistory) {
	if dev.intent != nil {
		dev.intent.begin(ctx, !found.unanswered)
		d.takenOver(dev)
	}
	deathpoint.Point()
	d.useHistory(ctx, dev, name, found)
	deathpoint.Point()
}

// describe says what the device is, which its ublk device makes final.
func (dev *device) describe(name string, added time.Time) {
	dev.Device = control.Device{
		Name: name, Original: dev.shown().DisplayPath(), OriginalNumber: dev.shown().Num.String(),
		Path: dev.ublk.Path, Number: dev.ublk.Num.String(), ID: uint32(dev.ublk.ID),
		Size: dev.geo.Size, LogicalBlockSize: dev.geo.LogicalBlock, PhysicalBlockSize: dev.geo.PhysicalBlock,
		Queues: dev.ublk.Queues, Depth: dev.ublk.Depth, Mode: modeOf(dev.ublk.Mode),
		Added: added, Snapshots: []string{}, History: dev.History,
	}
	if dev.attached != nil {
		dev.Attached, dev.Link = true, dev.Original
	}
}

// openOriginal opens a disk for a filter, so that nobody else can claim it.
func (d *Daemon) openOriginal(ctx context.Context, bdev *disk.Disk) (*blockdev.OSFile, error) {
	type opened struct {
		file *blockdev.OSFile
		err  error
	}
	o, err := bounded.Call(ctx, func() opened {
		f, err := d.host.OpenExclusive(bdev)
		if err == nil {
			// The page cache of the disk is about to become out of date.
			_ = unix.IoctlSetInt(f.Fd(), unix.BLKFLSBUF, 0)
		}
		return opened{f, err}
	}, func(o opened) {
		if o.err == nil {
			_ = o.file.Close()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("open and flush %s: %w", bdev.DisplayPath(), err)
	}
	return o.file, o.err
}

// readGeometry asks the kernel, and may have to wait. While somebody changes a
// parameter of the disk the kernel does not answer, and such a change waits for the
// disk's I/O.
func readGeometry(ctx context.Context, bdev *disk.Disk) (ublk.Geometry, error) {
	type answer struct {
		geo ublk.Geometry
		err error
	}
	a, err := bounded.Call(ctx, func() (a answer) {
		a.geo, a.err = ublk.ReadGeometry(bdev.Node)
		return a
	}, func(answer) {})
	if err != nil {
		return ublk.Geometry{}, fmt.Errorf("read geometry of %s: %w", bdev.DisplayPath(), err)
	}
	return a.geo, a.err
}

// createChangeMap makes the change map of a device. The tables of snapshots get
// their memory only as they come into use. So the map must leave free the memory
// that these tables may still need.
func (d *Daemon) createChangeMap(dev *device, name string) error {
	n, err := cbtmap.MemorySize(dev.geo.Size, d.opts.Config.CBTParams())
	if err != nil {
		return err
	}
	if err := snapshots.CheckSpace(d.cbtDir(), n); err != nil {
		return fmt.Errorf("make the change map: %w", err)
	}
	dev.cbtPath = d.cbtFile(name)
	dev.cbt, err = cbtmap.Create(dev.cbtPath, dev.geo.Size, d.opts.Config.CBTParams())
	return err
}
