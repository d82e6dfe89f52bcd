package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// A daemon begins with what the one before it left, if that died. Its devices wait
// with their I/O, and go on under the same numbers:
//
//	records ── claim ──> open disk, map, counters ──> serve
//	   │         │               │
//	   │         │               └ not to be had: it waits, and is tried again
//	   │         └ stopped, or not there: an add or a remove that died; its rest goes
//	   └ damaged: said, and left alone
//
// A device that no snapshot holds goes this way alone. Those that one holds wait for
// each other, for the snapshots' storage and for their images, because only then has
// everything ended that the dead daemon had begun for the snapshots.
//
// This daemon may die in turn at any step of it: the next one does it again.

// survivor is a filter of a dead daemon that this one does not serve yet.
type survivor struct {
	record  deviceRecord
	claimed *ublk.Claimed
	dev     *device // that is about to be served
	reason  error   // why it waits
	held    bool    // by a snapshot
}

const (
	// claimTimeout is how long the kernel may take to let go of a dead server: before
	// Linux 6.9 it looks every 5 s, and what the server had begun ends first.
	claimTimeout = time.Minute
	// serveTimeout is how long it may take to serve a device again. Nothing of it waits
	// for a disk: only a machine that is very busy needs long, and it shall not lose a
	// snapshot for that.
	serveTimeout = 10 * time.Minute
	// retryInterval is how often a device that waits for its disk is tried again.
	retryInterval = 2 * time.Second
)

// takeOver makes this daemon the server of what a dead one left.
func (d *Daemon) takeOver(ctx context.Context) {
	began := time.Now()
	if d.predecessor != os.Getpid() { // else it knows itself how long it took: see reload.go
		began = processStart()
	}
	// Beside all else: a filesystem that goes on writes to its filter, which has to be
	// served for that.
	d.readFrozen()
	thawed := make(chan struct{})
	go func() {
		defer close(thawed)
		d.thawLeftover()
	}()
	d.openEvents()
	d.openOutdated()
	records, damaged := d.deviceRecords()
	d.damaged = damaged
	var devices []*survivor
	for _, r := range records {
		devices = append(devices, &survivor{record: r})
		if r.Attached != nil {
			d.mu.Lock()
			d.attachedFound, d.takingOver = append(d.attachedFound, r.Name), true
			d.mu.Unlock()
		}
	}
	snaps := d.leftSnapshots()
	ready := make(chan struct{})
	go func() {
		defer close(ready)
		d.claimSnapshots(ctx, snaps)
	}()
	devices, gone, served := d.claimAll(ctx, devices, snaps)
	<-ready
	there := map[string]*device{}
	for _, s := range devices {
		if s.dev != nil {
			there[s.dev.Name] = s.dev
		}
	}
	reopened := make([]*snapshot, len(snaps))
	reasons := make([]error, len(snaps))
	for i, s := range snaps {
		reopened[i], reasons[i] = d.reopenSnapshot(s, there)
		d.opts.progress.made()
	}
	served += d.resumeHeld(ctx, devices)
	pause := time.Since(began)
	d.resumeImages(ctx, reopened, snaps)
	images := time.Since(began)
	for i, s := range snaps {
		if reopened[i] == nil {
			continue
		}
		if err := d.goOn(ctx, reopened[i], s); err != nil {
			d.opts.Log.Error("a snapshot is taken over without its images: it is destroyed", "snapshot", s.id(), "error", err)
			d.ended = append(d.ended, s.lost(err))
			d.tellEnd(s, err)
			go d.forwardEvents(reopened[i])
			if err := d.startDestroy(reopened[i]); err != nil {
				d.opts.Log.Error("a snapshot cannot be destroyed", "snapshot", s.id(), "error", err)
			}
			continue
		}
		served += len(s.Images)
		d.opts.progress.made()
	}
	d.makeAgain(ctx, snaps, reopened, reasons)
	if served > 0 {
		d.recovered = &control.Recovered{At: began.Add(images), Count: d.countRecovery(d.predecessor != os.Getpid()), Pause: pause, Images: images, Devices: served}
		from := "a daemon that died"
		if d.predecessor == os.Getpid() {
			from = "the program before"
		}
		d.opts.Log.Warn("taken over from "+from, "devices", served, "pause", pause, "images", images)
	}
	for _, s := range devices {
		if s.dev != nil {
			d.nameAgain(ctx, s)
		} else {
			d.wait(s)
		}
	}
	d.mu.Lock()
	d.takingOver = false
	d.mu.Unlock()
	d.locate(ctx)
	d.gone = gone
	d.removeLeftovers(ctx)
	d.endSnapshots(ctx, snaps, reopened, reasons)
	d.forgetEvents(snaps)
	select {
	case <-thawed:
	case <-time.After(d.opts.Config.FreezeTimeout): // some disk does not answer
	}
}

