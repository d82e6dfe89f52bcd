package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// device is a filter over a disk.
type device struct {
	control.Device
	disk   *disk.Disk // the original
	orig   *blockdev.OSFile
	cbt    *cbtmap.Map
	cbtAt  string // its file
	filter *filter.Filter
	dev    *ublk.Device
	geo    ublk.Geometry

	// use is held by those who look into the above without holding
	// Daemon.change, and by takeDown while it goes away.
	use  sync.RWMutex
	gone bool
	// leaving: its removal has begun, and may have to be tried again. Daemon.change
	// guards it. Its queues may have ended: nothing can be asked of them.
	leaving bool
	// repartitioned: the partitions of the filter device were not those of the
	// original as the kernel knows it, when last looked at. The same guards it.
	repartitioned bool
}

// hold finds a device and keeps it from going away until release.
func (d *Daemon) hold(ref string) (v *device, release func(), err error) {
	if v, err = d.find(ref); err != nil {
		return nil, nil, err
	}
	release, err = v.hold()
	return v, release, err
}

func (v *device) hold() (release func(), err error) {
	v.use.RLock()
	if v.gone {
		v.use.RUnlock()
		return nil, &control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: "has no filter any more"}
	}
	return v.use.RUnlock, nil
}

// settleLimit is how long a device that is in use may be so by a passer-by: udev
// looks at new and changed devices.
const settleLimit = 2 * time.Second

// bounded is ctx with an end by which a disk must have answered, and the driver
// that waits for it.
func (d *Daemon) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, d.o.Config.DiskTimeout)
}

// validName is what a device can be called: a file name that needs no quoting.
var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return invalid("name %q: use up to 64 letters, digits and . _ + -", name)
	}
	if name == imageDir {
		return invalid("name %q: is the folder of images", name)
	}
	return nil
}

// AddDevice implements control.API.
func (d *Daemon) AddDevice(ctx context.Context, r control.AddRequest) (control.Device, error) {
	end, err := d.begin(ctx, "add %s", r.Path)
	if err != nil {
		return control.Device{}, err
	}
	defer end()
	v, err := d.add(ctx, r)
	if err != nil {
		return control.Device{}, fail(err, "add %s", r.Path)
	}
	d.o.Log.Info("added", "name", v.Name, "disk", v.Original, "device", v.Path, "queues", v.Queues, "depth", v.Depth, "mode", v.Mode)
	return v.Device, nil
}

// add needs change.
func (d *Daemon) add(ctx context.Context, r control.AddRequest) (*device, error) {
	if err := d.fillIn(&r); err != nil {
		return nil, err
	}
	v := &device{}
	var err error
	if v.disk, err = d.host.Lookup(r.Path); err != nil {
		return nil, err
	}
	if err := d.notOurs(v.disk); err != nil {
		return nil, err
	}
	if err := d.host.CheckUsable(v.disk); err != nil {
		return nil, d.nameFilter(v.disk, err)
	}
	if r.Name == "" {
		r.Name = v.disk.DisplayName()
	}
	if err := checkName(r.Name); err != nil {
		return nil, err
	}
	if old := d.named(r.Name); old != nil {
		return nil, &control.Error{Code: control.Exists, Errno: unix.EEXIST,
			Message: fmt.Sprintf("the name %s is taken by the filter over %s", r.Name, old.Original), Fix: "choose another with --name"}
	}
	ctx, cancel := d.bounded(ctx)
	defer cancel()
	if err := d.checkFreeName(ctx, r.Name); err != nil {
		return nil, err
	}
	err = d.open(ctx, v, r)
	if err != nil && v.dev == nil {
		return nil, err
	}
	d.mu.Lock()
	d.devices[v.Name] = v
	d.mu.Unlock()
	if err != nil {
		return nil, &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: fmt.Sprintf("%s does not answer, and neither does its filter: %v", v.Original, err),
			Fix: "when it does, remove what was begun: ublk-blksnap remove --force " + v.Name}
	}
	return v, nil
}

