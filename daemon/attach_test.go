package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestPassedBy: once it is known that requests pass a filter by, its change map has another
// generation, and whoever asks for the device or for a snapshot of it is told, before these end.
func TestPassedBy(t *testing.T) {
	d, dev, s := measured(t)
	d.events = newEventLog()
	now := time.Now()
	s.taken = &now
	dev.attached = &attachment{}
	dev.attached.changing.Store(true) // so that nobody asks the kernel
	before := dev.cbt.Last().GenerationID
	if got := d.describeSnapshot(s); got.State != control.SnapshotTaken || got.Errno != 0 {
		t.Errorf("before: %+v", got)
	}
	dev.attached.changing.Store(false)
	d.bypass(dev, tableOther)
	if got := d.describeSnapshot(s); got.State != control.SnapshotCorrupted || got.Errno == 0 {
		t.Errorf("the snapshot: %+v", got)
	}
	if got := d.describe(dev); !strings.Contains(got.Attention, "do not come to the filter") {
		t.Errorf("the device: %+v", got)
	}
	if dev.cbt.Last().GenerationID == before {
		t.Error("the change map goes on")
	}
	d.tellBroken(s, d.passedBy(s))
	var kinds []string
	for _, e := range d.events.recent {
		kinds = append(kinds, e.Kind)
	}
	if want := []string{control.EventNewGeneration, control.EventCorrupted}; !slices.Equal(kinds, want) {
		t.Errorf("events %q, want %q", kinds, want)
	}
}

// TestAttachMode: what is no way to attach is refused, and not taken for another.
func TestAttachMode(t *testing.T) {
	d := &Daemon{opts: Options{Config: DefaultConfig()}}
	for mode, good := range map[control.AttachMode]bool{control.AttachInUse: true, control.AttachAlways: true, control.AttachPossible: true, control.AttachNever: true, "sideways": false, "Never": false} {
		err := d.applyDefaults(&control.AddRequest{Path: "/dev/none", Queues: 1, Depth: 1, Attach: mode})
		if (err == nil) != good || err != nil && control.CodeOf(err) != control.Invalid {
			t.Errorf("%q: %v", mode, err)
		}
	}
}

// TestFixes: the way out that a refusal names is there: another volume only if there is one.
func TestFixes(t *testing.T) {
	x := newWatchedDisk(t)
	class := filepath.Join(x.sys, "class", "block")
	put := func(minor uint32, name, dmName string) *disk.Disk {
		n := disk.Num{Major: 253, Minor: minor}
		x.put(t, n, name, 1<<20)
		dir := filepath.Join(x.sys, "devices", name)
		for _, err := range []error{
			os.MkdirAll(class, 0o755), os.Symlink(dir, filepath.Join(class, name)), os.WriteFile(filepath.Join(dir, "dev"), []byte(n.String()+"\n"), 0o644),
			os.MkdirAll(filepath.Join(dir, "dm"), 0o755), os.WriteFile(filepath.Join(dir, "dm", "name"), []byte(dmName), 0o644),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		d, err := x.host.ByNumber(n)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	link := func(name, kind, other string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(x.sys, "devices", name, kind, other), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(1, "sdb1", "")
	put(2, "dm-2", "vg0-data")
	bare, safe, above := put(3, "dm-3", "bare"), put(4, "dm-4", "safe"), put(5, "dm-5", "multi")
	link("dm-3", "slaves", "sdb1")
	link("dm-4", "slaves", "dm-2")
	link("dm-5", "holders", "dm-2")
	const key, unused = "cryptsetup refresh --disable-keyring", "unmount it and add it"
	for got, want := range map[string][3]bool{ // another volume, the key, the filter in its place
		x.keyringFix(bare): {false, true, true}, x.keyringFix(safe): {true, true, false}, x.multipathFix(above): {true, false, false}, x.multipathFix(bare): {false, false, true},
	} {
		if has := [3]bool{strings.Contains(got, "name the volume"), strings.Contains(got, key), strings.Contains(got, unused)}; has != want {
			t.Errorf("%q: %v, want %v", got, has, want)
		}
	}
}

// TestOrderHangs: while a change of one device hangs, nobody knows how far that has come, but all
// is known of another one whose change fails.
func TestOrderHangs(t *testing.T) {
	prober, err := disk.StartProber("ublk-blksnap", ProbeCommand, "/")
	if err != nil {
		t.Fatal(err)
	}
	defer prober.Close()
	defer unix.Kill(prober.PID(), unix.SIGKILL)
	unix.Kill(prober.PID(), unix.SIGSTOP)
	d := &Daemon{opts: Options{Dir: RunDir(t.TempDir()), Log: quiet(), Prober: prober}} // nothing is waited for
	d.activity.Store(new(string))
	if err := os.MkdirAll(d.devicesDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	attached := func(name string) *device {
		dev := &device{Device: control.Device{Name: name}, ublk: &ublk.Device{}, attached: &attachment{device: dm.Device{UUID: "none"}}}
		r := deviceRecord{
			Name: name, Tag: ublk.NewTag(filterKind), Original: originalRecord{Number: "8:0"}, Geometry: ublk.Geometry{Size: 1 << 20, LogicalBlock: 512},
			Attached: &attachRecord{Public: originalRecord{Number: "8:16"}},
		}
		if err := d.writeDeviceRecord(r); err != nil {
			t.Fatal(err)
		}
		return dev
	}
	a, b := attached("a"), attached("b")
	if _, err := d.clearTable(context.Background(), a.attached, disk.Num{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	for dev, want := range map[*device]bool{a: true, b: false} {
		err := d.detachTables(context.Background(), dev)
		r, readErr := d.readDeviceRecord(dev.Name)
		if err == nil || readErr != nil || dev.attached.changing.Load() != want || r.Attached.Changing != want {
			t.Errorf("%s: %v; it is being changed: %v, on record: %+v, %v", dev.Name, err, dev.attached.changing.Load(), r.Attached, readErr)
		}
	}
}

// TestStorageHangs: while the storage of a snapshot whose volume is passed by does not answer, the
// daemon has time for others, and the filter stays.
func TestStorageHangs(t *testing.T) {
	d, dev, s := measured(t)
	d.events, d.opLock, d.tablesTold = newEventLog(), make(chan struct{}, 1), make(chan struct{}, 1)
	d.activity.Store(new(string))
	d.opts.Config.StorageTimeout = time.Hour
	s.destroyed = make(chan struct{})
	dev.attached = &attachment{device: dm.Device{UUID: "none"}}
	d.bypass(dev, tableOther)
	s.use.RLock() // so that it does not come to its end
	for range 2 {
		d.careFor(context.Background(), dev)
		if !s.releasing || !d.holds(s, dev) || dev.removing || d.deviceNamed(dev.Name) != dev {
			t.Fatalf("it is being destroyed: %v, and held: %v; the filter is being removed: %v", s.releasing, d.holds(s, dev), dev.removing)
		}
	}
	s.use.RUnlock()
	<-d.tablesTold
	if ended, err := d.endHolders(dev); !ended || err != nil {
		t.Errorf("when it answers: %v, %v", ended, err)
	}
	<-s.destroyed
}
