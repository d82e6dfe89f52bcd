package daemon

import (
	"context"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// diskWatchInterval is how often the daemon looks whether a disk with a filter is there, and
// how large it is.
const diskWatchInterval = time.Second

// watchDisks looks at the originals until ctx ends. It asks the kernel for numbers only, which
// waits for no disk.
func (d *Daemon) watchDisks(ctx context.Context) {
	disks := map[*device]*watched{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(diskWatchInterval):
		}
		before := disks
		disks = map[*device]*watched{}
		for _, dev := range d.sortedDevices() {
			if disks[dev] = before[dev]; disks[dev] == nil {
				disks[dev] = &watched{}
			}
			d.watchDisk(ctx, dev, disks[dev])
		}
	}
}

func (d *Daemon) watchDisk(ctx context.Context, dev *device, w *watched) {
	now := d.diskNow(dev)
	if now == nil {
		if w.missed++; w.missed >= lookMissed {
			d.letGoOfGone(ctx, dev, w)
		}
		return
	}
	w.missed = 0
	if d.host.ToBeDetached(now) {
		d.letGoOfDetached(ctx, dev, w)
	}
	shown := d.describe(dev)
	switch {
	case shown.OriginalSize == now.Size && shown.Size > now.Size: // shrunk, and told
		return
	case shown.OriginalSize == now.Size && (!d.canGrow || time.Now().Before(w.growAgain)):
		return
	case shown.OriginalSize == 0 && shown.Size == now.Size && shown.Attention != attentionGone && !d.driverIsBehind(dev):
		return
	}
	end, err := d.begin(ctx, "follow the size of %s", dev.Original)
	if err != nil {
		return
	}
	defer end()
	if d.deviceNamed(dev.Name) != dev || dev.removing {
		return
	}
	// While this waited for its turn the disk may have got another size once more.
	if now = d.diskNow(dev); now != nil && d.followSize(ctx, dev, now.Size) != nil {
		w.growAgain = time.Now().Add(10 * d.opts.Config.DiskTimeout)
	}
}

// diskNow is the disk of a filter as it is now, nil if it is gone.
func (d *Daemon) diskNow(dev *device) *disk.Disk {
	now, err := d.host.ByNumber(dev.disk.Num)
	if err != nil || now.Sequence != dev.disk.Sequence || now.Size == 0 {
		return nil
	}
	return now
}

// driverIsBehind says whether the driver has not been told yet that a filter has grown.
func (d *Daemon) driverIsBehind(dev *device) bool {
	bdev, err := d.host.ByNumber(dev.ublk.Num)
	return err == nil && bdev.Size < d.sizeOf(dev)
}

func (d *Daemon) sizeOf(dev *device) int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return dev.Size
}
