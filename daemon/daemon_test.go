package daemon

import (
	"context"
	"testing"
	"time"

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