// settle ends what may have to wait for disks and for the state directory; needs opLock.
func (d *Daemon) settle(ctx context.Context) {
	for _, dev := range d.sortedDevices() {
		if dev.attached != nil && dev.attached.changing.Load() {
			d.step("find out how far a change of tables came")
			d.finishChange(ctx, dev)
		}
	}
	if len(d.gone)+len(d.damaged) == 0 {
		return
	}
	d.step("settle what a dead daemon has left")
	for _, s := range d.gone {
		d.forgetHistory(ctx, s.record)
	}
	d.gone = nil
	for _, l := range d.damaged {
		if d.deviceNamed(l.Name) == nil { // else its record can be trusted
			d.stopDamaged(l)
		}
	}
	d.forgetGone(ctx)
	d.saveRecord()
	d.activity.Store(new(string))
}

// resumeHeld serves the devices that snapshots hold, and says how many.
func (d *Daemon) resumeHeld(ctx context.Context, devices []*survivor) int {
	var now []*survivor
	for _, s := range devices {
		if s.dev != nil && s.held {
			now = append(now, s)
		}
	}
	for _, s := range now {
		d.leaveKept(s)
	}
	eachAtOnce(now, func(s *survivor) { d.beginIntent(ctx, s) })
	for _, s := range now {
		deathpoint.Point()
		d.resume(ctx, s)
	}
	return len(now)
}

// beginIntent begins the log of a device that was taken over, under the map as it is
// now, which has every write of the dead daemon; after leaveKept.
func (d *Daemon) beginIntent(ctx context.Context, s *survivor) {
	if s.dev.intent != nil {
		s.dev.intent.begin(ctx, true)
	}
}

// recoveries is how often daemons have taken over, in state/recoveries.
type recoveries struct {
	Count int `json:"count"`
}

// countRecovery counts this one, if the daemon before had died, and not given way to
// another program.
func (d *Daemon) countRecovery(died bool) int {
	const kind, format = "recoveries", 1
	path := filepath.Join(d.opts.Dir.State(), kind)
	var r recoveries
	text, _, err := statefile.Read(path, kind, format)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.opts.Log.Warn("how often a daemon has taken over is counted anew", "error", err)
	}
	if !died {
		return r.Count
	}
	r.Count++
	if err := statefile.Write(path, kind, format, r); err != nil {
		d.opts.Log.Warn("cannot count how often a daemon has taken over", "error", err)
	}
	return r.Count
}

// eachAtOnce calls f for all of them, each on a goroutine of its own, and waits.
func eachAtOnce[T any](all []T, f func(T)) {
	var wg sync.WaitGroup
	for _, s := range all {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(s)
		}()
	}
	wg.Wait()
}

// claimAll claims the devices of the driver and opens what they need. It serves those
// that no snapshot holds, and says how many. It returns the devices that there are, and
// those that are gone, of which the history is left.
func (d *Daemon) claimAll(ctx context.Context, all []*survivor, snaps []*leftSnapshot) (there, gone []*survivor, served int) {
	claiming, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	isGone := make([]bool, len(all))
	var one sync.Mutex // what follows the opening changes the daemon itself
	eachAtOnce(all, func(s *survivor) {
		s.held = slices.ContainsFunc(snaps, func(l *leftSnapshot) bool {
			return slices.ContainsFunc(l.Devices, func(known snapshots.Device) bool { return known.Name == s.record.Name })
		})
		if isGone[slices.Index(all, s)] = d.claim(claiming, s); s.claimed == nil || s.reason != nil {
			return
		}
		if s.dev, s.reason = d.reopen(ctx, s); s.dev == nil || s.held {
			return
		}
		one.Lock()
		d.leaveKept(s)
		one.Unlock()
		d.beginIntent(ctx, s)
		one.Lock()
		defer one.Unlock()
		deathpoint.Point()
		d.resume(ctx, s)
		served++
	})
	for i, s := range all {
		if !isGone[i] {
			there = append(there, s)
			continue
		}
		gone = append(gone, s)
		// It was being added or removed, and whoever did that has had no answer.
		d.opts.Log.Warn("what a dead daemon began to add or to remove is removed", "name", s.record.Name, "disk", s.record.Original.Path)
		d.forgetDevice(ctx, s.record)
	}
	return there, gone, served
}

