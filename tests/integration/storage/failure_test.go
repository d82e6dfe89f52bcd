package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestOverflow is I5: the storage comes to its end, or breaks, while writers go
// on. The snapshot breaks aloud; the original has no part in it.
func TestOverflow(t *testing.T) {
	guest.NeedEither(t)
	const size = 24 << 20
	ram := guest.RAMDisks(t, 2, size)
	guest.Run(t, "modprobe", "dm-mod")
	store := guest.LinearTable(t, ram[1])
	for _, c := range []struct {
		name    string
		storage func(t *testing.T) control.Storage
		breaks  func(t *testing.T) // after the take
		broken  func(t *testing.T, st control.Storage)
		errno   unix.Errno
		events  []string // after low_free_space, which a fast writer may outrun
	}{
		{
			name:    "limit",
			storage: func(t *testing.T) control.Storage { return control.Storage{Path: "/dev/shm", Limit: 6 << 20} },
			errno:   unix.ENOSPC,
			events:  []string{control.EventNoSpace, control.EventCorrupted},
		}, {
			name: "full filesystem",
			storage: func(t *testing.T) control.Storage {
				return control.Storage{Path: filepath.Join(guest.SmallFS(t, 6<<20), "differences")}
			},
			errno:  unix.ENOSPC,
			events: []string{control.EventNoSpace, control.EventCorrupted},
			broken: func(t *testing.T, st control.Storage) { // nobody gave a limit, so others have room yet
				var fs unix.Statfs_t
				if err := unix.Statfs(filepath.Dir(st.Path), &fs); err != nil {
					t.Fatal(err)
				}
				free := int64(fs.Bavail) * fs.Bsize
				if total := int64(fs.Blocks) * fs.Bsize; st.Spare < total/25 || free < st.Spare || free > total/10 || st.Most > total-st.Spare {
					t.Errorf("%d of %d bytes are free with %+v", free, total, st)
				}
			},
		}, {
			name:    "full device",
			storage: func(t *testing.T) control.Storage { return control.Storage{Path: guest.LoopDisk(t, 6<<20, 512)} },
			errno:   unix.ENOSPC,
			events:  []string{control.EventNoSpace, control.EventCorrupted},
		}, {
			name:    "storage error",
			storage: func(t *testing.T) control.Storage { return control.Storage{Path: guest.DMDisk(t, "store", store)} },
			breaks:  func(t *testing.T) { guest.ReloadDM(t, "store", fmt.Sprintf("0 %d error", size>>9)) },
			errno:   unix.EIO,
			events:  []string{control.EventCorrupted},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			storage := c.storage(t)
			d := program.Start(t)
			queues := guest.QueueCounts()
			dev := d.Add(ram[0], program.Queues(queues[len(queues)-1], 32))
			w := stamp.NewWorld(size)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			stop := w.StartWriters(t, 6, stamp.Mix{Writers: 4, Zeroes: true}, dev.Path)
			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{storage}})
			s = d.Taken(s.ID)
			if c.breaks != nil {
				c.breaks(t)
			}
			kinds, last := d.Corrupted(s.ID)
			if kinds[0] == control.EventLowFreeSpace {
				kinds = kinds[1:]
			}
			if !slices.Equal(kinds, c.events) {
				t.Errorf("events %q, want %q", kinds, c.events)
			}
			if last.Device != dev.OriginalNumber || last.Errno != -int(c.errno) {
				t.Errorf("event %+v, want device %s, error %d", last, dev.OriginalNumber, -int(c.errno))
			}
			image := s.Images[0].Path
			err := direct.Scan(image, 1<<20, func([]byte, int64) error { return nil })
			if !errors.Is(err, unix.EIO) {
				t.Errorf("read of the image: %v", err)
			}
			f := direct.MustOpen(t, image, unix.O_RDWR)
			if err := f.WriteAt(direct.Pages(t, 4096), 0); !errors.Is(err, unix.EIO) {
				t.Errorf("write to the image: %v", err)
			}
			f.Close()
			s = d.Show(s.ID)
			if s.State != control.SnapshotCorrupted || s.Errno != -int(c.errno) || s.Images[0].Errno != -int(c.errno) {
				t.Errorf("I5: snapshot %+v", s)
			}
			if a := d.Call("blksnap", "snapshot_info", "-d", dev.Path, "-f", "error_code"); a.Out != fmt.Sprintf("%d\n", -int(c.errno)) {
				t.Errorf("snapshot_info: %+v", a)
			}
			if c.broken != nil {
				c.broken(t, s.Storage[0])
			}
			// The original goes on.
			w.More(t, 50) // I5
			// A new one works at once, beside the broken one.
			win := w.Open()
			next := d.Take(16<<10, dev)
			win.Close()
			d.Destroy(s.ID)
			if err := win.Check(next.Images[0].Path); err != nil {
				t.Errorf("I1, next snapshot: %v", err)
			}
			d.Destroy(next.ID)
			if err := stop(); err != nil {
				t.Errorf("I5: a writer noticed: %v", err)
			}
			d.Remove(dev)
			if err := w.Same(ram[0]); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestCopyError has the original fail to read what a snapshot needs: that
// breaks the snapshot (I5), and the write that needed it goes on.
func TestCopyError(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	guest.Run(t, "modprobe", "dm-flakey")
	disk := guest.DMDisk(t, "readerrors", guest.LinearTable(t, ram))
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Take(64<<10, dev)
	guest.ReloadDM(t, "readerrors", fmt.Sprintf("0 %d flakey %s 0 0 100 1 error_reads", size>>9, ram))
	if err := w.Fill(dev.Path); err != nil {
		t.Errorf("I5: a write fails with the copy: %v", err)
	}
	kinds, last := d.Corrupted(s.ID)
	if len(kinds) != 1 || last.Errno != -int(unix.EIO) {
		t.Errorf("events %q, the last %+v", kinds, last)
	}
	guest.ReloadDM(t, "readerrors", guest.LinearTable(t, ram))
	err := direct.Scan(s.Images[0].Path, size, func([]byte, int64) error { return nil })
	if !errors.Is(err, unix.EIO) {
		t.Errorf("read of the image: %v", err)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
	if err := w.Same(ram); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestStorageCutOff has somebody cut the storage file off: whoever comes upon
// that first, a read, a store, or a write to the image, breaks the snapshot, and no
// image ever shows zeroes for what was lost. The original goes on.
func TestStorageCutOff(t *testing.T) {
	guest.NeedEither(t)
	const size, chunk = 8 << 20, 64 << 10
	d := program.Start(t)
	ram := guest.RAMDisks(t, 1, size)[0]
	dev := d.Add(ram)
	w := stamp.NewWorld(size)
	disk := guest.LoopDisk(t, guest.Ext4.Minimum, 512)
	guest.Ext4.Make(t, disk)
	dir := guest.Mount(t, disk)
	buf := direct.Pages(t, chunk)
	for _, c := range []struct {
		name string
		to   int64 // is left of the file, bytes
		meet func(t *testing.T, image *direct.File, write func())
	}{
		{"read", 0, func(t *testing.T, image *direct.File, _ func()) {
			if err := image.ReadAt(buf, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("read of the image: %v", err)
			}
		}},
		{"store", 0, func(_ *testing.T, _ *direct.File, write func()) { write() }},
		{"store behind what is left", 2<<20 + 100, func(_ *testing.T, _ *direct.File, write func()) { write() }},
		{"image write", 0, func(t *testing.T, image *direct.File, _ func()) {
			if err := image.WriteAt(buf[:4096], 2<<20); !errors.Is(err, unix.EIO) {
				t.Errorf("write to the image: %v", err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := d.In(t)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "differences")
			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: chunk, Storage: []control.Storage{{Path: file}}})
			s = d.Taken(s.ID)
			f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
			defer f.Close()
			write := func(from, to int64) {
				t.Helper()
				for pos := from; pos < to; pos += chunk {
					x := w.Disks[0].Begin(pos/stamp.SectorSize, (pos+chunk)/stamp.SectorSize, false)
					stamp.Fill(buf, x.Version, 0, pos/stamp.SectorSize)
					if err := f.WriteAt(buf, pos); err != nil {
						t.Errorf("I5: write to the original: %v", err)
					}
					x.Done()
				}
			}
			write(0, 3<<20)
			guest.WaitFor(t, "3 MiB in the storage", func() bool { return d.Show(s.ID).Usage.Stored == 3<<20 })
			if err := os.Truncate(file, c.to); err != nil {
				t.Fatal(err)
			}
			image := direct.MustOpen(t, s.Images[0].Path, unix.O_RDWR)
			defer image.Close()
			c.meet(t, image, func() { write(3<<20, 4<<20) })
			kinds, last := d.Corrupted(s.ID)
			if len(kinds) != 1 || last.Errno != -int(unix.EIO) || last.Device != dev.OriginalNumber {
				t.Errorf("events %q, the last %+v", kinds, last)
			}
			write(4<<20, 5<<20)
			for _, at := range []int64{0, 2 << 20, 3 << 20, 5 << 20} {
				if err := image.ReadAt(buf, at); !errors.Is(err, unix.EIO) {
					t.Errorf("read of the broken snapshot's image at %d: %v", at, err)
				}
			}
			if now := d.Show(s.ID); now.State != control.SnapshotCorrupted || now.Errno != -int(unix.EIO) {
				t.Errorf("snapshot %+v", now)
			}
			image.Close()
			d.Destroy(s.ID)
			if err := w.Same(dev.Path); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
	d.Remove(dev)
	guest.Unmount(t, dir)
}
