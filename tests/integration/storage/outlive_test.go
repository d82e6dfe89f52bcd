package storage

import (
	"os"
	"os/exec"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// TestStorageOutlivesProcess runs the tests of package snapshots that kill a process
// with storage on each filesystem: what keeps a file without a name for the next
// process, and lets it go in the end, is the filesystem's and the kernel's. The long
// form has all of them; the short one has ext4 on the older kernel, XFS on the newer.
func TestStorageOutlivesProcess(t *testing.T) {
	guest.Need(t)
	tests := guest.TreeFile(t, ".cache/test/snapshots.test") // as make integration builds it
	filesystems := []guest.Filesystem{guest.Ext4, guest.XFS, guest.Btrfs}
	switch {
	case guest.Long():
	case guest.KernelAtLeast(t, 7, 0):
		filesystems = filesystems[1:2]
	default:
		filesystems = filesystems[:1]
	}
	for _, fs := range filesystems {
		t.Run(fs.Name, func(t *testing.T) {
			disk := guest.LoopDisk(t, 2*fs.Minimum, 512)
			fs.Make(t, disk)
			dir := guest.Mount(t, disk)
			cmd := exec.Command(tests, "-test.short", "-test.run", "^(TestReopen|TestStorageLost|TestStorageMoved|TestStorageThatWasThere|TestLeftoverSpace)$")
			if !guest.Long() { // namespaces and ciphers are the same on each filesystem
				cmd.Args = append(cmd.Args, "-test.skip", "^TestReopen$/^(own|encrypted)")
			}
			cmd.Dir = guest.TreeFile(t, "snapshots")
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
			guest.Unmount(t, dir)
			fs.Check(t, disk)
		})
	}
}
