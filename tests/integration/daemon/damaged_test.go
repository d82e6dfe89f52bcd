package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestDamagedSnapshot: a snapshot whose files cannot be trusted ends with its event, and
// nothing of it is left. Another of the same disk goes on, and so does the filter, whose
// users notice a pause.
func TestDamagedSnapshot(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	disk, store := guest.LoopDisk(t, size, 512), t.TempDir()
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	flipped := func(n int) func([]byte) []byte { return func(text []byte) []byte { text[n] ^= 1; return text } }
	cut := func(text []byte) []byte { return text[:len(text)/2] }
	damages := []struct {
		file   string // of the snapshot's directory; empty: none
		damage func(text []byte) []byte
		said   string // of why it ends
	}{
		{"", nil, ""},
		{"record.json", flipped(100), "record.json"},
		{"record.json", cut, "record.json"},
		{"take", flipped(0), "take"},
		{"log", flipped(8), "log"},
		{"words-0", cut, "words-0"},
		{"pool", cut, "pool"},
		{"key", flipped(1), "another key"},
	}
	snaps := make([]control.Snapshot, len(damages))
	images := make([]*stamp.World, len(damages))
	for i, c := range damages {
		encrypt := c.file == "key"
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Encrypt: &encrypt, Storage: []control.Storage{{Path: store}}})
		images[i] = w.Fork()
		snaps[i] = d.Taken(s.ID)
		if err := w.Fill(dev.Path); err != nil {
			t.Fatal(err)
		}
	}
	used, err := os.OpenFile(snaps[1].Images[0].Path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	stop := w.StartWriters(t, 1, stamp.Mix{Writers: 2, Zeroes: true}, dev.Path)
	w.More(t, 50)
	d.Kill()
	for i, c := range damages[1:] {
		path := filepath.Join(d.RunDir.State(), "snapshots", snaps[i+1].ID, c.file)
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, c.damage(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	d.Restart()
	w.More(t, 50)
	if got := program.SnapshotIDs(t, d); !slices.Equal(got, []string{snaps[0].ID}) {
		t.Errorf("snapshots %v, only %s is whole", got, snaps[0].ID)
	}
	for i, c := range damages[1:] {
		kinds, last := d.Corrupted(snaps[i+1].ID)
		t.Logf("%s: %q, %s", c.file, kinds, last.Text)
		if !strings.Contains(last.Text, c.said) || last.Errno == 0 {
			t.Errorf("%s: it ends with %+v", c.file, last)
		}
	}
	if _, err := used.ReadAt(alignedBuf(4096), 0); err == nil {
		t.Error("the image of a snapshot that has ended can be read")
	}
	used.Close()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := images[0].Same(snaps[0].Images[0].Path); err != nil {
		t.Errorf("the image of the whole one: %v", err)
	}
	if err := w.Same(dev.Path); err != nil {
		t.Errorf("the filter: %v", err)
	}
	left := func(dir string, want int) {
		t.Helper()
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != want {
			t.Errorf("in %s there are %v, %v; want %d", dir, entries, err, want)
		}
	}
	left(filepath.Join(d.RunDir.State(), "snapshots"), 1)
	d.Destroy(snaps[0].ID)
	left(filepath.Join(d.RunDir.State(), "snapshots"), 0)
	left(store, 0)
	if devices, _ := filepath.Glob("/dev/ublkb*"); len(devices) != 1 {
		t.Errorf("devices %v, one is the filter", devices)
	}
	d.Remove(dev)
}
