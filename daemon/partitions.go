package daemon

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// A filter shows the partitions of its disk. The kernel finds them in the table, beside all
// else since Linux 7.0. Before, it would read the table within the command that starts the
// filter: a daemon that is killed then does not end before the filter is served, and the
// filter is not served before it ends. There the filter is started without, and gets the
// partitions that the kernel knows of the disk.

// addPartitions does that, once for each filter: later they are its users' to change. The
// record says whether it has been done.
func (d *Daemon) addPartitions(ctx context.Context, dev *device) error {
	r, err := d.readDeviceRecord(dev.Name)
	if err != nil || !r.Unpartitioned {
		return err
	}
	bdev, err := d.host.ByNumber(dev.ublk.Num)
	if err != nil {
		return err
	}
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	table := d.host.PartitionTable(dev.disk)
	if d.opts.Prober != nil {
		err = d.opts.Prober.AddPartitions(ctx, bdev, table)
	} else {
		err = disk.AddPartitions(bdev, table)
	}
	deathpoint.Point()
	if err == nil && !d.host.SamePartitions(bdev, dev.disk) {
		d.opts.Log.Warn("a filter shows some of its disk's partitions only: the kernel takes none that overlap, or end beyond the disk", "name", dev.Name, "disk", dev.Original)
	}
	r.Unpartitioned = false
	d.changeDeviceRecord(r)
	return err
}

// rereadPartitions has the kernel read the table of a disk that has no filter any more.
func rereadPartitions(bdev *disk.Disk) error {
	if bdev.Parent != "" {
		return nil
	}
	f, err := os.OpenFile(bdev.Node, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	return unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
}

// comparePartitions notes whether the kernel has to read the partitions of the
// original again when the filter device is gone; needs opLock. Where it does not read those
// of the filter, nobody knows whether the table has changed.
func (d *Daemon) comparePartitions(dev *device) {
	if bdev, err := d.host.ByNumber(dev.ublk.Num); err == nil && dev.disk.Parent == "" {
		dev.repartitioned = d.ctl.ScansInStart() || !d.host.SamePartitions(bdev, dev.disk)
	}
}
