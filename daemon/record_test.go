package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestRecord: a daemon's record follows what it has, and what was lost before it
// until that is there again.
func TestRecord(t *testing.T) {
	dir := RunDir(filepath.Join(t.TempDir(), "run"))
	if err := dir.make(); err != nil {
		t.Fatal(err)
	}
	daemon := func() *Daemon {
		d := &Daemon{opts: Options{Dir: dir, Log: quiet()}, opLock: make(chan struct{}, 1), devices: map[string]*device{}, snapshots: map[string]*snapshot{}}
		d.activity.Store(new(string))
		d.reportLost()
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
		b, err := os.ReadFile(dir.path(recordName))
		if err != nil {
			t.Fatal(err)
		}
		if err := dir.replace(recordName, []byte(strings.ReplaceAll(string(b), processIdentity(os.Getpid()), "long ago"))); err != nil {
			t.Fatal(err)
		}
	}
	a := &device{Device: control.Device{Name: "a", Original: "/dev/vda", Path: "/dev/ublkb0"}}
	b := &device{Device: control.Device{Name: "b", Original: "/dev/vdb", Path: "/dev/ublkb1", Recovery: true}}
	s := &snapshot{id: "02e091ec-dae8-41ba-9dae-4e66f1473dd6", images: []*image{{device: a}}, storage: []control.Storage{{Path: "/s"}}}
	first := daemon()
	change(first, func() { first.devices["a"], first.devices["b"], first.snapshots[s.id] = a, b, s })
	if l := dir.lost(); l != nil {
		t.Errorf("lost with a daemon that lives: %v", l)
	}
	// Destroyed, but for its storage, which is on its way back.
	gone := &snapshot{id: "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8", releasing: true}
	change(first, func() { first.snapshots[gone.id] = gone })
	die()
	second := daemon()
	for _, ref := range []string{"a", "/dev/vda", "/dev/ublkb0", "/dev/ublk-blksnap/a"} {
		e := second.explainDevice(&control.Error{Code: control.NotFound, Message: "no filter"}, ref)
		if !strings.Contains(e.Message, "which died") || e.Fix != "add it again: ublk-blksnap add /dev/vda --name a" {
			t.Errorf("%s: %v", ref, e)
		}
	}
	if _, err := second.findSnapshot(gone.id); control.CodeOf(err) != control.NotFound || strings.Contains(err.Error(), "died") {
		t.Errorf("a snapshot that was destroyed: %v", err)
	}
	if _, err := second.findSnapshot(s.id); control.CodeOf(err) != control.NotFound || !strings.Contains(err.Error(), "which died") {
		t.Errorf("%v", err)
	}
	change(second, func() { second.devices["a"] = a })
	die()
	third := daemon()
	i, err := third.Info(ctx)
	if err != nil || i.Lost == nil || len(i.Lost.Devices) != 2 || len(i.Lost.Snapshots) != 1 || i.Lost.Devices[1] != (control.LostDevice{Name: "b", Original: "/dev/vdb", Path: "/dev/ublkb1", Waits: true}) {
		t.Fatalf("%+v, %v", i.Lost, err)
	}
	change(third, func() { third.devices["a"], third.devices["other"] = a, b })
	if i, _ := third.Info(ctx); i.Lost != nil {
		t.Errorf("all is there again, and yet lost: %+v", i.Lost)
	}
	third.devices = nil
	if err := third.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir.path(recordName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record outlives a daemon that ended well: %v", err)
	}
}
