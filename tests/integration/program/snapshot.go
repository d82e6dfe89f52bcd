package program

import (
	"context"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// SnapshotIDs are those of all the daemon's snapshots.
func SnapshotIDs(t testing.TB, d *Daemon) []string {
	t.Helper()
	all, err := d.Snapshots(guest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, s := range all {
		ids = append(ids, s.ID)
	}
	return ids
}

// Corrupted waits until the snapshot is broken and returns the kinds of the
// events that told of it, in order.
func (d *Daemon) Corrupted(id string) (kinds []string, last control.Event) {
	d.t.Helper()
	for {
		e, err := d.WaitEvent(guest.Context(d.t), control.WaitRequest{ID: id, Timeout: guest.Patience})
		if err != nil {
			d.t.Fatalf("after the events %q: %v", kinds, err)
		}
		kinds = append(kinds, e.Kind)
		if e.Kind == control.EventCorrupted {
			return kinds, e
		}
	}
}

// Create makes a snapshot that is not taken yet. The test's end destroys it.
func (d *Daemon) Create(r control.CreateRequest) control.Snapshot {
	d.t.Helper()
	s, err := d.CreateSnapshot(guest.Context(d.t), r)
	if err != nil {
		d.t.Fatal(err)
	}
	d.cleanUp(func(ctx context.Context) error {
		return d.DestroySnapshot(ctx, control.DestroyRequest{ID: s.ID, Force: true})
	})
	return s
}

// Take takes a snapshot of devices with chunks of the given size in bytes, 0
// for the default, and storage in memory.
func (d *Daemon) Take(chunk int64, devs ...control.Device) control.Snapshot {
	d.t.Helper()
	s := d.Create(control.CreateRequest{Devices: Names(devs), ChunkSize: chunk, Storage: []control.Storage{{Path: "/dev/shm"}}})
	return d.Taken(s.ID)
}

// Taken takes a snapshot that was created.
func (d *Daemon) Taken(id string) control.Snapshot {
	d.t.Helper()
	s, err := d.TakeSnapshot(guest.Context(d.t), control.TakeRequest{ID: id})
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

// DestroySnapshot is the client's, without the answer: who is cut off is for people.
func (d *Daemon) DestroySnapshot(ctx context.Context, r control.DestroyRequest) error {
	_, err := d.Client.DestroySnapshot(ctx, r)
	return err
}

// Destroy destroys a snapshot, whoever uses its images.
func (d *Daemon) Destroy(id string) {
	d.t.Helper()
	if err := d.DestroySnapshot(guest.Context(d.t), control.DestroyRequest{ID: id, Force: true}); err != nil {
		d.t.Fatal(err)
	}
}

// Show is what the daemon tells of a snapshot.
func (d *Daemon) Show(id string) control.Snapshot {
	d.t.Helper()
	s, err := d.Snapshot(guest.Context(d.t), id)
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

// Names are the names of devices.
func Names(devs []control.Device) []string {
	var out []string
	for _, d := range devs {
		out = append(out, d.Name)
	}
	return out
}
