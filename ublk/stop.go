package ublk

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// The end of a device has three steps: the driver takes the disk away and aborts
// every tag, the queues' rings end, and the driver deletes the device. TryStop does
// the first two if nobody uses the disk. Delete does those of the three that are left.

// stop takes the disk away and ends the queues; see Delete.
func (d *Device) stop(ctx context.Context) error {
	if d.stopped {
		return nil
	}
	d.ending = true
	if err := d.ctl.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, d.ID, 0); err != nil {
		return err
	}
	return d.endQueues(ctx)
}

// endQueues waits for the end of the rings. The kernel has aborted all tags.
func (d *Device) endQueues(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		for _, q := range d.queues {
			q.ring.Stop()
		}
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		return fmt.Errorf("end the queues of ublk device %d: %w", d.ID, ctx.Err())
	}
	d.stopped = true
	return nil
}

// Ending says whether the driver was told to take the disk away. The disk may serve
// nobody any more then. It must not be called beside a method that stops the device.
func (d *Device) Ending() bool { return d.ending }

// TryStop takes the disk away and ends the queues if nobody uses the disk. Otherwise
// it fails with ErrBusy. When it returns, all that was written to the disk has gone to
// the handlers and is synced. If ctx ends during the sync, nothing has changed. If it
// ends later, see Ending.
//
// Before Linux 7.0 the driver cannot do that in one step. Then TryStop claims the disk
// first, so that nobody can mount it or put a device on it until it is gone. But it
// does not notice a process that opens the disk in the few milliseconds between its
// look at the openers and the end. Such a process gets errors.
func (d *Device) TryStop(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil
	}
	if d.ctl.Has(uapi.UBLK_F_SAFE_STOP_DEV) {
		if err := d.claim(ctx, func(func() bool) error { return nil }); err != nil {
			return err
		}
		d.ending = true
		err := d.ctl.command(ctx, uapi.UBLK_U_CMD_TRY_STOP_DEV, d.ID, 0)
		if errors.Is(err, unix.EBUSY) {
			d.ending = false
			return d.busy()
		}
		if err != nil {
			return err
		}
		return d.endQueues(ctx)
	}
	return d.claim(ctx, func(held func() bool) error {
		if err := d.checkOpeners(); err != nil {
			return err
		}
		if !held() { // who held it for us may have been killed
			return d.busy()
		}
		return d.stop(ctx)
	})
}

// Sync sends what was written to the disk to the handlers, if nobody has claimed the
// disk. Otherwise it fails with ErrBusy. A TryStop that follows need not wait long. From
// the first sync that fails on, also one that ctx did not wait for, Sync and TryStop fail
// with ErrUnsynced, because the kernel says only once what it could not write, and drops it.
func (d *Device) Sync(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil
	}
	return d.claim(ctx, func(func() bool) error { return nil })
}

// claim syncs the disk and runs f while nobody else can claim it, of which f can make sure
// with held.
//
// The sync takes as long as the disk below it needs. If ctx ends before that, the sync
// goes on and keeps the disk claimed until its end. The next claim waits for that.
func (d *Device) claim(ctx context.Context, f func(held func() bool) error) error {
	timedOut := func() error { return fmt.Errorf("sync %s: %w", d.Path, ctx.Err()) }
	select {
	case <-d.claims:
	case <-ctx.Done():
		return timedOut()
	}
	ended := make(chan struct{})
	d.claims = ended
	type claim struct {
		Claimant
		err error
	}
	c, err := bounded.Call(ctx, func() (c claim) {
		if c.Claimant, c.err = d.claimDisk(d.Path); errors.Is(c.err, ErrUnsynced) {
			d.unsynced.CompareAndSwap(nil, &c.err)
		}
		return c
	}, func(c claim) {
		if c.err == nil {
			c.Release()
		}
		close(ended)
	})
	if err != nil {
		return timedOut()
	}
	close(ended)
	switch {
	case errors.Is(c.err, unix.EBUSY):
		return d.busy()
	case d.unsynced.Load() != nil:
		return fmt.Errorf("sync %s: %w", d.Path, *d.unsynced.Load())
	case errors.Is(c.err, unix.ENXIO), errors.Is(c.err, unix.ENODEV), errors.Is(c.err, unix.ENOENT):
		return f(func() bool { return true }) // there is no disk any more
	case c.err != nil:
		return fmt.Errorf("claim %s: %w", d.Path, c.err)
	}
	defer c.Release()
	if c.Held == nil {
		c.Held = func() bool { return true }
	}
	return f(c.Held)
}

// ClaimDisk is a Config.Claim that does it in this process.
func ClaimDisk(path string) (Claimant, error) {
	f, err := blockdev.OpenSynced(path)
	if err != nil {
		return Claimant{}, err
	}
	return Claimant{Release: func() { _ = f.Close() }}, nil
}

// busy is ErrBusy. It names a process that has the disk open, if there is one.
func (d *Device) busy() error {
	if err := d.checkOpeners(); err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", d.Path, ErrBusy)
}

// checkOpeners fails with ErrBusy if a process has the disk or one of its partitions
// open.
func (d *Device) checkOpeners() error {
	if d.openedBy == nil {
		return nil
	}
	if who := d.openedBy(d.Num); who != "" {
		return fmt.Errorf("%s: %w: opened by %s", d.Path, ErrBusy, who)
	}
	return nil
}

// Delete stops the device if need be, and removes it. When Delete returns, the
// device's number is free again. If somebody still has the disk open, his requests
// fail, and the number is free when he closes it.
//
// The kernel first writes back what the disk's page cache holds. But on a device with
// recovery it lets those writes fail. So call TryStop first, or sync the disk and see
// to it that nobody writes. Delete waits for the requests in the handlers' hands. If
// ctx ends before these are done, the device is neither alive nor deleted, and Delete
// may be called again.
func (d *Device) Delete(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.deleted {
		return nil
	}
	// The device is stopped even if it was never started, because that aborts what has
	// been fetched.
	if err := d.stop(ctx); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	// The device is closed here first, because the deletion waits for the last one who
	// has it open.
	d.release()
	if err := d.ctl.deleteDevice(ctx, d.ID); err != nil {
		return err
	}
	d.deleted = true
	return nil
}

// DeleteDevice removes a device that nobody serves, for example one whose server has
// died. It refuses a device that is alive.
func (c *Control) DeleteDevice(ctx context.Context, id int) error {
	info, err := c.SettledInfo(ctx, id)
	if err != nil {
		return err
	}
	if info.State == Live {
		return fmt.Errorf("delete ublk device %d: %w: served by process %d", id, ErrBusy, info.PID)
	}
	if err := c.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, id, 0); err != nil {
		return err
	}
	return c.deleteDevice(ctx, id)
}

// deleteDevice deletes the device and waits for some time until its number is free.
func (c *Control) deleteDevice(ctx context.Context, id int) error {
	err := c.command(ctx, uapi.UBLK_U_CMD_DEL_DEV_ASYNC, id, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		// Before Linux 6.9 there is only a command that waits for the last user. Even if
		// it takes longer than this function waits, the device goes.
		limited, cancel := context.WithTimeout(ctx, lastCloseTimeout)
		defer cancel()
		err = c.command(limited, uapi.UBLK_U_CMD_DEL_DEV, id, 0)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = nil
		}
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, lastCloseTimeout)
	defer cancel()
	for {
		if _, err := c.Info(limited, id); errors.Is(err, unix.ENODEV) {
			return nil
		}
		if sleep(limited, pollInterval) != nil {
			return nil
		}
	}
}
