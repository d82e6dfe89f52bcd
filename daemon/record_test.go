package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// TestRecord: a daemon's record follows what it has, and what it could not take over of
// the one before.
func TestRecord(t *testing.T) {
	dir := RunDir(filepath.Join(t.TempDir(), "run"))
	if err := errors.Join(dir.make(), dir.subdir(stateName, 0o700)); err != nil {
		t.Fatal(err)
	}
	daemon := func() *Daemon {
		d := &Daemon{events: newEventLog(), opts: Options{Dir: dir, Log: quiet()}, opLock: make(chan struct{}, 1), devices: map[string]*device{}, waiting: map[string]*survivor{}, snapshots: map[string]*snapshot{}}
		d.activity.Store(new(string))
		if r, err := dir.lastRecord(); err == nil {
			d.predecessor = r.PID
		}
		d.startRecord()
		return d
	}
	ctx := context.Background()
	change := func(d *Daemon, f func()) {
		t.Helper()
		end, err := d.begin(ctx, "change")
		if err != nil {
			t.Fatal(err)
		}
		f()
		end()
	}
	// die makes the record one of a daemon that is dead.
	die := func() {
		t.Helper()
		r, err := dir.lastRecord()
		if err != nil {
			t.Fatal(err)
		}
		r.Process = "long ago"
		if err := statefile.Write(dir.path(recordName), recordKind, recordFormat, r); err != nil {
			t.Fatal(err)
		}
	}
	lost := func() *control.Lost {
		t.Helper()
		l, err := dir.lost()
		if err != nil {
			t.Error(err)
		}
		return l
	}
	a := &device{Device: control.Device{Name: "a", Added: time.Unix(1, 0), Original: "/dev/vda", Path: "/dev/ublkb0"}}
	b := &device{Device: control.Device{Name: "b", Added: time.Unix(2, 0), Original: "/dev/vdb", Path: "/dev/ublkb1"}}
	s := &snapshot{id: "02e091ec-dae8-41ba-9dae-4e66f1473dd6", note: snapshotNote{Name: "nightly"}, images: []*image{{device: a}}, storage: []control.Storage{{Path: "/s"}}}
	first := daemon()
	change(first, func() { first.devices["a"], first.devices["b"], first.snapshots[s.id] = a, b, s })
	if l := lost(); l != nil {
		t.Errorf("lost with a daemon that lives: %v", l)
	}
	// Destroyed, but for its storage, which is on its way back.
	gone := &snapshot{id: "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8", releasing: true}
	change(first, func() { first.snapshots[gone.id] = gone })
	die()
	l := lost()
	if l == nil || len(l.Devices) != 2 || len(l.Snapshots) != 1 || l.Snapshots[0].Name != "nightly" || l.Devices[1] != (control.LostDevice{Name: "b", Original: "/dev/vdb", Path: "/dev/ublkb1", Waits: true}) {
		t.Fatalf("a daemon died and left %+v", l)
	}

	// The next one takes a over, but b has to wait, and the snapshot has ended.
	second := daemon()
	change(second, func() {
		second.devices["a"] = a
		second.waiting["b"] = &survivor{record: deviceRecord{Name: "b", ID: 1, Original: originalRecord{Path: "/dev/vdb"}}, reason: errors.New("no such disk")}
		second.ended = []control.LostSnapshot{{ID: s.id, Name: "nightly", Devices: []string{"b"}, Reason: "its storage is gone"}}
	})
	if i, err := second.Info(ctx); err != nil || i.Lost == nil || len(i.Lost.Devices) != 1 || i.Lost.Devices[0].Reason != "no such disk" || !i.Lost.Devices[0].Waits {
		t.Errorf("%+v, %v", i.Lost, err)
	}
	for _, ref := range []string{"b", "/dev/vdb", "/dev/ublkb1", "/dev/ublk-blksnap/b"} {
		if _, err := second.findDevice(ref); control.CodeOf(err) != control.Busy || !strings.Contains(err.Error(), "no such disk") || !strings.Contains(err.Error(), "remove --force b") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := second.findSnapshot(gone.id); control.CodeOf(err) != control.NotFound || strings.Contains(err.Error(), "died") {
		t.Errorf("a snapshot that was destroyed: %v", err)
	}
	for _, ref := range []string{s.id, "nightly"} {
		if _, err := second.findSnapshot(ref); control.CodeOf(err) != control.NotFound || !strings.Contains(err.Error(), "its storage is gone") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if err := second.Stop(ctx); control.CodeOf(err) != control.Busy {
		t.Errorf("stopped while a device waits: %v", err)
	}
	die()
	if l := lost(); l == nil || len(l.Devices) != 2 || l.Devices[0].Reason != "" || l.Devices[1].Reason == "" {
		t.Errorf("the next one died and left %+v", l)
	}
	third := daemon()
	change(third, func() { third.devices["a"], third.devices["b"] = a, b })
	if i, _ := third.Info(ctx); i.Lost != nil {
		t.Errorf("all is taken over, and yet lost: %+v", i.Lost)
	}
	third.devices = nil
	if err := third.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir.path(recordName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record outlives a daemon that ended well: %v", err)
	}
}

// TestBareRecord: a reload from a program whose record had no heading knows its predecessor,
// which is itself.
func TestBareRecord(t *testing.T) {
	dir := RunDir(filepath.Join(t.TempDir(), "run"))
	if err := errors.Join(dir.make(), dir.subdir(stateName, 0o700)); err != nil {
		t.Fatal(err)
	}
	for text, ok := range map[string]bool{
		`{"version":1,"birth":"boot 5","pid":7,"devices":[{"name":"a"}]}`: true,
		`{"version":2,"birth":"boot 5","pid":7}`:                          false,
		`{"birth":"boot 5","pid":7}`:                                      false,
		`{"version":1,"birth":"boot 5","pid":7,"devices":[{"name":"a"}`:   false,
		`{"version":1,"pid":7}`:                                           false,
	} {
		if err := os.WriteFile(dir.path(recordName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := dir.lastRecord()
		if ok && (err != nil || r.PID != 7 || r.Process != "boot 5" || len(r.Devices) != 1) || !ok && !errors.Is(err, statefile.ErrDamaged) {
			t.Errorf("%s: %+v, %v", text, r, err)
		}
	}
}

var testsBegan = time.Now()

// TestProcessStart: a process has begun before its program does anything.
func TestProcessStart(t *testing.T) {
	if start := processStart(); start.After(testsBegan) || start.Before(testsBegan.Add(-10*time.Minute)) {
		t.Errorf("this process began at %v, and its program at %v", start, testsBegan)
	}
}
