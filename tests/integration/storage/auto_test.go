package storage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestAutoAppend has a snapshot that runs low get more storage by itself, from a daemon
// that was killed since it was told to; and not where that would take the last room.
func TestAutoAppend(t *testing.T) {
	guest.NeedEither(t)
	const size, limit = 16 << 20, 4 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	buf := direct.Pages(t, 64<<10)
	write := func(from, to int64) {
		t.Helper()
		f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
		defer f.Close()
		for pos := from; pos < to; pos += int64(len(buf)) {
			x := w.Disks[0].Begin(pos/stamp.SectorSize, (pos+int64(len(buf)))/stamp.SectorSize, false)
			stamp.Fill(buf, x.Version, 0, pos/stamp.SectorSize)
			if err := f.WriteAt(buf, pos); err != nil {
				t.Fatal(err)
			}
			x.Done()
		}
	}
	// await waits for an event of a snapshot.
	await := func(id, kind string) (found control.Event) {
		t.Helper()
		err := d.Watch(guest.Context(t), control.WatchRequest{ID: id}, func(e control.Event) error {
			if e.Kind == kind {
				found = e
				return os.ErrExist
			}
			return nil
		})
		if found.Kind == "" {
			t.Fatalf("no event %s: %v", kind, err)
		}
		return found
	}
	create := func(dir string) (control.Snapshot, *stamp.Window) {
		t.Helper()
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: limit}},
			AutoAppend: &control.AutoAppend{Path: dir}})
		win := w.Open()
		s = d.Taken(s.ID)
		win.Close()
		return s, win
	}

	small := guest.SmallFS(t, 64<<20)
	s, win := create(small)
	write(0, limit/2)
	d.Kill()
	d.Restart()
	if s = d.Show(s.ID); s.AutoAppend == nil || *s.AutoAppend != (control.AutoAppend{Path: small, Reserve: 10}) || len(s.Storage) != 1 {
		t.Fatalf("the next daemon has %+v", s)
	}
	write(limit/2, limit*9/10/int64(len(buf))*int64(len(buf)))
	if e := await(s.ID, control.EventAppended); !strings.Contains(e.Text, small) {
		t.Errorf("event %+v", e)
	}
	d.Kill() // what was appended is on record
	d.Restart()
	write(0, size)
	s = d.Show(s.ID)
	if s.Errno != 0 || len(s.Storage) != 2 || !s.Storage[1].Auto || s.Usage.Copied != size || s.Storage[1].Spare < 64<<20*9/100 {
		t.Errorf("after all was written: %+v", s)
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	d.Destroy(s.ID)

	if err := os.WriteFile(filepath.Join(small, "others"), make([]byte, 60<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = create(small)
	write(0, limit*9/10/int64(len(buf))*int64(len(buf)))
	if e := await(s.ID, control.EventNotAppended); !strings.Contains(e.Text, "stay free") {
		t.Errorf("event %+v", e)
	}
	if s = d.Show(s.ID); len(s.Storage) != 1 {
		t.Errorf("with no room: %+v", s)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}
