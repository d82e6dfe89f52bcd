package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

const (
	uuidA = "02e091ec-dae8-41ba-9dae-4e66f1473dd6"
	uuidB = "02e09f2c-0a4e-4a57-8b7e-c3d2e1f0a9b8"
	uuidC = "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8"
)

// namedSnapshots are three snapshots, made in that order, two with names.
func namedSnapshots() *Daemon {
	at := time.Now()
	d := &Daemon{opts: Options{Log: quiet()}, events: newEventLog(), endsChanged: make(chan struct{}, 1), snapshots: map[string]*snapshot{
		uuidA: {id: uuidA, created: at, note: snapshotNote{Name: "nightly"}},
		uuidB: {id: uuidB, created: at.Add(1)},
		uuidC: {id: uuidC, created: at.Add(2), note: snapshotNote{Name: "hourly"},
			images: []*image{{ublk: &ublk.Device{Path: "/dev/ublkb7"}, link: "/dev/ublk-blksnap/images/hourly/data"}}},
	}}
	return d
}

func TestFindSnapshot(t *testing.T) {
	d := namedSnapshots()
	for ref, want := range map[string]string{
		uuidA: uuidA, strings.ToUpper(uuidA): uuidA, strings.ReplaceAll(uuidA, "-", ""): uuidA, "02e091": uuidA, "02E09F2C-0": uuidB, "6": uuidC,
		"nightly": uuidA, "hourly": uuidC, "latest": uuidC, "/dev/ublkb7": uuidC, "/dev/ublk-blksnap/images//hourly/data": uuidC,
	} {
		if s, err := d.findSnapshot(ref); err != nil || s.id != want {
			t.Errorf("%s: %v, %v; want %s", ref, s, err, want)
		}
	}
	for ref, want := range map[string]control.Code{
		"02e09": control.Invalid, "": control.Invalid, "a b": control.Invalid, "../x": control.Invalid, "-": control.Invalid,
		"Nightly": control.NotFound, "night": control.NotFound, "fff": control.NotFound, "/dev/ublkb8": control.NotFound,
		"12345678-1234-1234-1234-123456789012": control.NotFound,
	} {
		if s, err := d.findSnapshot(ref); control.CodeOf(err) != want {
			t.Errorf("%s: %v, %v; want %s", ref, s, err, want)
		}
	}
	if _, err := d.findSnapshot("02e09"); !strings.Contains(err.Error(), uuidA+" (nightly) or "+uuidB) {
		t.Errorf("the candidates are not told: %v", err)
	}
	d.snapshots[uuidC].destroying = true
	if s, err := d.findSnapshot("latest"); err != nil || s.id != uuidB {
		t.Errorf("the latest is one that is being destroyed: %v, %v", s, err)
	}
	d.snapshots = nil
	if _, err := d.findSnapshot("latest"); control.CodeOf(err) != control.NotFound {
		t.Errorf("the latest of none: %v", err)
	}
}

// TestLatestByNoClock: the latest snapshot is the one that was created last, also if the clock
// on the wall was set back before that.
func TestLatestByNoClock(t *testing.T) {
	d := namedSnapshots()
	d.snapshots[uuidA].note.Began = bootNow()
	d.snapshots[uuidA].created = time.Now().Add(-24 * time.Hour)
	if s, err := d.findSnapshot("latest"); err != nil || s.id != uuidA {
		t.Errorf("%v, %v", s, err)
	}
	all := d.sortedSnapshots() // with those of an older program
	if all[0].id != uuidB || all[1].id != uuidC || all[2].id != uuidA {
		t.Errorf("%s, %s, %s", all[0].id, all[1].id, all[2].id)
	}
}

// TestNameGivenUp: a snapshot whose storage does not answer keeps no name from the next one.
func TestNameGivenUp(t *testing.T) {
	d := namedSnapshots()
	if err := d.checkSnapshotName("nightly"); control.CodeOf(err) != control.Exists || !strings.Contains(err.Error(), uuidA) {
		t.Errorf("a name that is taken: %v", err)
	}
	d.snapshots[uuidA].destroying, d.snapshots[uuidA].releasing = true, true
	if err := d.checkSnapshotName("nightly"); err != nil {
		t.Error(err)
	}
	if s, err := d.findSnapshot("nightly"); err != nil || s.id != uuidA {
		t.Errorf("%v, %v", s, err)
	}
	d.snapshots[uuidB].note.Name = "nightly"
	if s, err := d.findSnapshot("nightly"); err != nil || s.id != uuidB {
		t.Errorf("%v, %v", s, err)
	}
}

