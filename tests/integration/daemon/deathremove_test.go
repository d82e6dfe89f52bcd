package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func (v *victim) removes(dev control.Device) func() error {
	return func() error { return v.RemoveDevice(guest.Context(v.t), control.RemoveRequest{Device: dev.Name}) }
}

// TestDeathInRemove: nothing that was written is lost, and the change map goes on, whether
// the device does, or the next daemon brings the removal to its end.
func TestDeathInRemove(t *testing.T) {
	v := newVictim(t)
	everyStep(t, 1, func(n int) bool {
		v.dies(n)
		dev := v.device()
		v.write(uint64(n))
		before := v.CBT(dev)
		died := v.try(v.removes(dev))
		now := v.device()
		if after := v.CBT(now); after.GenerationID != before.GenerationID {
			t.Errorf("n = %d: the change map began anew: %+v", n, after.History)
		}
		v.shows(now.Path, uint64(n))
		v.clean()
		v.shows(v.disk, uint64(n))
		return died
	})
}

// TestWrittenAfterDeathInRemove: when a daemon has died in a removal, and the device is gone
// but its change map not kept, nobody holds the disk. The next daemon keeps the map only if
// nobody has written to the disk meanwhile.
func TestWrittenAfterDeathInRemove(t *testing.T) {
	guest.NeedEither(t)
	v := newVictim(t)
	v.Restart()
	before := v.CBT(v.device())
	v.clean()
	// dieBetween has the daemon die when the device is gone and its map is not kept.
	n := 4
	dieBetween := func() {
		t.Helper()
		for ; ; n++ {
			v.dies(n)
			dev := v.device()
			v.write(1)
			v.armed()
			err := v.removes(dev)()
			os.Remove(v.arm)
			if err == nil || !v.Ended(guest.Patience) {
				t.Fatalf("at no step up to %d is the device gone and its map not kept: %v", n, err)
			}
			kept, err := filepath.Glob(filepath.Join(v.StateDir, "*.json"))
			if err != nil {
				t.Fatal(err)
			}
			if len(kept) == 0 && len(guest.UblkDevices()) == 0 {
				return
			}
			v.Restart()
			v.StopAndWait()
		}
	}
	dieBetween()
	v.Restart()
	if now := v.CBT(v.device()); now.GenerationID != before.GenerationID {
		t.Errorf("nobody has written to the disk, and the change map began anew: %+v", now.History)
	}
	v.clean()

	dieBetween()
	f := direct.MustOpen(t, v.disk, unix.O_RDWR)
	if err := f.WriteAt(direct.Pages(t, 4096), victimSize/2); err != nil {
		t.Fatal(err)
	}
	f.Close()
	v.Restart()
	if now := v.CBT(v.device()); now.GenerationID == before.GenerationID {
		t.Errorf("somebody has written to the disk, and the change map goes on: %+v", now.History)
	}
	v.clean()
	t.Logf("dies at step %d", n)
}
