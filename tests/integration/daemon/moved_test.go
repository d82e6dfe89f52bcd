package daemon

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestMovedVolume: a volume comes to lie on another disk under its filter, which makes its identity
// another one, and the daemon dies. What the next one keeps of it counts alone, and is taken back
// when somebody else has the volume after another death.
func TestMovedVolume(t *testing.T) {
	guest.NeedEither(t)
	guest.Run(t, "modprobe", "dm-mod")
	first, second := guest.LoopDisk(t, 8<<20, 512), guest.LoopDisk(t, 8<<20, 512)
	volume := guest.DMDisk(t, "moves", guest.LinearTable(t, first))
	guest.Run(t, "dmsetup", "rename", "moves", "--setuuid", "TEST-moves") // else it is not known again
	d := program.Start(t)
	dev := d.Add(volume)
	running := func(want int) []string {
		t.Helper()
		left, err := filepath.Glob(filepath.Join(d.StateDir, "*.running"))
		if err != nil || len(left) != want {
			t.Fatalf("there are %v, %v", left, err)
		}
		return left
	}
	was := running(1)[0]
	guest.ReloadDM(t, "moves", guest.LinearTable(t, second)) // both disks are empty
	d.Kill()
	d.Restart()
	if now := running(1)[0]; now == was {
		t.Error("the volume has the identity that it had")
	}
	d.Kill()
	var other *os.File
	guest.WaitFor(t, "the dead daemon to let go of the volume", func() bool {
		var err error
		other, err = os.OpenFile(volume, os.O_RDWR|unix.O_EXCL, 0)
		return err == nil
	})
	d.Restart()
	guest.WaitFor(t, "nothing to count any more", func() bool {
		left, err := filepath.Glob(filepath.Join(d.StateDir, "*.running"))
		return err == nil && len(left) == 0
	})
	if a := d.Call("ublk-blksnap", "remove", "--force", dev.Name); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	running(0)
	other.Close()
	d.Remove(d.Add(volume))
}
