package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestTurns: changes go one at a time; who stops waiting for a turn gets none.
func TestTurns(t *testing.T) {
	d := &Daemon{opLock: make(chan struct{}, 1)}
	ctx := context.Background()
	end, err := d.begin(ctx, "first")
	if err != nil || *d.activity.Load() != "first" {
		t.Fatal(err)
	}
	gone, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := d.begin(gone, "second %d", 2); control.CodeOf(err) != control.Timeout || err.Error() != "second 2: took too long" {
		t.Errorf("%v", err)
	}
	if *d.activity.Load() != "first" {
		t.Errorf("doing %s", *d.activity.Load())
	}
	end()
	// A free turn is not for one that has gone away either.
	for range 20 {
		if _, err := d.begin(gone, "second"); control.CodeOf(err) != control.Timeout {
			t.Fatalf("%v", err)
		}
	}
	end, err = d.begin(ctx, "third")
	if err != nil {
		t.Fatal(err)
	}
	end()
	if *d.activity.Load() != "" {
		t.Errorf("doing %s", *d.activity.Load())
	}
}

// TestNoSnapshotOfALeavingDevice: a device whose removal did not come to its end
// has no queues that could make a cut.
func TestNoSnapshotOfALeavingDevice(t *testing.T) {
	d := &Daemon{}
	err := d.addTo(context.Background(), &snapshot{}, &device{Device: control.Device{Name: "data"}, removing: true})
	if control.CodeOf(err) != control.Busy {
		t.Errorf("added to a snapshot: %v", err)
	}
}

// TestNotBegun: a change that had not its turn says whether another program may be asked for it.
func TestNotBegun(t *testing.T) {
	d := &Daemon{opLock: make(chan struct{}, 1)}
	d.opLock <- struct{}{}
	for cause, want := range map[error]control.Error{
		nil:          {Code: control.Interrupted, Errno: unix.EINTR},
		errTakenOver: {Code: control.Unavailable, Errno: unix.ERESTART},
	} {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(cause)
		_, err := d.begin(ctx, "add")
		var e *control.Error
		if !errors.As(err, &e) || e.Code != want.Code || e.Errno != want.Errno {
			t.Errorf("by %v: %v", cause, err)
		}
	}
	if errTakenOver.Errno != unix.ECONNRESET {
		t.Error("what others are told has changed")
	}
}