var errNotEnded = errors.New("what the dead daemon had begun on its disks has not ended")

// notEnded says whether a claim failed because the driver still has the last server.
func notEnded(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, unix.EBUSY)
}

// claim claims the device of s, or says that there is none.
func (d *Daemon) claim(ctx context.Context, s *survivor) (gone bool) {
	defer d.opts.progress.made()
	if s.claimed != nil {
		return false
	}
	info, err := d.ctl.Info(ctx, s.record.ID)
	if errors.Is(err, unix.ENODEV) || err == nil && info.Tag != s.record.Tag {
		return true
	}
	if err == nil {
		s.claimed, err = ublk.Claim(ctx, d.ctl, s.record.ID)
	}
	deathpoint.Point()
	switch {
	case errors.Is(err, unix.ENODEV):
		return true
	case errors.Is(err, ublk.ErrDead):
		if err = d.ctl.DeleteDevice(ctx, s.record.ID); err == nil {
			deathpoint.Point()
			return true
		}
	case notEnded(err):
		err = errNotEnded
	}
	s.reason = err
	return false
}

// forget removes what is left of a device that the driver does not have any more.
func (d *Daemon) forget(ctx context.Context, r deviceRecord) {
	d.forgetDevice(ctx, r)
	d.forgetHistory(ctx, r)
}

// forgetDevice is the part of forget for which nobody may have the device's number yet.
func (d *Daemon) forgetDevice(ctx context.Context, r deviceRecord) {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	d.unlink(filepath.Join(linkDir, r.Name), diskName(r.ID))
	d.forgetNote(diskName(r.ID))
	_ = os.Remove(d.countersFile(r.Name))
	if bdev, err := r.Original.find(d.host); err == nil {
		d.forgetNote(bdev.Name)
		// Its partitions may have been changed through the filter.
		_, _ = bounded.Call(ctx, func() error { return rereadPartitions(bdev) }, func(error) {})
		rescan(bdev.Name)
	}
}

// forgetHistory is the rest of it, which may wait for the disk.
func (d *Daemon) forgetHistory(ctx context.Context, r deviceRecord) {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	d.finishEnd(ctx, r)
	_ = os.Remove(d.cbtFile(r.Name))
	d.stopIdentity(nil, r.kept())
	if r.Attached != nil {
		d.dropPrivate(d.attachmentOf(r.Attached))
	}
	d.removeDeviceRecord(r.Name)
}

