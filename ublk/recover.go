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
//	Claim ──> Claimed ── Prepare ──> Device ── Resume ──> served
//	           │                       │
//	           └──── any further attempt, of this process or the next
//
// A server of several devices claims all of them before it resumes any: a claim
// succeeds only when everything has ended that the dead server's queues of that
// device had begun, on whatever disk.

// Claimed is a device that waits for its next server, which is to be this process.
type Claimed struct {
	Info
	ctl *Control
}

// Claim waits until the kernel has seen the last of the old server of device id, or
// ctx ends, and makes the driver ready for a new one. ErrDead if the device has been
// stopped, or was never started: it is only to be deleted then.
func Claim(ctx context.Context, ctl *Control, id int) (*Claimed, error) {
	info, err := ctl.Info(ctx, id)
	if err != nil {
		return nil, err
	}
	if info.Flags&uapi.UBLK_F_USER_RECOVERY == 0 {
		return nil, fmt.Errorf("recover ublk device %d: it was made without recovery", id)
	}
	if info.State == Dead {
		return nil, fmt.Errorf("recover ublk device %d: %w", id, ErrDead)
	}
	if err := ctl.beginRecovery(ctx, info); err != nil {
		return nil, err
	}
	return &Claimed{Info: info, ctl: ctl}, nil
}

// Prepare makes all that serving the device needs. Nothing is served yet: the
// device is to be resumed, or abandoned. It keeps its number, shape and content; of
// cfg only Name, Files, Slots, OpenedBy, Claim and NewHandler are used.
func (c *Claimed) Prepare(ctx context.Context, cfg Config) (*Device, error) {
	if cfg.NewHandler == nil {
		return nil, errors.New("recover ublk device: no handler")
	}
	d := newDevice(c.ctl, &cfg, c.Info)
	err := d.readNumber(ctx)
	if err == nil {
		err = d.prepare(ctx)
	}
	if err != nil {
		d.Abandon()
		return nil, err
	}
	return d, nil
}

// Resume serves a prepared device: the requests that wait come first. An error
// leaves the device to a further attempt, which begins with Claim. Once begun, it is not
// given up when ctx ends, because nothing in it waits for a disk.
//
// After an error the queues' threads still run, so that whoever waits for a task of
// theirs gets it done; the device is to be abandoned, or deleted.
func (d *Device) Resume(ctx context.Context) error {
	started, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	d.ctl.setBegun(d.ID, true)
	err := d.begin(started, uapi.UBLK_U_CMD_END_USER_RECOVERY)
	if err == nil {
		d.ctl.setBegun(d.ID, false)
	}
	return err
}

// ErrDead: the device has been stopped, or was never started.
var ErrDead = errors.New("it has no disk")

// beginRecovery makes the driver ready for a new server.
//
// Drivers that do not clean up after a dead server by themselves, those before Linux 6.15,
// count on that he had fetched every queue. If he died while he took the device over himself,
// that is not so: they refuse (EINVAL) if no queue is fetched, and crash if some are. See
// fetchRest.
func (c *Control) beginRecovery(ctx context.Context, info Info) error {
	old := !c.Has(uapi.UBLK_F_AUTO_BUF_REG)
	fetched := !old || !cancelsFetches() // what there is to fetch
	fetch := info.Queues > 1             // before the driver has refused
	for {
		var err error
		if fetch && !fetched {
			err = fetchRest(ctx, info, c.hasBegun(info.ID))
			fetched = err == nil
		}
		refused := false
		if err == nil {
			err = c.command(ctx, uapi.UBLK_U_CMD_START_USER_RECOVERY, info.ID, 0)
			refused = old && errors.Is(err, unix.EINVAL)
		}
		if err == nil {
			c.setBegun(info.ID, false)
			return nil
		}
		if !refused && !errors.Is(err, unix.EBUSY) {
			return err
		}
		// The old server may have been stopping it, which the kernel goes on with; or it
		// died before the disk was there.
		now, infoErr := c.Info(ctx, info.ID)
		switch {
		case infoErr != nil:
			return infoErr
		case now.State == Dead:
			return fmt.Errorf("recover ublk device %d: %w", info.ID, ErrDead)
		case refused && fetched:
			return nil // nothing is fetched, and nothing is in the way of whoever does
		case refused:
			fetch = true
		case sleep(ctx, pollInterval) != nil:
			return err
		}
	}
}

// Abandon gives up a device that was prepared and not resumed, as it is. The kernel
// cancels what was fetched.
func (d *Device) Abandon() {
	for _, q := range d.queues {
		q.ring.Abandon()
	}
	d.release()
	d.stopped, d.deleted = true, true
}

// GiveUp is Quiesce where the driver can do it, for a device with recovery, and says whether
// that was done. Elsewhere it does nothing: the end of the process, or an exec, gives the
// device up.
func (d *Device) GiveUp(ctx context.Context) (quiesced bool, err error) {
	if d.Flags&uapi.UBLK_F_QUIESCE == 0 || d.Flags&uapi.UBLK_F_USER_RECOVERY == 0 {
		return false, nil
	}
	err = d.Quiesce(ctx)
	return err == nil, err
}

// Quiesce gives the device up without taking the disk away. It waits until every
// request in the handlers' hands is done, ends the queues and closes the device.
// Requests wait until a server claims the device. The device must have recovery, and the
// driver must know how to quiesce. After an error the queues that have not ended still
// serve the device.
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
		// The command aborts the tags that wait for a request. A tag in a handler's hands
		// waits for a request after its commit, and the next round aborts it.
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
