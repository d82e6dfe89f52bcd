package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
)

// What others do to the table of an attached device. lvextend, lvreduce, lvcreate --snapshot,
// pvmove, dmsetup reload and the like give the device a table of their own, and from then on
// its requests pass the filter by: the change map misses them, and they overwrite what images
// show. Nobody can keep them from that. So the daemon looks at the table: when the kernel
// tells of a change, once a second, before a take is answered, and before the change map is
// asked. Once it is another one, the map has a new generation, the snapshots of the device end
// with an event that says so, and the device is attached anew, as large as it is then. A take
// that was answered was made while requests came to the filter.

// checkTable makes sure that the requests of an attached device come to its filter.
func (d *Daemon) checkTable(dev *device) error {
	a := dev.attached
	if a == nil {
		return nil
	}
	if a.changing.Load() {
		return &control.Error{Code: control.Busy, Errno: unix.EAGAIN, Message: "it is being attached or detached", Fix: "try again"}
	}
	if a.bypassed.Load() == nil {
		state, err := d.tableState(a, dev.ublk.Num)
		if err != nil {
			return fmt.Errorf("look at the table of %s: %w", a.device, err)
		}
		if state == tableOurs || a.changing.Load() {
			return nil
		}
		d.bypass(dev, state)
	}
	return &control.Error{Code: control.GenerationEnded, Errno: unix.ESTALE, Message: *a.bypassed.Load(), Fix: "copy the whole device after the next take"}
}

// bypass notes that requests do not come to a filter any more. The caller keeps the device
// from going away.
func (d *Daemon) bypass(dev *device, state tableState) {
	why := fmt.Sprintf("another program has given %s another table", dev.attached.device)
	if state == tableGone {
		why = dev.attached.device.String() + " has been removed"
	}
	if dev.attached.bypassed.CompareAndSwap(nil, &why) {
		dev.cbt.NewGeneration()
		d.mu.Lock()
		dev.Attention = "its requests do not come to the filter: " + why
		d.mu.Unlock()
		d.opts.Log.Error("requests do not come to a filter any more: all of its disk counts as changed", "name", dev.Name, "reason", why)
		d.events.notice(control.Event{Kind: control.EventNewGeneration, Device: dev.OriginalNumber, Text: why})
	}
}

// whyBypassed is why requests do not come to the filter any more, if they do not.
func (dev *device) whyBypassed() string {
	if dev.attached != nil {
		if why := dev.attached.bypassed.Load(); why != nil {
			return *why
		}
	}
	return ""
}

// tableInterval is how often tables are looked at, if the kernel tells nothing.
const tableInterval = time.Second

// lookAtTables has watchTables look now.
func (d *Daemon) lookAtTables() {
	select {
	case d.tablesTold <- struct{}{}:
	default:
	}
}

// watchTables looks at the tables of attached devices until ctx ends.
func (d *Daemon) watchTables(ctx context.Context) {
	if events, err := dm.Events(); err != nil {
		d.opts.Log.Warn("the kernel does not tell of changed tables: the daemon looks once a second", "error", err)
	} else {
		context.AfterFunc(ctx, func() { events.Close() })
		go func() {
			for events.Next() == nil {
				d.lookAtTables()
			}
		}()
	}
	tick := time.NewTicker(tableInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.tablesTold:
		case <-tick.C:
		}
		for _, dev := range d.sortedDevices() {
			if dev.attached != nil && d.needsCare(dev) {
				d.careFor(ctx, dev)
			}
		}
	}
}

// needsCare says whether requests pass a device by, or it is not known whether they do, and
// something may be done about it now.
func (d *Daemon) needsCare(dev *device) bool {
	release, err := dev.hold()
	if err != nil {
		return false
	}
	defer release()
	if time.Now().UnixNano() < dev.attached.again.Load() {
		return false
	}
	if dev.attached.changing.Load() {
		return true
	}
	return d.checkTable(dev) != nil && dev.attached.bypassed.Load() != nil
}

// careFor does what is to be done then.
func (d *Daemon) careFor(ctx context.Context, dev *device) {
	end, err := d.begin(ctx, "look after %s", dev.Name)
	if err != nil {
		return
	}
	defer end()
	if d.deviceNamed(dev.Name) != dev {
		return
	}
	switch {
	case dev.attached.changing.Load():
		d.finishChange(ctx, dev)
	case dev.attached.bypassed.Load() != nil:
		d.attachAnew(ctx, dev)
	}
}

