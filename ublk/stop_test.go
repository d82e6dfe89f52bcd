package ublk

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// TestSyncFails: a sync that fails is not taken for a disk that is gone or in use, whatever
// the number of its error is, and is told from then on, even if nobody waited for it.
func TestSyncFails(t *testing.T) {
	ctx := context.Background()
	device := func(claim func(string) (Claimant, error)) *Device {
		return newDevice(nil, &Config{Claim: claim}, Info{})
	}
	free := func(string) (Claimant, error) { return Claimant{Release: func() {}}, nil }
	began := func(d *Device) (yes bool, err error) {
		err = d.claim(ctx, func(func() bool) error { yes = true; return nil })
		return yes, err
	}
	for _, errno := range []unix.Errno{unix.ENXIO, unix.ENODEV, unix.ENOENT} {
		d := device(func(string) (Claimant, error) { return Claimant{}, errno })
		if yes, err := began(d); !yes || err != nil {
			t.Errorf("opening fails with %v: %v", errno, err)
		}
	}
	if _, err := ClaimDisk("/proc/self/comm"); !errors.Is(err, ErrUnsynced) || errors.Is(err, unix.EINVAL) {
		t.Errorf("what cannot be synced: %v", err)
	}
	unsynced := fmt.Errorf("%w: no such device", ErrUnsynced)
	d := device(func(string) (Claimant, error) { return Claimant{}, unsynced })
	for range 2 {
		if yes, err := began(d); yes || !errors.Is(err, ErrUnsynced) || errors.Is(err, ErrBusy) {
			t.Errorf("the sync fails: %v, %v", yes, err)
		}
		d.claimDisk = free // the kernel has said it
	}

	late := make(chan struct{})
	d = device(func(string) (Claimant, error) { <-late; return Claimant{}, unsynced })
	limited, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := d.Sync(limited); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a sync that hangs: %v", err)
	}
	close(late)
	<-d.claims
	d.claimDisk = free
	if yes, err := began(d); yes || !errors.Is(err, ErrUnsynced) {
		t.Errorf("after a sync that failed when nobody waited: %v, %v", yes, err)
	}
}

// TestClaimLost: before Linux 7.0 a disk is not taken away when nobody holds it any more.
func TestClaimLost(t *testing.T) {
	var stopped bool
	ctl := pretend(t, func(_ *uring.SQE, _ int, cmd *command) { stopped = stopped || cmd.op == uapi.UBLK_U_CMD_STOP_DEV })
	held := false
	released := 0
	d := newDevice(ctl, &Config{Claim: func(string) (Claimant, error) {
		return Claimant{Held: func() bool { return held }, Release: func() { released++ }}, nil
	}}, Info{})
	if err := d.TryStop(context.Background()); !errors.Is(err, ErrBusy) || stopped || d.Ending() {
		t.Errorf("not held: %v, stopped: %v", err, stopped)
	}
	held = true
	if err := d.TryStop(context.Background()); err != nil || !stopped {
		t.Errorf("held: %v, stopped: %v", err, stopped)
	}
	if released != 2 {
		t.Errorf("released %d times", released)
	}
}
