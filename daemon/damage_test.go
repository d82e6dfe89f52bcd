package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile/statefiletest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestDamage: nothing is believed of a file of the daemon's that is not, to the last bit,
// what a daemon has written, or that somebody else may have written.
func TestDamage(t *testing.T) {
	base, err := os.MkdirTemp("/dev/shm", "damage") // as the files' own filesystem: fast
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := RunDir(filepath.Join(base, "run"))
	if err := errors.Join(dir.make(), dir.subdir(stateName, 0o700)); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{events: newEventLog(), opts: Options{Dir: dir, Log: quiet(), Config: DefaultConfig()}, host: host(0), opLock: make(chan struct{}, 1)}
	d.opts.Config.StateDir = filepath.Join(base, "kept")
	d.opLock <- struct{}{}
	for _, sub := range []string{d.devicesDir(), d.cbtDir(), d.countersDir()} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	try := func(kind, path, stateKind string, version int, v any, read func() error) {
		t.Helper()
		if err := statefile.Write(path, stateKind, version, v); err != nil {
			t.Fatal(err)
		}
		statefiletest.Try(t, statefiletest.Statefile(t, kind, path, read))
	}
	try("format", filepath.Join(dir.State(), formatName), formatKind, stateFormat, format{Program: "1"}, func() error {
		_, err := dir.formatFound()
		return err
	})
	try("start", dir.path(startName), startKind, startVersion, startRecord{By: byGuard, Program: "/p"}, func() error {
		_, err := dir.startRecord()
		return err
	})
	try("daemon", dir.path(recordName), recordKind, recordFormat, record{Process: "long ago", Lost: control.Lost{PID: 1, Devices: []control.LostDevice{{Name: "data"}}}}, func() error {
		lost, err := dir.lost()
		if err == nil && (lost == nil || len(lost.Devices) != 1) {
			t.Errorf("%+v", lost)
		}
		return err
	})
	record := deviceRecord{Name: "data", Tag: ublk.NewTag(filterKind), Original: originalRecord{Number: "8:0"}, Geometry: ublk.Geometry{Size: 1 << 20, LogicalBlock: 512}}
	try("device", d.deviceRecordFile("data"), deviceKind, deviceFormat, record, func() error {
		_, err := d.readDeviceRecord("data")
		return err
	})
	events := filepath.Join(dir.State(), "events.json")
	try("events", events, eventsKind, eventsFormat, savedEvents{Seq: 7, Recent: []control.Event{{Kind: control.EventLost}}}, func() error {
		l, err := openEventLog(events, func(error) {})
		if err != nil && len(l.recent) != 0 {
			t.Errorf("%+v of %v", l, err)
		}
		return err
	})
	try("recoveries", filepath.Join(dir.State(), "recoveries"), "recoveries", 1, recoveries{Count: 5}, func() error {
		if n := d.countRecovery(true); n != 6 {
			return errors.New("counted anew")
		}
		return nil
	})
	try("removed", d.removedFile(), removedKind, removedFormat, map[string]uint64{"data": 3}, func() error {
		d.boot.removed = map[string]uint64{}
		err := d.readRemoved()
		if err != nil && len(d.boot.removed) > 0 {
			t.Errorf("%v of %v", d.boot.removed, err)
		}
		return err
	})
	try("frozen", d.frozenFile(), frozenKind, frozenFormat, frozenRecord{[]frozenPoint{{Point: "/srv"}}}, func() error {
		_, err := d.leftFrozen()
		return err
	})
	try("hooks", d.hooksFile(), hooksKind, hooksFormat, hookRun{Hooks: []string{"/h/db"}, Snapshot: "u"}, func() error {
		return statefile.Load(d.hooksFile(), hooksKind, hooksFormat, &hookRun{})
	})
	try("outdated", d.outdatedFile(), outdatedKind, outdatedFormat, []outdated{{disk.Identity{"serial=a"}, "/var/lib/x"}}, func() error {
		d.outdated = nil
		if d.openOutdated(); len(d.outdated) != 1 {
			return errors.New("said")
		}
		return nil
	})
	t.Run("note", func(t *testing.T) { damagedNote(t, d) })
	t.Run("counters", func(t *testing.T) { damagedCounters(t, d.countersFile("data")) })
	t.Run("change map", func(t *testing.T) { damagedChangeMap(t, d) })
}

// damagedNote: a note of another boot.
func damagedNote(t *testing.T, d *Daemon) {
	id := uuid.New()
	text, err := statefile.Encode("lost-snapshot", 1, map[string]any{"id": id, "created": time.Now(), "boot": "another", "devices": nil, "storage": nil})
	if err == nil {
		err = d.writeNote(id.String()+noteSuffix, text)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(notesDir(d.opts.Config.StateDir), id.String()+noteSuffix)
	statefiletest.Try(t, statefiletest.Statefile(t, "note", path, func() error {
		lost, err := d.lostBefore()
		if (err == nil) != (len(lost) == 1) {
			t.Errorf("%v of %v", lost, err)
		}
		return err
	}))
}

// damagedCounters: they begin anew, at zero.
func damagedCounters(t *testing.T, path string) {
	c, err := openCounters(path, 2)
	if err != nil {
		t.Fatal(err)
	}
	c.queues[1].Errors.Store(5)
	c.unmap()
	statefiletest.Try(t, statefiletest.File{Kind: "counters", Path: path, Header: 16,
		Future: func(whole []byte) []byte { whole[7]++; return whole },
		Read: func() error {
			c, err := openCounters(path, 2)
			if err != nil {
				return err
			}
			defer c.unmap()
			if c.queues[1].Errors.Load() != 5 {
				return errors.New("they are for people, and begin anew")
			}
			return nil
		}})
}

// damagedChangeMap: all of the disk counts as changed.
func damagedChangeMap(t *testing.T, d *Daemon) {
	dev := &device{geo: ublk.Geometry{Size: 1 << 20}}
	if err := d.createChangeMap(dev, "data"); err != nil {
		t.Fatal(err)
	}
	dev.cbt.Switch() // so that both copies of its header are there
	before, err := dev.cbt.Info()
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.cbt.Close(); err != nil {
		t.Fatal(err)
	}
	const copySize, copies, flag = 56, 128, 256 // see package cbtmap
	statefiletest.Try(t, statefiletest.File{Kind: "change map", Path: d.cbtFile("data"), Header: 512,
		Free:   [][2]int{{copySize, copies}, {copies + copySize, flag}, {flag, 512}},
		Future: func(whole []byte) []byte { whole[24]++; return whole },
		Read: func() error {
			dev := &device{geo: ublk.Geometry{Size: 1 << 20}}
			if err := d.adoptChangeMap(dev, &survivor{record: deviceRecord{Name: "data"}}); err != nil {
				return err
			}
			defer dev.cbt.Close()
			now, err := dev.cbt.Info()
			switch anew := now.GenerationID != before.GenerationID; {
			case err != nil:
				return err
			case anew && dev.History.Reason != control.HistoryDamaged:
				t.Errorf("begins anew without a word: %+v", dev.History)
			case !anew && now != before:
				t.Errorf("was %+v, is %+v", before, now)
			case anew:
				return errors.New(dev.History.Text)
			}
			return nil
		}})
}
