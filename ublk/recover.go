package ublk

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Taking over a device whose server has died, or has given it up by Quiesce.
//
// The daemon does not do it yet: it makes devices with recovery only if asked to,
// and the next daemon leaves those waiting until they are removed by force. Taking
// over after the daemon's death will call Recover and Quiesce; until then tests do.

// Recover takes over device id, whose server has died or quiesced it: the
// requests that wait are served next. The device keeps its number, shape and
// content; of cfg only Name, Files, Slots, OpenedBy and NewHandler are used. It
// waits until the kernel has seen the last of the old server, or ctx ends. An
// error leaves the device to a further attempt.
//
// Before Linux 6.15 the driver does not clean up after a server that dies in
// the middle of this (some milliseconds): such a device can only be deleted.
// So once begun, it is not given up when ctx ends.
func Recover(ctx context.Context, ctl *Control, id int, cfg Config) (*Device, error) {
	if cfg.NewHandler == nil {
		return nil, errors.New("recover ublk device: no handler")
	}
	info, err := ctl.Info(ctx, id)
	if err != nil {
		return nil, err
	}
	if info.Flags&uapi.UBLK_F_USER_RECOVERY == 0 {
		return nil, fmt.Errorf("recover ublk device %d: it was made without recovery", id)
	}
	begun, err := ctl.beginRecovery(ctx, id)
	if err != nil {
		return nil, err
	}
	d := newDevice(ctl, &cfg, info)
	started, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := d.serve(started, uapi.UBLK_U_CMD_END_USER_RECOVERY); err != nil {
		d.abandon()
		if begun && errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: an earlier recovery was cut short, and this kernel cannot go on with it: delete the device", err)
		}
		return nil, err
	}
	return d, nil
}

// beginRecovery makes the driver ready for a new server. begun says that an
// earlier recovery had come this far.
func (c *Control) beginRecovery(ctx context.Context, id int) (begun bool, err error) {
	for {
		err := c.command(ctx, uapi.UBLK_U_CMD_START_USER_RECOVERY, id, 0)
		switch {
		case err == nil:
			return false, nil
		case errors.Is(err, unix.EINVAL) && !c.Has(uapi.UBLK_F_AUTO_BUF_REG):
			// An old driver has no queue to take from a dead server: it did
			// that before, and no queue was fetched since.
			return true, nil
		case !errors.Is(err, unix.EBUSY), sleep(ctx, pollInterval) != nil:
			return false, err
		}
	}
}

// abandon gives the device up as it is: the kernel cancels what was fetched.
func (d *Device) abandon() {
	for _, q := range d.queues {
		q.ring.Abandon()
	}
	d.release()
	d.stopped, d.deleted = true, true
}

// Quiesce gives the device up without taking the disk away: it waits until
// every request in the handlers' hands is done, ends the queues and closes the
// device. Requests wait until a server calls Recover. Only for a device with
// recovery, where the driver can do it. An error leaves the device served, as
// far as it is.
func (d *Device) Quiesce(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.Flags&uapi.UBLK_F_QUIESCE == 0 {
		return fmt.Errorf("quiesce device %d: %w", d.ID, unsupported(uapi.UBLK_F_QUIESCE))
	}
	if d.stopped {
		return fmt.Errorf("quiesce device %d: it is stopped", d.ID)
	}
	ms := uint64(math.MaxUint32)
	if end, ok := ctx.Deadline(); ok {
		ms = uint64(max(time.Until(end).Milliseconds(), 1))
	}
	ended := make(chan struct{})
	go func() {
		for _, q := range d.queues {
			q.ring.Stop()
		}
		close(ended)
	}()
	for {
		// It aborts the tags that wait for a request. Those in a handler's
		// hands wait for one after their commit: the next round aborts them.
		if err := d.ctl.command(ctx, uapi.UBLK_U_CMD_QUIESCE_DEV, d.ID, ms); err != nil {
			return err
		}
		select {
		case <-ended:
			d.stopped = true
			d.release()
			d.deleted = true // it is not ours any more
			return nil
		case <-ctx.Done():
			return fmt.Errorf("quiesce device %d: %w", d.ID, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}
