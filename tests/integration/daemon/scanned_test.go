package daemon

import (
	"os/exec"
	"sync"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestKilledWhileScanned: somebody reads the partition table of a filter whose disk does not
// answer. Until that ends nobody else can open the filter, nor can who wants to remove it.
// A daemon that is killed then ends all the same, and the next one goes on.
func TestKilledWhileScanned(t *testing.T) {
	guest.Need(t)
	guest.NeedKernel(t, 7, 0, "before, the kernel reads no partition table of a filter")
	guest.Run(t, "modprobe", "dm-mod")
	disk := guest.DMDisk(t, "scanned", guest.LinearTable(t, guest.RAMDisks(t, 1, 16<<20)[0]))
	d := program.Start(t, "disk_timeout=3s")
	dev := d.Add(disk)
	guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "scanned")
	resume := sync.OnceFunc(func() { guest.Run(t, "dmsetup", "resume", "scanned") })
	t.Cleanup(resume)
	scan := exec.Command("blockdev", "--rereadpt", dev.Path)
	if err := scan.Start(); err != nil {
		t.Fatal(err)
	}
	scanned := make(chan error, 1)
	go func() { scanned <- scan.Wait() }()
	guest.WaitFor(t, "a read under way", func() bool {
		s, err := d.DeviceStatus(guest.Context(t), dev.Name)
		return err == nil && s.InFlight > 0
	})
	err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
	program.WantError(t, err, control.Timeout, disk+" does not answer", "nothing has changed")
	d.Kill()
	resume()
	d.Restart()
	if err := guest.Await(t, "the reading of the partition table", scanned); err != nil {
		t.Error(err)
	}
	d.Remove(dev)
}
