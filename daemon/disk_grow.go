package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// An original that has grown has its filter grow, under its users. The change map is for the
// new size before the driver lets anybody write beyond the old one:
//
//	record: new size, and from which ── the old log counts no more ── gate closed: map and filter
//	have the new size, in a new generation ── the driver's disk grows ── a new log ── record: done
//
// Whoever dies in between has left a record of the new size. The next daemon makes the map for
// it if there is none, and the driver's disk grows when the daemon looks at it (watchDisks).
// After a power failure what is kept of the old size is not believed, because the disk has
// another one. Snapshots keep the size that the disk had.

// grow makes the filter of a disk that has grown as large as that; needs opLock.
func (d *Daemon) grow(ctx context.Context, dev *device, size int64) error {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	from := dev.geo.Size
	if from < size {
		if err := d.growMap(ctx, dev, size); err != nil {
			return err
		}
	}
	deathpoint.Point()
	err := dev.ublk.UpdateSize(ctx, dev.geo.Size)
	deathpoint.Point()
	if from < size { // the log begins also if the driver will have to be asked again
		if dev.intent != nil {
			dev.intent.begin(ctx, true)
			d.takenOver(dev)
		}
		deathpoint.Point()
		text := grownText(from, size)
		d.tellGeneration(dev, "", control.History{Reason: control.HistoryOtherSize, Text: text})
		if r, err := d.readDeviceRecord(dev.Name); err == nil {
			r.GrownFrom = 0
			d.changeDeviceRecord(r)
		}
		d.events.notice(control.Event{Kind: control.EventGrown, Device: dev.OriginalNumber, Text: text})
		d.opts.Log.Info("the filter has grown with its disk", "name", dev.Name, "disk", dev.Original, "from", from, "size", size)
	}
	return err
}

func grownText(from, size int64) string {
	return fmt.Sprintf("the disk has grown from %d to %d bytes", from, size)
}

// growMap makes the change map and the filter ones for size bytes.
func (d *Daemon) growMap(ctx context.Context, dev *device, size int64) (err error) {
	r, err := d.readDeviceRecord(dev.Name)
	if err != nil {
		return err
	}
	n, err := cbtmap.MemorySize(size, d.opts.Config.CBTParams())
	if err == nil {
		err = snapshots.CheckSpace(d.cbtDir(), n)
	}
	if err != nil {
		return fmt.Errorf("make the change map: %w", err)
	}
	next, err := dev.cbt.Prepare(size)
	if err != nil {
		return err
	}
	old := r
	r.Geometry.Size, r.GrownFrom = size, dev.geo.Size
	if err := d.writeDeviceRecord(r); err != nil {
		next.Discard()
		return err
	}
	deathpoint.Point()
	// Nothing may be believed of the old log once writes do not go there any more.
	d.stopHistory(dev)
	if dev.intent != nil {
		dev.intent.mu.Lock()
		dev.intent.reason = "the disk has grown, and its log has to begin anew"
		dev.intent.mu.Unlock()
	}
	deathpoint.Point()
	var in *intent
	var log *intentlog.Log
	uncovered := dev.uncovered
	if dev.intent != nil {
		in, err = d.newIntent(dev, dev.Name, r.zone(), size)
		if err == nil && !slices.Equal(in.identity, r.Identity) { // a volume has got another disk
			r.Identity = in.identity
			if err = d.writeDeviceRecord(r); err != nil {
				in.free()
			}
			deathpoint.Point()
		}
		if err != nil {
			in, uncovered = nil, publicPaths(err.Error())
			d.opts.Log.Warn("a power failure will cost the history of changes", "name", dev.Name, "reason", uncovered)
		} else {
			log = in.log
		}
	}
	if err := d.swapMap(ctx, dev, next, size, log); err != nil {
		next.Discard()
		if in != nil {
			in.free()
		}
		d.changeDeviceRecord(old)
		return err
	}
	dev.use.Lock()
	d.mu.Lock()
	dev.geo.Size, dev.Size = size, size
	dev.intent, dev.uncovered = in, uncovered
	d.mu.Unlock()
	dev.use.Unlock()
	return nil
}

// swapMap puts the new map in the place of the old one while no write is under way.
func (d *Daemon) swapMap(ctx context.Context, dev *device, next *cbtmap.Next, size int64, log *intentlog.Log) error {
	var failed error
	done := make(chan bool, 1)
	cut := filter.StartCut([]*filter.Filter{dev.filter}, nil, func() {
		deathpoint.Point()
		if failed = dev.cbt.Replace(next); failed != nil {
			return
		}
		if log != nil {
			log.Follow(dev.cbt)
		}
		dev.filter.Grow(size, log)
		deathpoint.Point()
	}, func(ok bool) { done <- ok })
	limited, cancel := context.WithTimeout(ctx, d.opts.Config.FreezeTimeout)
	defer cancel()
	select {
	case ok := <-done:
		return swapped(ok, failed)
	case <-limited.Done():
		cut.Cancel()
		return swapped(<-done, failed)
	}
}

func swapped(ok bool, failed error) error {
	if !ok {
		return &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: "writes in flight did not end in time"}
	}
	return failed
}

// followSize has a filter follow the size of its original: it grows, or what keeps it from
// that is told, once. The error is why it could not, but might later; needs opLock.
func (d *Daemon) followSize(ctx context.Context, dev *device, size int64) (failed error) {
	var attention, event string
	level := d.opts.Log.Warn
	switch err := d.tryFollow(ctx, dev, size); {
	case err == nil:
	case errors.Is(err, errShrunk):
		event = control.EventShrunk
		attention = fmt.Sprintf("the disk has shrunk to %d bytes: I/O beyond its end fails; if that is to stay, remove the filter and add it again", size)
	case errors.Is(err, errCannotGrow):
		event = control.EventGrown
		attention = fmt.Sprintf("the disk has grown to %d bytes, and the filter cannot grow on this kernel (Linux 6.16 or newer can): to use the rest, remove the filter and add it again", size)
	default:
		level, failed = d.opts.Log.Error, err
		attention = fmt.Sprintf("the disk has grown to %d bytes, and the filter has not yet: %v", size, publicPaths(err.Error()))
	}
	known := size
	if attention == "" {
		known = 0
	}
	d.mu.Lock()
	again := dev.Attention == attention
	dev.OriginalSize, dev.Attention = known, attention
	d.mu.Unlock()
	if again || attention == "" {
		return failed
	}
	level("a disk has another size than its filter", "name", dev.Name, "disk", dev.Original, "filter", dev.geo.Size, "size", size, "attention", attention)
	if event != "" {
		d.events.notice(control.Event{Kind: event, Device: dev.OriginalNumber, Text: attention})
	}
	return failed
}

var (
	errShrunk     = errors.New("the disk has shrunk")
	errCannotGrow = errors.New("the filter cannot grow")
)

func (d *Daemon) tryFollow(ctx context.Context, dev *device, size int64) error {
	switch {
	case size < dev.geo.Size:
		return errShrunk
	case size == dev.geo.Size && !d.driverIsBehind(dev):
		return nil
	case !d.canGrow:
		return errCannotGrow
	}
	return d.grow(ctx, dev, size)
}
