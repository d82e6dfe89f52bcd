package ublk

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSyncFails: a sync that fails is not taken for a disk that is gone or in use, whatever
// the number of its error is, and is told from then on, even if nobody waited for it.
func TestSyncFails(t *testing.T) {
	ctx := context.Background()
	device := func(claim func(string) (func(), error)) *Device {
		return newDevice(nil, &Config{Claim: claim}, Info{})
	}
	free := func(string) (func(), error) { return func() {}, nil }
	began := func(d *Device) (yes bool, err error) {
		err = d.claim(ctx, func() error { yes = true; return nil })
		return yes, err
	}
	for _, errno := range []unix.Errno{unix.ENXIO, unix.ENODEV, unix.ENOENT} {
		d := device(func(string) (func(), error) { return nil, errno })
		if yes, err := began(d); !yes || err != nil {
			t.Errorf("opening fails with %v: %v", errno, err)
		}
	}
	if _, err := ClaimDisk("/proc/self/comm"); !errors.Is(err, ErrUnsynced) || errors.Is(err, unix.EINVAL) {
		t.Errorf("what cannot be synced: %v", err)
	}
	unsynced := fmt.Errorf("%w: no such device", ErrUnsynced)
	d := device(func(string) (func(), error) { return nil, unsynced })
	for range 2 {
		if yes, err := began(d); yes || !errors.Is(err, ErrUnsynced) || errors.Is(err, ErrBusy) {
			t.Errorf("the sync fails: %v, %v", yes, err)
		}
		d.claimDisk = free // the kernel has said it
	}

	late := make(chan struct{})
	d = device(func(string) (func(), error) { <-late; return nil, unsynced })
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