func TestSnapshotNames(t *testing.T) {
	d := namedSnapshots()
	for _, name := range []string{"", "data", "backup-2026-11-22", "feeds", "12345678x", "dead-beef", "Latest", "g", "2026-11-22"} {
		if err := d.checkSnapshotName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"latest", "feed", "0", "DEAD", "20261122", "12345678-", "12345678-1234-1234-1234-12345678901", uuidC, strings.ReplaceAll(uuidC, "-", ""),
		"data-" + uuidC, "a/b", "..", "a b", "-x", strings.Repeat("n", 65), "a\n"} {
		if err := d.checkSnapshotName(name); control.CodeOf(err) != control.Invalid || err == nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[strings.Repeat("k", i+1)] = ""
	}
	for _, labels := range []map[string]string{many, {"": "v"}, {"a b": "v"}, {"a": "v\n"}, {"a": "\xff"}, {"a": strings.Repeat("v", maxLabelValue+1)}} {
		if err := checkLabels(labels); control.CodeOf(err) != control.Invalid || err == nil {
			t.Errorf("%v: %v", labels, err)
		}
	}
	if err := checkLabels(map[string]string{"job": "the backup, nightly", "e": ""}); err != nil {
		t.Error(err)
	}
}

// TestEventsByName: events say the name, and a snapshot that has ended is found by it.
func TestEventsByName(t *testing.T) {
	d := namedSnapshots()
	d.events.name(uuidA, "nightly")
	d.events.emit(control.Event{Snapshot: uuidA, Kind: control.EventCreated})
	d.events.emit(control.Event{Snapshot: uuidA, Kind: control.EventDestroyed})
	d.events.emit(control.Event{Snapshot: uuidB, Kind: control.EventCreated})
	delete(d.snapshots, uuidA)
	for ref, want := range map[string]string{"nightly": uuidA, "02e091": uuidA, uuidA: uuidA, "02e09f": uuidB} {
		if id, err := d.findEvents(ref); err != nil || id != want {
			t.Errorf("%s: %s, %v", ref, id, err)
		}
	}
	if id, err := d.findEvents("weekly"); control.CodeOf(err) != control.NotFound {
		t.Errorf("%s, %v", id, err)
	}
	for _, e := range d.events.recent {
		if (e.Name == "nightly") != (e.Snapshot == uuidA) {
			t.Errorf("%+v", e)
		}
	}
	if len(d.events.names) > 0 {
		t.Errorf("names of ended snapshots are kept: %v", d.events.names)
	}
}

// TestNextEnd: when the next snapshot is to be looked at.
func TestNextEnd(t *testing.T) {
	d := namedSnapshots()
	again := map[string]time.Time{"gone": {}}
	if wait := d.untilNextEnd(again); wait >= 0 || len(again) > 0 {
		t.Errorf("without an end: %v, %v", wait, again)
	}
	a, c := d.snapshots[uuidA], d.snapshots[uuidC]
	a.note.Ends, c.note.Ends = endAfter(time.Hour), endAfter(10*time.Second)
	if wait := d.untilNextEnd(again); wait > 10*time.Second || wait < 5*time.Second || d.isOver(c) {
		t.Errorf("the next one ends in 10 s: %v", wait)
	}
	c.note.Ends = bootNow()
	if wait := d.untilNextEnd(again); wait != 0 || !d.isOver(c) || d.isOver(a) {
		t.Errorf("one is over: %v", wait)
	}
	again[uuidC] = time.Now().Add(time.Minute)
	if wait := d.untilNextEnd(again); wait != maxEndWait {
		t.Errorf("one was looked at: %v", wait)
	}
	c.releasing = true
	if d.isOver(c) {
		t.Error("what is being given back is to be destroyed again")
	}
	if at := endAfter(time.Hour).wall(); time.Until(at) < 59*time.Minute || time.Until(at) > 61*time.Minute {
		t.Errorf("an hour from now is %v", at)
	}
	for ttl, ok := range map[time.Duration]bool{0: true, 1: true, maxTTL: true, -1: false, maxTTL + 1: false} {
		if err := checkTTL(ttl); (err == nil) != ok {
			t.Errorf("%v: %v", ttl, err)
		}
	}
}
