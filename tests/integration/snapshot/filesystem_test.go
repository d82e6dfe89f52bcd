package snapshot

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestImageFilesystem mounts the image of a frozen filesystem beside its
// original: sound, as it was, and writable.
func TestImageFilesystem(t *testing.T) {
	for _, k := range []guest.Filesystem{guest.Ext4, guest.XFS, guest.Btrfs} {
		t.Run(k.Name, func(t *testing.T) {
			guest.NeedEither(t)
			disk := guest.RAMDisks(t, 1, max(k.Minimum, 128<<20))[0]
			d := program.Start(t)
			dev := d.Add(disk)
			k.Make(t, dev.Link)
			dir := guest.Mount(t, dev.Link)
			old := guest.SomeFiles(t, dir, 1)
			stop := guest.BusyFiles(t, dir)
			s := d.Take(0, dev)
			if s.Frozen <= 0 || s.Frozen > guest.Patience {
				t.Errorf("frozen for %v", s.Frozen)
			}
			stop()
			if err := os.RemoveAll(filepath.Join(dir, "set1/3")); err != nil {
				t.Fatal(err)
			}
			newer := guest.SomeFiles(t, dir, 2)
			unix.Sync()
			image := s.Images[0].Path

			if k.Name != "xfs" { // which leaves its counters to the log, frozen or not
				k.Check(t, image)
			}
			if k.Name == "btrfs" {
				imageOfBtrfs(t, d, dev, dir, image, old, newer)
				return
			}
			at := guest.Mount(t, image, k.Beside...)
			guest.SameFiles(t, filepath.Join(at, "set1"), guest.Below("set1", old))
			if _, err := os.Stat(filepath.Join(at, "set2")); err == nil {
				t.Error("the image shows what was written after the take")
			}
			more := guest.SomeFiles(t, at, 3)
			guest.Unmount(t, at)
			at = guest.Mount(t, image, k.Beside...)
			guest.SameFiles(t, filepath.Join(at, "set3"), guest.Below("set3", more))
			guest.SameFiles(t, filepath.Join(at, "set1"), guest.Below("set1", old))
			guest.Unmount(t, at)
			k.Check(t, image)

			guest.DropCaches(t)
			guest.SameFiles(t, filepath.Join(dir, "set2"), guest.Below("set2", newer))
			if _, err := os.Stat(filepath.Join(dir, "set3")); err == nil {
				t.Error("the original shows what was written to the image")
			}
			d.Destroy(s.ID)
			guest.Unmount(t, dir)
			k.Check(t, dev.Link)
			d.Remove(dev)
			k.Check(t, disk)
		})
	}
}

// imageOfBtrfs: btrfs knows its devices by their UUID, and takes an image for
// the original: until the kernel learned to tell them apart it refuses to mount
// one beside the other.
func imageOfBtrfs(t *testing.T, d *program.Daemon, dev control.Device, dir, image string, old, newer map[string][32]byte) {
	at, err := guest.TryMount(t, image)
	if err == nil {
		guest.SameFiles(t, filepath.Join(at, "set1"), guest.Below("set1", old))
		if _, err := os.Stat(filepath.Join(at, "set2")); err == nil {
			t.Error("the image shows what was written after the take")
		}
		guest.Unmount(t, at)
	} else {
		t.Logf("beside its original it is refused: %v", err)
		// Alone it can be mounted.
		guest.Unmount(t, dir)
		guest.Run(t, "btrfs", "device", "scan", "--forget")
		at = guest.Mount(t, image)
		guest.SameFiles(t, filepath.Join(at, "set1"), guest.Below("set1", old))
		guest.Unmount(t, at)
		guest.Run(t, "btrfs", "device", "scan", "--forget")
		dir = guest.Mount(t, dev.Link)
	}
	guest.SameFiles(t, filepath.Join(dir, "set2"), guest.Below("set2", newer))
	for _, id := range program.SnapshotIDs(t, d) {
		d.Destroy(id)
	}
	guest.Unmount(t, dir)
	guest.Btrfs.Check(t, dev.Link)
	d.Remove(dev)
}