// reopen makes a claimed device's filter from what outlived the dead daemon. It does
// not serve yet.
func (d *Daemon) reopen(ctx context.Context, s *survivor) (_ *device, err error) {
	defer d.opts.progress.made()
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	r := &s.record
	dev := &device{geo: r.Geometry}
	defer func() {
		if err != nil {
			d.closeAgain(dev)
		}
	}()
	if dev.disk, err = r.Original.find(d.host); err != nil {
		return nil, err
	}
	if r.Attached != nil {
		dev.attached = d.attachmentOf(r.Attached)
		dev.disk.DMName = r.Attached.Device.Name
	}
	if dev.disk.Size < r.Geometry.Size {
		return nil, fmt.Errorf("%s has shrunk from %d to %d bytes", r.Original.Path, r.Geometry.Size, dev.disk.Size)
	}
	if dev.orig, err = d.claimOriginal(ctx, dev.disk); err != nil {
		if errors.Is(err, disk.ErrInUse) && !r.ClaimedByOther {
			r.ClaimedByOther = true
			d.changeDeviceRecord(*r)
		}
		return nil, err
	}
	deathpoint.Point()
	dev.History = r.History
	if err := d.adoptChangeMap(dev, s); err != nil {
		return nil, err
	}
	if dev.counters, err = openCounters(d.countersFile(r.Name), s.claimed.Queues); err != nil {
		return nil, err
	}
	d.makeFilter(dev, r.Name, s.claimed.Queues, r.zone())
	limited, cancel := context.WithTimeout(ctx, serveTimeout)
	defer cancel()
	prepared, err := s.claimed.Prepare(limited, ublk.Config{
		Name: r.Name, Files: []*blockdev.OSFile{dev.orig}, OpenedBy: d.openedBy, Claim: d.claimDisk,
		NewHandler: func(q int, bq blockdev.Queue) ublk.Handler { return dev.filter.NewQueue(q, bq) },
	})
	if err != nil {
		return nil, err
	}
	deathpoint.Point()
	dev.ublk = prepared
	dev.describe(r.Name, r.Added)
	return dev, nil
}

// claimOriginal opens the disk of a dead daemon's filter. Its last user may still be
// on the way out, and a passer-by may look at it. If nobody is seen who has it, it may be a
// flush of the dead daemon, which takes as long as the disk needs.
func (d *Daemon) claimOriginal(ctx context.Context, bdev *disk.Disk) (*blockdev.OSFile, error) {
	for began := time.Now(); ; {
		f, err := d.openOriginal(ctx, bdev)
		limit := settleLimit
		if disk.Unseen(err) {
			limit = d.opts.Config.DiskTimeout / 2
		}
		if err == nil || !errors.Is(err, disk.ErrInUse) || time.Since(began) > limit || ctx.Err() != nil {
			return f, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// closeAgain lets go of a device that could not be taken over: what is in files stays.
func (d *Daemon) closeAgain(dev *device) {
	if dev.intent != nil {
		dev.intent.free()
	}
	if dev.counters != nil {
		dev.counters.unmap()
	}
	if dev.cbt != nil {
		_ = dev.cbt.Close()
	}
	if dev.orig != nil {
		d.closeOriginal(dev, func() {})
	}
}

// resume serves a device whose log has begun. One that the driver does not give back is
// kept all the same: whatever waits for its queues' threads goes on, and it can be removed
// by force.
func (d *Daemon) resume(ctx context.Context, s *survivor) {
	dev := s.dev
	if s.record.Ending != nil { // of a removal that had not come far
		s.record.Ending = nil
		d.changeDeviceRecord(s.record)
	}
	d.takenOver(dev)
	d.opts.progress.made()
	if err := dev.ublk.Resume(ctx); err != nil {
		s.reason = err
		dev.removing = true
		d.damaged = append(d.damaged, s.lost())
		d.opts.Log.Error("the driver does not give the device back: its I/O waits until it is removed", "name", dev.Name, "error", err)
	}
	deathpoint.Point()
	d.mu.Lock()
	d.devices[dev.Name] = dev
	d.mu.Unlock()
}

// nameAgain makes good the names of a device that may have been about to be added or
// removed.
func (d *Daemon) nameAgain(ctx context.Context, s *survivor) {
	dev := s.dev
	err := errors.Join(d.note(filepath.Base(dev.Path), dev.noteKind(), dev.Name), d.note(dev.disk.Name, "original", dev.Name))
	link := dev.Link
	if dev.attached == nil {
		var linkErr error
		link, linkErr = d.link(ctx, dev.Name, dev.ublk)
		err = errors.Join(err, linkErr)
	}
	if err != nil {
		d.opts.Log.Warn("a device has lost its name", "name", dev.Name, "device", dev.Path, "error", err)
	}
	d.mu.Lock()
	dev.Link = link
	d.mu.Unlock()
	if err := d.addPartitions(ctx, dev); err != nil {
		d.opts.Log.Warn("a device may not show the partitions of its disk: partx -a adds them", "name", dev.Name, "device", dev.Path, "error", err)
	}
	d.opts.Log.Info("taken over", "name", dev.Name, "disk", dev.Original, "device", dev.Path)
}