// finishChange finds out how far a change of tables came that nobody has been told of, and
// whether the filter stays; needs opLock. If that is not known yet, or has not ended, the watch
// comes again.
func (d *Daemon) finishChange(ctx context.Context, dev *device) {
	a := dev.attached
	r, err := d.readDeviceRecord(dev.Name)
	if err != nil || r.Attached == nil {
		return
	}
	// What is still under way could come after all. Then the watch tries it again.
	if a.orders.Load() > 0 {
		return
	}
	ours := r.Attached.PID == os.Getpid() || d.opts.Prober != nil && r.Attached.PID == d.opts.Prober.PID()
	for until := time.Now().Add(settleLimit); !ours && !processEnded(r.Attached.PID, r.Attached.Process); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) || ctx.Err() != nil {
			return
		}
	}
	_, err = d.clearTable(ctx, a, dev.ublk.Num)
	if err == nil {
		_, err = d.order(ctx, a, dm.Order{Step: dm.StepResume, Device: a.device})
	}
	if errors.Is(err, unix.EBUSY) {
		return // another program is not done with it: the watch tries it again
	}
	if err != nil && !errors.Is(err, unix.ENXIO) {
		d.opts.Log.Error("a table that waits cannot be cleared", "name", dev.Name, "error", err)
		return
	}
	state, err := d.tableState(a, dev.ublk.Num)
	switch {
	case err != nil:
		d.opts.Log.Error("it is not known whether requests come to a filter", "name", dev.Name, "error", err)
		return
	case state == tableOurs:
		a.changing.Store(false)
		if err := d.changeAttachRecord(dev, false); err != nil {
			d.opts.Log.Error("not all of a device is on record", "name", dev.Name, "error", err)
		}
		return
	}
	ended, err := d.endHolders(dev)
	if err == nil && !ended {
		return
	}
	if err == nil {
		d.opts.Log.Warn("what a dead daemon began to attach or to detach is removed", "name", dev.Name, "disk", dev.Original)
		err = d.takeDown(dev, false)
	}
	if err != nil {
		d.leaveAlone(dev)
		d.opts.Log.Error("cannot remove it", "name", dev.Name, "error", err)
	}
}

// endHolders ends the snapshots that hold a device, and says whether they have ended. It does not
// wait for their storage, because everybody else would: when they have, the watch comes again;
// needs opLock.
func (d *Daemon) endHolders(dev *device) (ended bool, err error) {
	for _, s := range d.sortedSnapshots() {
		if !d.holds(s, dev) {
			continue
		}
		d.tellBroken(s, dev)
		if err := d.startDestroy(s); err != nil {
			return false, snapshotError(err, "destroy snapshot %s", s.id)
		}
	}
	return len(d.holders(dev)) == 0, nil
}

// leaveAlone keeps the watch from a device for a while of which something took too long, because
// everybody else waits meanwhile.
func (d *Daemon) leaveAlone(dev *device) {
	dev.attached.again.Store(time.Now().Add(10 * d.opts.Config.DiskTimeout).UnixNano())
}

// attachAnew removes a filter that is passed by, and attaches another if its device is there;
// needs opLock. While another program has more to change, as LVM has in the midst of some
// commands and for all of a pvmove, and until these have ended, only the snapshots end: the watch
// comes again.
func (d *Daemon) attachAnew(ctx context.Context, dev *device) {
	why := *dev.attached.bypassed.Load()
	ended, err := d.endHolders(dev)
	if err == nil && (!ended || d.tableWaits(dev.attached)) {
		return
	}
	if err == nil {
		err = d.takeDown(dev, false)
	}
	if err != nil {
		d.leaveAlone(dev)
		d.opts.Log.Error("a filter that is passed by cannot be removed yet", "name", dev.Name, "error", err)
		return
	}
	if state, err := d.tableState(dev.attached, dev.ublk.Num); err != nil || state == tableGone || d.ending.begun.Load() {
		d.tellRemoved(dev, "its volume is gone")
		return
	}
	logged := dev.intent != nil
	r := control.AddRequest{Path: dev.attached.public.Node, Name: dev.Name, Queues: dev.Queues, Depth: dev.Depth, Mode: dev.Mode, Attach: control.AttachAlways, IntentLog: &logged}
	_, err = d.add(ctx, r)
	for until := time.Now().Add(settleLimit); errors.Is(err, unix.EAGAIN) && time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		_, err = d.add(ctx, r)
	}
	if err != nil {
		d.opts.Log.Error("a device has no filter any more, because it could not be attached anew", "name", dev.Name, "disk", dev.Original, "reason", why, "error", err)
		d.tellRemoved(dev, why+", and it could not be attached anew: "+publicPaths(err.Error()))
		return
	}
	d.attachedAnew.Add(1)
	d.opts.Log.Warn("attached anew", "name", dev.Name, "disk", dev.Original, "reason", why)
}

// tellRemoved tells of a filter that was removed though nobody asked for it.
func (d *Daemon) tellRemoved(dev *device, why string) {
	d.opts.Log.Warn("a filter was removed by itself", "name", dev.Name, "disk", dev.Original, "reason", why)
	d.events.notice(control.Event{Kind: control.EventRemoved, Device: dev.OriginalNumber, Text: fmt.Sprintf("%s: %s", dev.Name, why)})
}

// tableWaits says whether another program is in the midst of changing the table of a device.
func (d *Daemon) tableWaits(a *attachment) bool {
	c, err := dm.Open()
	if err != nil {
		return false
	}
	defer c.Close()
	i, err := c.Info(a.device)
	return err == nil && d.changing(a.public, i) != ""
}
