package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestCheckRecords: a program does not take over from a daemon what it would not know. What the
// daemon does not have either keeps nobody from it.
func TestCheckRecords(t *testing.T) {
	dir := RunDir(t.TempDir())
	d := &Daemon{opts: Options{Dir: dir}}
	id := uuid.New()
	snapshot := filepath.Join(d.snapshotsDir(), id.String(), "record.json")
	for _, sub := range []string{d.devicesDir(), filepath.Dir(snapshot)} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	dev := deviceRecord{Name: "data", Tag: ublk.NewTag(filterKind), Original: originalRecord{Number: "8:0"}, Geometry: ublk.Geometry{Size: 1 << 20, LogicalBlock: 512}}
	files := []struct {
		path, kind string
		newest     int
		holds      any
		fix        string
		lost       *control.Lost // by which a daemon says that it has that
	}{
		{d.deviceRecordFile("data"), deviceKind, deviceFormat, dev, "ublk-blksnap remove data", &control.Lost{Devices: []control.LostDevice{{Name: "data"}}}},
		{snapshot, "snapshot", 3, map[string]any{"id": id, "chunk": 4096}, "ublk-blksnap snapshot destroy " + id.String(), &control.Lost{Snapshots: []control.LostSnapshot{{ID: id.String()}}}},
		{d.frozenFile(), frozenKind, frozenFormat, frozenRecord{}, "daemon stop", nil},
		{d.hooksFile(), hooksKind, hooksFormat, hookRun{}, "daemon stop", nil},
		{d.removedFile(), removedKind, removedFormat, map[string]uint64{}, "daemon stop", nil},
		{d.outdatedFile(), outdatedKind, outdatedFormat, []outdated{}, "daemon stop", nil},
		{filepath.Join(dir.State(), eventsName), eventsKind, eventsFormat, savedEvents{}, "daemon stop", nil},
	}
	write := func(path, kind string, version int, v any) {
		t.Helper()
		if err := statefile.Write(path, kind, version, v); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir.State(), formatName), formatKind, stateFormat, format{Program: control.Version})
	for _, f := range files {
		write(f.path, f.kind, f.newest, f.holds)
	}
	if _, err := CheckTakeover(dir); err != nil {
		t.Fatalf("what it knows it does not take over: %v", err)
	}
	refused := func(what string, code control.Code, words ...string) {
		t.Helper()
		_, err := CheckTakeover(dir)
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) || control.CodeOf(err) != code {
				t.Errorf("%s: %v; want %q", what, err, w)
			}
		}
	}
	has := func(l control.Lost) { write(dir.path(recordName), recordKind, recordFormat, record{Lost: l}) }
	for _, f := range files {
		write(f.path, f.kind, f.newest+1, f.holds)
		refused(f.kind+" of a newer program", control.Unsupported, f.path, "newer version", f.fix)
		has(control.Lost{})
		refused(f.kind+" of a newer program, which nobody has", control.Unsupported, f.path)

		if err := os.WriteFile(f.path, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := CheckTakeover(dir); err != nil {
			t.Errorf("%s is damaged, and nobody has it: %v", f.kind, err)
		}
		if f.lost != nil {
			has(*f.lost)
			refused(f.kind+", which the daemon has, and is damaged", control.Corrupted, f.path, "damaged", f.fix)
		}
		if err := errors.Join(os.Remove(dir.path(recordName)), os.Remove(f.path)); err != nil {
			t.Fatal(err)
		}
		if f.lost == nil { // it need not be there
			if _, err := CheckTakeover(dir); err != nil {
				t.Errorf("without %s: %v", f.kind, err)
			}
		}
		write(f.path, f.kind, f.newest, f.holds)
	}
	if _, err := CheckTakeover(dir); err != nil {
		t.Error(err)
	}
}
