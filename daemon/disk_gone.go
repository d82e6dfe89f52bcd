package daemon

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A disk may be pulled out under its filter: the kernel takes it away although it is open. Or
// its owner asks for it and has to wait until it is closed: a loop device that is to be detached.
// Most drivers do neither. As long as a disk is open, zram refuses to remove or to reset it,
// device-mapper and md refuse to end it, and no driver can be unloaded.
//
// The filter of a disk that is gone gives errors. When nobody uses it any more, nor an image
// of its snapshots, these end, and it goes.

// lookMissed is how many times in a row a disk has to be missing.
const lookMissed = 2

// watched is what watchDisks knows of a disk.
type watched struct {
	missed int       // how often it was missing in a row
	again  time.Time // when its filter may be tried to be removed again
	// growAgain is when its filter may be tried to grow again, to the same size: each time
	// writes wait until those in flight have ended, or do not in time.
	growAgain time.Time
}

// attentionGone is what is said of the filter of a disk that is gone.
const attentionGone = "its disk is gone: all I/O that needs the disk fails; the filter goes when nobody uses it"

// letGoOfGone takes a filter away whose disk is gone, unless somebody uses it.
func (d *Daemon) letGoOfGone(ctx context.Context, dev *device, w *watched) {
	if d.describe(dev).Attention != attentionGone {
		d.mu.Lock()
		dev.Attention, dev.OriginalSize = attentionGone, 0
		d.mu.Unlock()
		d.opts.Log.Error("the disk of a filter is gone", "name", dev.Name, "disk", dev.Original)
		d.events.notice(control.Event{Kind: control.EventGone, Device: dev.OriginalNumber, Text: fmt.Sprintf("%s: %s", dev.Name, attentionGone)})
	}
	if d.checkUsers(dev) != nil {
		return
	}
	d.letGo(ctx, dev, w, "its disk is gone", func() error {
		if d.diskNow(dev) != nil {
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "its disk is back"}
		}
		if err := d.checkUsers(dev); err != nil {
			return err
		}
		for _, s := range d.sortedSnapshots() {
			if d.holds(s, dev) {
				if err := d.imageUser(ctx, s); err != nil {
					return err
				}
			}
		}
		return d.removeForced(dev)
	})
}

// letGoOfDetached takes a filter away whose loop device is to be detached, unless somebody uses
// it or a snapshot holds it.
func (d *Daemon) letGoOfDetached(ctx context.Context, dev *device, w *watched) {
	if len(d.holders(dev)) > 0 || d.checkUsers(dev) != nil {
		return
	}
	d.letGo(ctx, dev, w, "its loop device was to be detached", func() error {
		if now := d.diskNow(dev); now == nil || !d.host.ToBeDetached(now) {
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "it is not to be detached any more"}
		}
		if err := d.checkIdle(dev); err != nil {
			return err
		}
		return d.removeIdle(context.WithoutCancel(ctx), dev)
	})
}

// letGo removes a filter by itself. remove looks again at what made it go, because much may have
// changed before its turn comes. If that takes too long, it is left alone for a while, because
// everybody else waits meanwhile.
func (d *Daemon) letGo(ctx context.Context, dev *device, w *watched, why string, remove func() error) {
	if time.Now().Before(w.again) {
		return
	}
	end, err := d.begin(ctx, "let go of %s", dev.Name)
	if err != nil {
		return
	}
	defer end()
	if d.deviceNamed(dev.Name) != dev {
		return
	}
	if err := remove(); err != nil {
		if control.CodeOf(fail(err, "let go")) != control.Busy {
			w.again = time.Now().Add(10 * d.opts.Config.DiskTimeout)
		}
		d.opts.Log.Debug("a filter cannot be let go of yet", "name", dev.Name, "error", err)
		return
	}
	d.tellRemoved(dev, why)
}
