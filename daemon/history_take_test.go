package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestGenerationAtTake: why a take has begun a new generation is known.
func TestGenerationAtTake(t *testing.T) {
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
