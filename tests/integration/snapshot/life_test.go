package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestAddedTwiceAndDestroyedMounted: adding a device again to a snapshot is refused
// and changes nothing, and a snapshot can be destroyed while its image is mounted
// and written (TestDestroyBusy does that at greater length). The kernel module
// corrupted its lists and its memory so.
func TestAddedTwiceAndDestroyedMounted(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	for range 3 {
		_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name, dev.Path}})
		program.WantError(t, err, control.Invalid, dev.Name)
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
		for _, name := range []string{dev.Name, dev.Path, dev.Link, disk} {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: s.ID, Device: name})
			program.WantError(t, err, control.Exists, dev.Name)
			if !errors.Is(err, unix.EALREADY) {
				t.Errorf("%v: errno is not EALREADY", err)
			}
		}
		s = d.Taken(s.ID)
		if len(s.Images) != 1 {
			t.Errorf("%d images", len(s.Images))
		}
		_, err = d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: s.ID, Device: dev.Name})
		program.WantError(t, err, control.Exists)

		at := guest.Mount(t, s.Images[0].Link)
		stop := make(chan error, 1)
		go func() {
			for i := 0; ; i++ {
				if err := os.WriteFile(filepath.Join(at, fmt.Sprint(i%4)), make([]byte, 256<<10), 0o600); err != nil {
					stop <- err
					return
				}
				if i%8 == 0 {
					unix.Sync()
				}
			}
		}()
		time.Sleep(200 * time.Millisecond)
		d.Destroy(s.ID)
		guest.Await(t, "the end of the writer on the image", stop)
		guest.Unmount(t, at)
	}
	guest.Ext4.Check(t, dev.Link)
	d.Remove(dev)
}

// TestDetachWhileHeld: a device that a snapshot holds is not detached, and by force
// the snapshot breaks aloud. The kernel module went on without copying.
func TestDetachWhileHeld(t *testing.T) {
	guest.NeedEither(t)
	const size = 4 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.Open()
	s := d.Take(0, dev)
	win.Close()
	err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
	program.WantError(t, err, control.Busy, "held by snapshot "+s.ID)
	if a := d.Call("blksnap", "detach", "-d", disk); a.Status != 1 || !strings.Contains(a.Err, "held by snapshot "+s.ID) {
		t.Errorf("detach: %+v", a)
	}
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: after a refused detach: %v", err)
	}
	// By force it breaks the snapshot, aloud.
	events := make(chan control.Event, 16)
	watched := make(chan error, 1)
	go func() {
		watched <- d.Watch(guest.Context(t), control.WatchRequest{ID: s.ID}, func(e control.Event) error { events <- e; return nil })
	}()
	// Once it watches: a snapshot that is gone cannot be watched any more.
	if e := guest.Await(t, "the first event", events); e.Kind != control.EventCreated {
		t.Errorf("the first event is %+v", e)
	}
	if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		t.Fatal(err)
	}
	if err := guest.Await(t, "the end of the watching", watched); err != nil {
		t.Error(err)
	}
	close(events)
	broken := false
	for e := range events {
		broken = broken || e.Kind == control.EventCorrupted && e.Errno == -int(unix.ENODEV)
	}
	if !broken {
		t.Error("nobody was told that the snapshot broke")
	}
	if _, err := os.Stat(s.Images[0].Path); err == nil {
		t.Error("the image is left")
	}
	if err := w.Same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestSnapshotRounds takes and destroys again and again: it leaves nothing.
func TestSnapshotRounds(t *testing.T) {
	guest.NeedEither(t)
	program.LeakTest(t)
	const size = 4 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk, program.Queues(1, 8))
	w := stamp.NewWorld(size)
	round := func() {
		if err := w.Fill(dev.Path); err != nil {
			t.Fatal(err)
		}
		win := w.Open()
		s := d.Take(64<<10, dev)
		win.Close()
		if err := w.Fill(dev.Path); err != nil {
			t.Fatal(err)
		}
		if err := win.Check(s.Images[0].Path); err != nil {
			t.Errorf("I1: %v", err)
		}
		d.Destroy(s.ID)
	}
	for range 6 {
		round()
	}
	before, memory := d.Held(), d.Memory()
	rounds := int(guest.Span(20, 300))
	for range rounds {
		round()
	}
	d.Settled(before, 3)
	grown := d.Memory() - memory
	t.Logf("%d KiB more after %d rounds", grown>>10, rounds)
	if grown > 4<<20 {
		t.Errorf("I9: %d bytes more memory", grown)
	}
	if left := guest.Entries(d.RunDir.State() + "/snapshots"); left > 0 {
		t.Errorf("%d snapshots' state is left", left)
	}
	if left := guest.Entries("/dev/ublk-blksnap/images"); left > 0 {
		t.Errorf("%d links to images are left", left)
	}
	d.Remove(dev)
}
