package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// aMap is a change map of a small disk.
func aMap(t *testing.T) *cbtmap.Map {
	t.Helper()
	shm, err := os.MkdirTemp("/dev/shm", "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	m, err := cbtmap.Create(filepath.Join(shm, "map"), 1<<20, cbtmap.Params{MinimumShift: 16, MaximumShift: 16, MaximumCount: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// TestGenerationAtTake: why a take has begun a new generation is known.
func TestGenerationAtTake(t *testing.T) {
	m := aMap(t)
	var last cbtmap.Info
	take := func() (control.History, bool) {
		last, _ = m.Info()
		return whyAnew(last, m.Switch())
	}
	for n := 1; n < 255; n++ {
		if h, anew := take(); anew {
			t.Fatalf("take %d: %+v", n, h)
		}
	}
	if h, anew := take(); !anew || h.Reason != control.HistoryNumbers || h.Continued || !strings.Contains(h.Text, last.GenerationID.String()) {
		t.Errorf("when the numbers have run out: %v, %+v", anew, h)
	}
	if h, anew := take(); anew {
		t.Errorf("the next take: %+v", h)
	}
	m.SetCorrupted()
	if h, anew := take(); !anew || h.Reason != control.HistoryDamaged || h.Text == "" {
		t.Errorf("a corrupted map: %v, %+v", anew, h)
	}
	if h, anew := take(); anew {
		t.Errorf("the next take: %+v", h)
	}
}

// TestGenerationOfDeadTake: it is told once that a take of a daemon that died has begun a new
// generation, also if one before has ended for the same reason.
func TestGenerationOfDeadTake(t *testing.T) {
	m := aMap(t)
	d := &Daemon{events: newEventLog(), opts: Options{Dir: RunDir(t.TempDir()), Log: quiet()}}
	dev := &device{cbt: m}
	before, _ := m.Info()
	for ended := range 2 {
		now := m.Switch()
		for now.GenerationID == before.GenerationID {
			before, now = now, m.Switch()
		}
		for range 2 { // by the next daemon, and by one after it
			d.tellLeftGeneration(dev, "s", before, now)
		}
		if h := d.history(dev); h.Reason != control.HistoryNumbers || !strings.Contains(h.Text, before.GenerationID.String()) {
			t.Errorf("generation %d has ended, which was %v, and this is told: %+v", ended+1, before.GenerationID, h)
		}
		if told := len(d.events.recent); told != ended+1 {
			t.Errorf("generation %d has ended, and there are %d events", ended+1, told)
		}
		before = now
	}
}