// fillIn gives a request the configured values and refuses impossible ones.
func (d *Daemon) fillIn(r *control.AddRequest) error {
	c := d.o.Config
	if r.Queues == 0 {
		r.Queues = int(c.Queues)
	}
	if r.Depth == 0 {
		r.Depth = int(c.QueueDepth)
	}
	if r.Mode == "" {
		r.Mode = c.Mode
	}
	if r.Recovery == nil {
		r.Recovery = &c.Recovery
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
	return roomForQueues(*r, availableMemory())
}

// roomForQueues refuses queues whose buffers, were they needed, would take more
// than half of the memory there is: they cannot be swapped, and nothing kills
// this process for them. available is in bytes, 0 if it is not known.
func roomForQueues(r control.AddRequest, available int64) error {
	need := int64(r.Queues) * int64(r.Depth) * ublk.DefaultMaxIO
	if r.Mode == control.ModeZeroCopy || available == 0 || need <= available/2 {
		return nil
	}
	return &control.Error{Code: control.Invalid, Errno: unix.ENOMEM, Fix: "choose fewer or shorter queues with --queues and --depth",
		Message: fmt.Sprintf("%d queues of depth %d may need %d MiB of memory, %d MiB are available", r.Queues, r.Depth, need>>20, available>>20)}
}

// notOurs refuses a disk that has a filter, or is one, or an image.
func (d *Daemon) notOurs(x *disk.Disk) error {
	for _, v := range d.sorted() {
		if v.disk.Num == x.Num {
			return &control.Error{Code: control.Exists, Errno: unix.EALREADY, Message: "already added as " + v.Name}
		}
		if v.dev.Num == x.Num || filepath.Base(v.Path) == x.Parent {
			return &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "is itself the filter over " + v.Original}
		}
	}
	for _, s := range d.sortedSnapshots() {
		for _, im := range s.images {
			if im.dev != nil && (im.dev.Num == x.Num || filepath.Base(im.dev.Path) == x.Parent) {
				return &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "is an image of snapshot " + s.id}
			}
		}
	}
	return nil
}

// nameFilter explains an exclusive user that is ours: a filter over a partition
// of the disk, or over the disk of the partition.
func (d *Daemon) nameFilter(x *disk.Disk, err error) error {
	if !errors.Is(err, disk.ErrInUse) {
		return err
	}
	for _, v := range d.sorted() {
		if v.disk.Parent == x.Name || x.Parent == v.disk.Name {
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: fmt.Sprintf("%s, on the same disk, has the filter %s", v.disk.DisplayPath(), v.Name)}
		}
	}
	return err
}

