package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// checkUnused refuses a snapshot of which an image is in use. A passer-by, as udev is when it
// looks at a new device, is waited for.
func (d *Daemon) checkUnused(ctx context.Context, s *snapshot) error {
	var nums []disk.Num
	for _, im := range s.images {
		if im.ublk != nil {
			nums = append(nums, im.ublk.Num)
		}
	}
	d.awaitClosed(ctx, nums)
	err := d.imageUser(ctx, s)
	if err == nil {
		return nil
	}
	e := *errorOf(err)
	e.Fix += ", or let its I/O fail: ublk-blksnap snapshot destroy --force " + cmp.Or(s.note.Name, s.id)
	return &e
}

// imageUser says who uses an image of the snapshot; nil if nobody does. It needs opLock.
// Who begins to use one from then on is not noticed.
func (d *Daemon) imageUser(ctx context.Context, s *snapshot) error {
	for _, im := range s.images {
		if im.ublk == nil {
			continue
		}
		if err := d.userOf(ctx, im); err != nil {
			return fail(err, "the image of %s", im.device.Name)
		}
	}
	return nil
}

func (d *Daemon) userOf(ctx context.Context, im *image) error {
	bdev, err := d.host.ByNumber(im.ublk.Num)
	if err != nil {
		return nil //nolint:nilerr // there is no disk any more
	}
	bdev.Path = im.ublk.Path
	if err := d.host.CheckFree(bdev); errors.Is(err, disk.ErrInUse) {
		return err
	}
	inUse := func(by, fix string) error {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: by, Fix: fix}
	}
	if who := d.openedBy(im.ublk.Num); who != "" {
		return inUse("opened by "+who, "end that process first")
	}
	// Some users nobody can see, as a mount that was detached (umount -l). But nobody else
	// can claim the disk then. If it does not answer, or cannot be written to, that is not
	// because of a user.
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	if err := im.ublk.Sync(ctx); errors.Is(err, ublk.ErrBusy) {
		return inUse(fmt.Sprintf("%s is in use", im.ublk.Path), "find the user first: fuser -vm "+im.ublk.Path)
	}
	return nil
}
