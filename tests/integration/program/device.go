package program

import (
	"context"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// Add puts a filter over a disk. The test's end removes it, by force if need be.
func (d *Daemon) Add(path string, change ...func(*control.AddRequest)) control.Device {
	d.t.Helper()
	r := control.AddRequest{Path: path}
	for _, f := range change {
		f(&r)
	}
	dev, err := d.AddDevice(guest.Context(d.t), r)
	if err != nil {
		d.t.Fatal(err)
	}
	d.cleanUp(func(ctx context.Context) error {
		return d.RemoveDevice(ctx, control.RemoveRequest{Device: dev.Name, Force: true})
	})
	return dev
}

// cleanUp has the test's end take something away, if it is there still. It is not tried with
// a daemon that hangs: that would take a test as long as everything that it made.
func (d *Daemon) cleanUp(f func(ctx context.Context) error) {
	d.t.Cleanup(func() {
		if d.hangs {
			return
		}
		ctx := guest.Context(d.t)
		err := f(ctx)
		if err != nil && control.CodeOf(err) != control.NotFound && control.CodeOf(err) != control.Unavailable {
			d.t.Errorf("clean up: %v", err)
		}
		d.hangs = ctx.Err() != nil
	})
}

// Remove takes the filter away.
func (d *Daemon) Remove(dev control.Device) {
	d.t.Helper()
	if err := d.RemoveDevice(guest.Context(d.t), control.RemoveRequest{Device: dev.Name}); err != nil {
		d.t.Fatal(err)
	}
}

// Queues is a change for Add: the numbers of queues and of their requests.
func Queues(queues, depth int) func(*control.AddRequest) {
	return func(r *control.AddRequest) { r.Queues, r.Depth = queues, depth }
}

// RemoveDevice is the client's, without the answer: who is cut off is for people.
func (d *Daemon) RemoveDevice(ctx context.Context, r control.RemoveRequest) error {
	_, err := d.Client.RemoveDevice(ctx, r)
	return err
}
