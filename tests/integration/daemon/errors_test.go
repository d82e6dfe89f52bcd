package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestErrors has every error that a snapshot's life knows: its code, its errno,
// and what the program says with status 1.
func TestErrors(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 3, 16<<20)
	d := program.Start(t)
	a, b := d.Add(disks[0]), d.Add(disks[1])
	const nobody = "11111111-2222-4333-8444-555555555555"
	storage := []control.Storage{{Path: "/dev/shm"}}

	empty := d.Create(control.CreateRequest{Storage: storage})
	bare := d.Create(control.CreateRequest{Devices: []string{a.Name}})
	taken := d.Take(0, a)
	// Unlike the kernel module we allow a device in several snapshots.
	second := d.Take(0, a, b)
	if err := errors.Join(
		func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: empty.ID, Device: a.Name})
			return err
		}(),
		func() error {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: empty.ID})
			return err
		}(),
	); err != nil {
		t.Errorf("a device in four snapshots: %v", err)
	}
	none := d.Create(control.CreateRequest{Storage: storage})
	file := filepath.Join(t.TempDir(), "notempty")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}

	guest.Run(t, "mkswap", disks[2])

	for _, c := range []struct {
		what  string
		do    func() error
		code  control.Code
		errno unix.Errno
		args  []string // the same as a call of blksnap
		says  string
	}{
		{"take of an unknown snapshot", func() error {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: nobody})
			return err
		}, control.NotFound, unix.ESRCH, []string{"snapshot_take", "-i", nobody}, "no such snapshot"},
		{"destruction of an unknown snapshot", func() error { return d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: nobody}) },
			control.NotFound, unix.ESRCH, []string{"snapshot_destroy", "-i", nobody}, "no such snapshot"},
		{"adding to an unknown snapshot", func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: nobody, Device: a.Name})
			return err
		}, control.NotFound, unix.ESRCH, []string{"snapshot_add", "-i", nobody, "-d", disks[0]}, "no such snapshot"},
		{"storage for an unknown snapshot", func() error {
			_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: nobody, Storage: storage[0]})
			return err
		}, control.NotFound, unix.ESRCH, []string{"snapshot_appendstorage", "-i", nobody, "-f", "/dev/shm"}, "no such snapshot"},
		{"waiting for an unknown snapshot", func() error {
			_, err := d.WaitEvent(guest.Context(t), control.WaitRequest{ID: nobody, Timeout: time.Second})
			return err
		}, control.NotFound, unix.ESRCH, nil, ""},
		{"watching an unknown snapshot", func() error {
			return d.Watch(guest.Context(t), control.WatchRequest{ID: nobody}, func(control.Event) error { return nil })
		}, control.NotFound, unix.ESRCH, nil, ""},
		{"a second take", func() error {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: taken.ID})
			return err
		}, control.Exists, unix.EALREADY, []string{"snapshot_take", "-i", taken.ID}, "taken already"},
		{"a take without devices", func() error {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: none.ID})
			return err
		}, control.NotFound, unix.ENODEV, []string{"snapshot_take", "-i", none.ID}, "no devices"},
		{"a take without storage", func() error {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: bare.ID})
			return err
		}, control.NoSpace, unix.ENOSPC, []string{"snapshot_take", "-i", bare.ID}, "no difference storage"},
		{"a device added twice", func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: bare.ID, Device: a.Path})
			return err
		}, control.Exists, unix.EALREADY, []string{"snapshot_add", "-i", bare.ID, "-d", a.Path}, "in the snapshot already"},
		{"a device added after the take", func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: taken.ID, Device: b.Name})
			return err
		}, control.Exists, unix.EALREADY, []string{"snapshot_add", "-i", taken.ID, "-d", disks[1]}, "taken already"},
		{"a device that does not exist", func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: bare.ID, Device: "/dev/nothing", Attach: true})
			return err
		}, control.NotFound, unix.ENODEV, []string{"snapshot_add", "-i", bare.ID, "-d", "/dev/nothing"}, "no such device"},
		{"a device without a filter", func() error {
			_, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: bare.ID, Device: disks[2]})
			return err
		}, control.NotFound, unix.ENODEV, []string{"cbtinfo", "-d", disks[2]}, "no filter"},
		{"an image as a device", func() error {
			_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: taken.Images[0].Path})
			return err
		}, control.Invalid, unix.EINVAL, []string{"attach", "-d", taken.Images[0].Path}, "is an image of snapshot " + taken.ID},
		{"a filter as a device", func() error {
			_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: a.Path})
			return err
		}, control.Invalid, unix.EINVAL, []string{"attach", "-d", a.Path}, "is itself the filter"},
		{"detaching what a snapshot holds", func() error {
			return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: a.Name})
		}, control.Busy, unix.EBUSY, []string{"detach", "-d", disks[0]}, "held by snapshot"},
		{"storage with content", func() error {
			_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: bare.ID, Storage: control.Storage{Path: file}})
			return err
		}, control.Busy, unix.EBUSY, nil, ""},
		{"a storage device with content", func() error {
			_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: bare.ID, Storage: control.Storage{Path: disks[2]}})
			return err
		}, control.Busy, unix.EBUSY, []string{"snapshot_appendstorage", "-i", bare.ID, "-f", disks[2]}, "seems to hold"},
		{"storage in no directory", func() error {
			_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: bare.ID, Storage: control.Storage{Path: file + "/x/y"}})
			return err
		}, "", 0, []string{"snapshot_appendstorage", "-i", bare.ID, "-f", file + "/x/y"}, "storage"},
		{"a chunk size that is no power of two", func() error {
			_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{a.Name}, ChunkSize: 100 << 10})
			return err
		}, control.Invalid, unix.EINVAL, nil, ""},
		{"a chunk size too small", func() error {
			_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{a.Name}, ChunkSize: 2 << 10})
			return err
		}, control.Invalid, unix.EINVAL, nil, ""},
		{"what is no UUID", func() error { return d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: "x y"}) },
			control.Invalid, unix.EINVAL, []string{"snapshot_destroy", "-i", "x"}, "not a UUID"},
		{"a limit that is no size", nil, "", 0, []string{"snapshot_create", "-d", disks[0], "-f", "/dev/shm", "-l", "10x"}, "10x"},
		{"a wrong device", nil, "", 0, []string{"snapshot_create", "-d", "/dev/null", "-f", "/dev/shm"}, "not a block device"},
		{"a device in no snapshot", nil, "", 0, []string{"snapshot_info", "-d", disks[2]}, ""},
		{"a missing option", nil, "", 0, []string{"snapshot_take"}, "id"},
		{"an unknown option", nil, "", 0, []string{"attach", "-d", disks[0], "--nonsense"}, "nonsense"},
		{"an unknown command", nil, "", 0, []string{"snapshot_nonsense"}, "snapshot_nonsense"},
	} {
		if c.do != nil {
			err := c.do()
			switch {
			case err == nil:
				t.Errorf("%s: no error", c.what)
			case c.code != "" && control.CodeOf(err) != c.code, c.errno != 0 && !errors.Is(err, c.errno):
				t.Errorf("%s: %v (code %s), want %s, %v", c.what, err, control.CodeOf(err), c.code, c.errno)
			}
		}
		if c.args != nil {
			got := d.Call("blksnap", c.args...)
			if got.Status != 1 || got.Out != "" || !strings.HasPrefix(got.Err, "blksnap: ") || !strings.Contains(got.Err, c.says) {
				t.Errorf("%s: blksnap %s: %+v, want %q", c.what, strings.Join(c.args, " "), got, c.says)
			}
		}
	}
	if got := d.Call("blksnap", "snapshot_watcher", "-i", nobody); got.Status != 0 || got.Err != "" ||
		got.Out != "Start snapshot watcher.\nThe snapshot no longer exists.\nSnapshot watcher finished.\n" {
		t.Errorf("watching an unknown snapshot: %+v", got)
	}
	if got := d.Call("blksnap", "snapshot_waitevent", "-i", nobody, "-t", "100"); got.Status != 0 || got.Out != "result=not found\n" {
		t.Errorf("waiting for an unknown snapshot: %+v", got)
	}
	began := time.Now()
	if got := d.Call("blksnap", "snapshot_waitevent", "-i", taken.ID, "-t", "1500"); got.Status != 0 || got.Out != "result=timeout\n" {
		t.Errorf("waiting for nothing: %+v", got)
	}
	if took := time.Since(began); took < 1500*time.Millisecond {
		t.Errorf("1500 ms took %v", took)
	}
	// None of the errors has changed anything.
	for id, state := range map[string]string{taken.ID: control.SnapshotTaken, second.ID: control.SnapshotTaken, bare.ID: control.SnapshotCreated, none.ID: control.SnapshotCreated} {
		if got := d.Show(id); got.State != state {
			t.Errorf("%s is %s, want %s", id, got.State, state)
		}
	}
	for _, id := range program.SnapshotIDs(t, d) {
		d.Destroy(id)
	}
	d.Remove(a)
	d.Remove(b)
}