// open makes everything a filter is made of, or nothing. Only a device that the
// driver does not let go stays, v.dev with all that it uses: it has to be taken
// down.
func (d *Daemon) open(ctx context.Context, v *device, r control.AddRequest) (err error) {
	var undo []func()
	defer func() {
		if err != nil && v.dev == nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()

	if v.orig, err = d.openOriginal(ctx, v.disk); err != nil {
		return d.nameFilter(v.disk, err)
	}
	undo = append(undo, func() { d.closeOriginal(v, func() {}) })

	if v.geo, err = readGeometry(ctx, v.disk); err != nil {
		return err
	}
	if err = d.makeMap(v, r.Name); err != nil {
		return err
	}
	undo = append(undo, v.closeCBT)
	v.filter = filter.New(filter.Config{Orig: v.orig, Size: v.geo.Size, CBT: v.cbt, Queues: r.Queues})

	v.dev, err = d.addUblk(ctx, filterKind, r.Name, ublk.Config{
		Name: r.Name, Queues: r.Queues, Depth: r.Depth, MaxIO: ublk.DefaultMaxIO,
		Mode: ublkMode(r.Mode), Geometry: v.geo, Recovery: *r.Recovery,
		Files:      []*blockdev.OSFile{v.orig},
		NewHandler: func(q int, bq blockdev.Queue) ublk.Handler { return v.filter.NewQueue(q, bq) },
	})
	if v.dev == nil {
		return err
	}
	v.Device = control.Device{
		Name: r.Name, Original: v.disk.DisplayPath(), OriginalNumber: v.disk.Num.String(),
		Path: v.dev.Path, Number: v.dev.Num.String(), ID: uint32(v.dev.ID),
		Size: v.geo.Size, LogicalBlockSize: v.geo.LogicalBlock, PhysicalBlockSize: v.geo.PhysicalBlock,
		Queues: v.dev.Queues, Depth: v.dev.Depth, Mode: modeOf(v.dev.Mode), Recovery: *r.Recovery,
		Added: time.Now(), Snapshots: []string{},
	}
	if err == nil {
		v.Link, err = d.link(ctx, r.Name, v.dev)
	}
	if err == nil {
		err = d.note(v.disk.Name, "original", r.Name)
	}
	if err != nil {
		v.leaving = true
		if e := d.removeUblk(v.dev, v.Link); e == nil {
			v.dev = nil
		}
		return err
	}
	rescan(v.disk.Name)
	return nil
}

// openOriginal opens a disk for a filter, so that nobody else can claim it.
func (d *Daemon) openOriginal(ctx context.Context, x *disk.Disk) (*blockdev.OSFile, error) {
	type opened struct {
		file *blockdev.OSFile
		err  error
	}
	o, err := bounded.Call(ctx, func() opened {
		f, err := d.host.OpenExclusive(x)
		if err == nil {
			// What readers of the disk have in the page cache is about to become old.
			_ = unix.IoctlSetInt(f.Fd(), unix.BLKFLSBUF, 0)
		}
		return opened{f, err}
	}, func(o opened) {
		if o.err == nil {
			_ = o.file.Close()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("open and flush %s: %w", x.DisplayPath(), err)
	}
	return o.file, o.err
}

// readGeometry asks the kernel, which answers only after whoever changes a
// parameter of the disk, and who does that waits for the disk's I/O.
func readGeometry(ctx context.Context, x *disk.Disk) (ublk.Geometry, error) {
	type answer struct {
		geo ublk.Geometry
		err error
	}
	a, err := bounded.Call(ctx, func() (a answer) {
		a.geo, a.err = ublk.ReadGeometry(x.Node)
		return a
	}, func(answer) {})
	if err != nil {
		return ublk.Geometry{}, fmt.Errorf("read geometry of %s: %w", x.DisplayPath(), err)
	}
	return a.geo, a.err
}

// makeMap makes the change map of a device. The tables of snapshots take their
// memory as they come into use: a map may not take what they were promised.
func (d *Daemon) makeMap(v *device, name string) error {
	n, err := cbtmap.RegionSize(v.geo.Size, d.o.Config.CBTParams())
	if err != nil {
		return err
	}
	if err := snapshots.Room(d.cbtDir(), n); err != nil {
		return fmt.Errorf("make the change map: %w", err)
	}
	v.cbtAt = filepath.Join(d.cbtDir(), name)
	v.cbt, err = cbtmap.Create(v.cbtAt, v.geo.Size, d.o.Config.CBTParams())
	return err
}

func (v *device) closeCBT() {
	_ = v.cbt.Close()
	_ = os.Remove(v.cbtAt)
}

func ublkMode(m control.Mode) ublk.Mode {
	switch m {
	case control.ModeCopy:
		return ublk.ModeCopy
	case control.ModeZeroCopy:
		return ublk.ModeZeroCopy
	case control.ModeAuto:
	}
	return ublk.ModeAuto
}

func modeOf(m ublk.Mode) control.Mode {
	if m == ublk.ModeZeroCopy {
		return control.ModeZeroCopy
	}
	return control.ModeCopy
}

// addUblk adds a ublk device of ours, with its note for udev written before it
// appears: therefore its number is chosen here. A device returned with an error
// is one that the driver does not let go.
func (d *Daemon) addUblk(ctx context.Context, kind byte, name string, cfg ublk.Config) (*ublk.Device, error) {
	ctx, cancel := d.bounded(ctx)
	defer cancel()
	cfg.Tag = ublk.Tag(kind)
	cfg.OpenedBy = d.openedBy
	noteKind := "filter"
	if kind == imageKind {
		noteKind = "image"
	}
	used, err := d.ctl.List(ctx)
	if err != nil {
		return nil, err
	}
	for id := 0; ; id++ {
		if slices.ContainsFunc(used, func(i ublk.Info) bool { return i.ID == id }) {
			continue
		}
		cfg.ID = id
		kernelName := fmt.Sprintf("ublkb%d", id)
		if err := d.note(kernelName, noteKind, name); err != nil {
			return nil, err
		}
		dev, err := ublk.Add(ctx, d.ctl, cfg)
		if dev == nil {
			d.forgetNote(kernelName)
		}
		if errors.Is(err, unix.EEXIST) {
			// Another server took the number meanwhile.
			continue
		}
		return dev, err
	}
}

// removeUblk stops and deletes a ublk device under its users, with its link.
func (d *Daemon) removeUblk(dev *ublk.Device, link string) error {
	ctx, cancel := d.bounded(context.Background())
	defer cancel()
	// The name goes first: it must not lead to another device.
	d.unlink(link, dev.Path)
	err := dev.Delete(ctx)
	if err == nil {
		d.forgetNote(filepath.Base(dev.Path))
		// udev may have looked at it once more, and is not done with its end.
		d.unlink(link, dev.Path)
	}
	return err
}

// named is the device of that very name, nil if there is none.
func (d *Daemon) named(name string) *device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.devices[name]
}

// find is the device that ref names: by its name, or as a path of the original
// or of the filter device.
func (d *Daemon) find(ref string) (*device, error) {
	if v := d.named(ref); v != nil {
		return v, nil
	}
	all := d.sorted()
	x, err := d.host.Lookup(ref)
	if err != nil {
		// The original may have been pulled out.
		for _, v := range all {
			if v.Original == ref || v.disk.Node == ref || v.Link == ref {
				return v, nil
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
	for _, v := range all {
		if v.disk.Num == x.Num || v.dev.Num == x.Num {
			return v, nil
		}
	}
	return nil, d.explainDevice(&control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: "has no filter", Fix: "add it first: ublk-blksnap add " + ref}, ref)
}

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

// openedBy names a process that has the device open, if one has.
func (d *Daemon) openedBy(n blockdev.Num) string {
	if who := d.host.Openers(n); len(who) > 0 {
		return who[0].String()
	}
	return ""
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

// Devices implements control.API.
func (d *Daemon) Devices(context.Context) ([]control.Device, error) {
	out := []control.Device{}
	for _, v := range d.sorted() {
		out = append(out, d.describe(v))
	}
	return out, nil
}

func (d *Daemon) describe(v *device) control.Device {
	x := v.Device
	x.Snapshots = d.holding(v)
	return x
}

// DeviceStatus implements control.API.
func (d *Daemon) DeviceStatus(ctx context.Context, ref string) (control.DeviceStatus, error) {
	v, release, err := d.hold(ref)
	if err != nil {
		return control.DeviceStatus{}, fail(err, "status of %s", ref)
	}
	defer release()
	s := control.DeviceStatus{Device: d.describe(v), State: "unknown", Operations: map[string]control.Operation{}, Unregistered: v.dev.Unregistered()}
	if i, err := v.dev.Info(ctx); err == nil {
		s.State = i.State.String()
	}
	for q := range v.Queues {
		c := v.filter.Counters(q)
		for op := ublk.OpRead; op <= ublk.OpWriteZeroes; op++ {
			o := s.Operations[op.String()]
			o.Requests += c.Requests[op].Load()
			o.Bytes += c.Bytes[op].Load()
			s.Operations[op.String()] = o
		}
		s.Errors += c.Errors.Load()
		s.InFlight += c.InFlight.Load()
		s.DiscardsSkipped += c.Skipped.Load()
	}
	if i, err := v.cbt.Info(); err == nil {
		c := cbtInfo(i)
		s.CBT = &c
	}
	return s, nil
}
