package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestNoteFails: of a note for which there is no room nothing is left.
func TestNoteFails(t *testing.T) {
	d := &Daemon{opts: Options{Dir: RunDir(t.TempDir())}}
	if err := os.Mkdir(d.opts.Dir.udev(), 0o755); err != nil {
		t.Fatal(err)
	}
	note := filepath.Join(d.opts.Dir.udev(), "ublkb0")
	if err := os.Symlink("/dev/full", note); err != nil {
		t.Fatal(err)
	}
	if err := d.note("ublkb0", "filter", "vdb"); err == nil {
		t.Error("no error")
	}
	if _, err := os.Lstat(note); !os.IsNotExist(err) {
		t.Errorf("the note is left: %v", err)
	}
}

func TestRoomForQueues(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		queues, depth int
		mode          control.Mode
		available     int64
		ok            bool
	}{
		{1, 128, control.ModeAuto, gib, true}, // 64 MiB
		{4, 4096, control.ModeAuto, 8 * gib, false},
		{4, 4096, control.ModeCopy, 32 * gib, true},
		{4, 4096, control.ModeZeroCopy, gib, true}, // has no buffers
		{4, 4096, control.ModeCopy, 0, true},       // nobody knows
	} {
		err := checkQueueMemory(control.AddRequest{Queues: c.queues, Depth: c.depth, Mode: c.mode}, c.available)
		if (err == nil) != c.ok {
			t.Errorf("%d queues of %d, %s, %d GiB: %v", c.queues, c.depth, c.mode, c.available>>30, err)
		}
	}
}
