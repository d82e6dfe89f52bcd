package storage

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestDiscardNotCopied: what is discarded is not copied. The kernel module did so
// until the storage overflowed. TestTrim does it with a filesystem.
func TestDiscardNotCopied(t *testing.T) {
	guest.NeedEither(t)
	const size = 64 << 20
	disk := guest.LoopDisk(t, size, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 1 << 20}}})
	win := w.Open()
	s = d.Taken(s.ID)
	win.Close()
	guest.Run(t, "blkdiscard", dev.Path)
	if got := d.Show(s.ID); got.Usage.Copied != 0 || got.Errno != 0 {
		t.Errorf("the discard copied: %+v", got)
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	// Zeroes are content: they are copied, and here that overflows.
	guest.Run(t, "blkdiscard", "-z", dev.Path)
	if got := d.Show(s.ID); got.Errno != -int(unix.ENOSPC) {
		t.Errorf("after 64 MiB of zeroes: %+v", got)
	}
	zero := bytes.Repeat([]byte{0}, direct.BufferSize)
	if err := direct.Scan(disk, size, func(p []byte, sector int64) error {
		if !bytes.Equal(p, zero[:len(p)]) {
			return fmt.Errorf("I5: no zeroes at sector %d", sector)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}

// TestTrim is the trim of a whole filesystem while a snapshot is held: it
// neither copies nor overflows, and the image stays right.
func TestTrim(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.LoopDisk(t, 128<<20, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	sums := guest.SomeFiles(t, dir, 1)
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("data"), 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 4 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 8 << 20}}})
	s = d.Taken(s.ID)
	image := s.Images[0].Path
	was := direct.Digest(t, image)
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	before := d.Show(s.ID).Usage.Copied
	out := guest.Run(t, "fstrim", "-v", dir)
	unix.Sync()
	after := d.Show(s.ID)
	// The filesystem writes a little of its own.
	if after.Errno != 0 || after.Usage.Copied-before > 1<<20 {
		t.Errorf("the trim (%s) copied %d bytes: %+v", strings.TrimSpace(out), after.Usage.Copied-before, after)
	}
	if got := direct.Digest(t, image); got != was {
		t.Error("I1: the image has changed")
	}
	st, err := d.DeviceStatus(guest.Context(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	if n := st.Operations[control.OpDiscard].Bytes; n < 64<<20 || st.DiscardsSkipped < 32<<20 {
		t.Errorf("%d bytes discarded, %d not passed on", n, st.DiscardsSkipped)
	}
	at := guest.Mount(t, image)
	if p, err := os.ReadFile(filepath.Join(at, "big")); err != nil || !bytes.Equal(p, bytes.Repeat([]byte("data"), 8<<20)) {
		t.Errorf("the removed file in the image: %d bytes, %v", len(p), err)
	}
	guest.Unmount(t, at)
	d.Destroy(s.ID)

	// Without a snapshot the trim reaches the original. Until it is mounted anew
	// ext4 thinks that it has been trimmed.
	guest.Unmount(t, dir)
	dir = guest.Mount(t, dev.Link)
	allocated := blocksOf(t, disk)
	guest.Run(t, "fstrim", "-v", dir)
	if now := blocksOf(t, disk); now > allocated-16<<20 {
		t.Errorf("%d bytes are allocated after the trim, %d before", now, allocated)
	}
	guest.DropCaches(t)
	guest.SameFiles(t, filepath.Join(dir, "set1"), guest.Below("set1", sums))
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, dev.Link)
	d.Remove(dev)
}

// blocksOf is how many bytes the file below a loop device occupies.
func blocksOf(t testing.TB, loop string) int64 {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(strings.TrimSpace(string(b)), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestDiscardHeld discards pieces of the original in random order while it is
// held, between writes: the image does not change.
func TestDiscardHeld(t *testing.T) {
	guest.NeedEither(t)
	const size = 16 << 20
	disk := guest.LoopDisk(t, size, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.Open()
	a, b := d.Take(4<<10, dev), d.Take(64<<10, dev)
	win.Close()
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	r := stamp.NewWriter(stamp.NewWorld(size).Disks[0], nil, stamp.Mix{Writers: 1}, 0, 9)
	buf := direct.Pages(t, direct.BufferSize)
	for range 400 {
		from, to := r.Place()
		var err error
		if r.Rand.Intn(2) == 0 {
			err = guest.IoctlRange(f.FD, unix.BLKDISCARD, from*stamp.SectorSize, (to-from)*stamp.SectorSize)
		} else {
			stamp.Fill(buf[:(to-from)*stamp.SectorSize], 1<<40, 0, from)
			err = f.WriteAt(buf[:(to-from)*stamp.SectorSize], from*stamp.SectorSize)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := guest.IoctlRange(f.FD, unix.BLKDISCARD, 0, size); err != nil {
		t.Fatal(err)
	}
	for _, s := range []control.Snapshot{a, b} {
		if err := win.Check(s.Images[0].Path); err != nil {
			t.Errorf("I1, chunks of %d: %v", s.ChunkSize, err)
		}
		d.Destroy(s.ID)
	}
	// All of it counts as changed.
	d.Destroy(d.Take(0, dev).ID)
	if i := slices.Index(d.Map(dev), 0); i >= 0 {
		t.Errorf("I3: block %d, which was discarded, is not marked", i)
	}
	f.Close()
	d.Remove(dev)
}
