package storage

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestNotSwapped: the kernel takes all memory from the daemon that it can get, and still
// neither a snapshot's key nor a disk's data in the pool comes to the swap space. A file
// on another tmpfs does.
func TestNotSwapped(t *testing.T) {
	guest.Need(t)
	guest.StayInMemory(t) // this process has the key too
	const size = 16 << 20
	disks := guest.RAMDisks(t, 4, size)
	group := guest.Cgroup(t, "swapped", 0)
	guest.Enter(t, group) // with the daemon
	d := program.Start(t, "diff_buffer_pool_size=16M")
	dev := d.Add(disks[0])
	w := stamp.NewWorld(dev.Size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	encrypt := true
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Encrypt: &encrypt, Storage: []control.Storage{{Path: disks[1], Overwrite: true}, {Path: disks[3], Overwrite: true}}})
	s = d.Taken(s.ID)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(d.RunDir.State(), "snapshots", s.ID, "key"))
	if err != nil || len(key) != 64 {
		t.Fatalf("a key of %d bytes, %v", len(key), err)
	}
	other := make([]byte, 64)
	_, _ = rand.Read(other)
	if err := os.WriteFile(filepath.Join(guest.SmallFS(t, 1<<20), "other"), bytes.Repeat(other, 64), 0o600); err != nil {
		t.Fatal(err)
	}

	guest.Swap(t, disks[2], size)
	space, all := direct.MustOpen(t, disks[2], os.O_RDONLY), direct.Pages(t, size)
	onSwap := func(what []byte) bool {
		t.Helper()
		if err := space.ReadAt(all, 0); err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(all, what)
	}
	guest.WaitFor(t, "the other file in the swap space", func() bool {
		guest.Reclaim(t, group, 4<<20)
		return onSwap(other)
	})
	if onSwap(key[:32]) || onSwap(key[32:]) {
		t.Error("the key is in the swap space")
	}
	f, err := os.Open(disks[2])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n := stamps(t, f); n > 0 {
		t.Errorf("%d sectors of the disk are in the swap space", n)
	}
	if err := w.Same(dev.Path); err != nil {
		t.Error(err)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}
