package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestPoolsGivenBack: what a queue's ring holds of a snapshot goes with it, even
// if nothing else happens on that queue.
func TestPoolsGivenBack(t *testing.T) {
	guest.NeedEither(t)
	const size, pool = 4 << 20, 32 << 20
	d := program.Start(t, "diff_buffer_pool_size=32M", "state_size=256M")
	dev := d.Add(guest.RAMDisks(t, 1, size)[0])
	// Pages that a file no longer has, but the ring, count as nobody's.
	available := func() int64 {
		t.Helper()
		text, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			var kb int64
			if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kb); n == 1 {
				return kb << 10
			}
		}
		t.Fatal("no MemAvailable in /proc/meminfo")
		return 0
	}
	d.Destroy(d.Take(0, dev).ID)
	before := available()
	const rounds = 12
	for range rounds {
		d.Destroy(d.Take(0, dev).ID)
	}
	guest.WaitFor(t, "the memory of the pools (I9)", func() bool {
		more := before - available()
		t.Logf("%d KiB less after %d rounds with pools of %d KiB", more>>10, rounds, pool>>10)
		return more < 4*pool
	})
}

// TestAttachForNothing: a snapshot that cannot be created leaves no filter
// behind that was attached for it, and those that were there.
func TestAttachForNothing(t *testing.T) {
	guest.NeedEither(t)
	ram := guest.RAMDisks(t, 3, 4<<20)
	d := program.Start(t)
	dev := d.Add(ram[0])
	for _, r := range []control.CreateRequest{
		{Devices: ram[:2], Storage: []control.Storage{{Path: "/nowhere/storage"}}},
		{Devices: ram[:2], Storage: []control.Storage{{Path: ram[1]}}}, // on itself
		{Devices: []string{ram[0], ram[1], "/dev/nothing"}},
		{Devices: ram[:2], ChunkSize: 5},
	} {
		r.Attach = true
		if _, err := d.CreateSnapshot(guest.Context(t), r); err == nil {
			t.Errorf("%+v was created", r)
		}
		devs, err := d.Devices(guest.Context(t))
		if err != nil || len(devs) != 1 || devs[0].Name != dev.Name {
			t.Errorf("after %+v: devices %+v, %v", r, devs, err)
		}
	}
	s := d.Take(0, dev)
	if _, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: s.ID, Device: ram[1], Attach: true}); err == nil {
		t.Error("a device was added to a taken snapshot")
	}
	if devs, err := d.Devices(guest.Context(t)); err != nil || len(devs) != 1 {
		t.Errorf("after a refused addition: devices %+v, %v", devs, err)
	}
}

// TestStorageBlocks has originals and storage of different logical blocks: the
// storage is used directly if it can do what the images need, else through the
// page cache, and the images are right.
func TestStorageBlocks(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	for _, c := range []struct {
		first, later int // logical blocks of the devices before and after the storage
		storage      int
		direct       bool
	}{
		{first: 512, storage: 512, direct: true},
		{first: 4096, storage: 512, direct: true},
		{first: 4096, storage: 4096, direct: true},
		{first: 512, storage: 4096},
		{first: 4096, later: 4096, storage: 4096, direct: true},
		{first: 4096, later: 512, storage: 4096},
	} {
		t.Run(fmt.Sprintf("%d/%d/%d", c.first, c.later, c.storage), func(t *testing.T) {
			d := program.Start(t)
			storage := guest.LoopDisk(t, 4*size, c.storage)
			devs := []control.Device{d.Add(guest.LoopDisk(t, size, c.first))}
			if c.later != 0 {
				devs = append(devs, d.Add(guest.LoopDisk(t, size, c.later)))
			}
			w := stamp.NewWorld(slices.Repeat([]int64{size}, len(devs))...)
			var paths []string
			for _, dev := range devs {
				paths = append(paths, dev.Path)
			}
			if err := w.Fill(paths...); err != nil {
				t.Fatal(err)
			}
			s := d.Create(control.CreateRequest{Devices: []string{devs[0].Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: storage}}})
			if c.later != 0 {
				if _, err := d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: s.ID, Device: devs[1].Name}); err != nil {
					t.Fatal(err)
				}
			}
			if direct := isDirect(t, d.PID, storage); direct != c.direct {
				t.Errorf("direct I/O on the storage: %v, want %v", direct, c.direct)
			}
			win := w.Open()
			s = d.Taken(s.ID)
			win.Close()
			stop := w.StartWriters(t, 8, stamp.Mix{Block: 4096, Writers: 2, Zeroes: true}, paths...)
			time.Sleep(guest.Span(500*time.Millisecond, 10*time.Second))
			if err := stop(); err != nil {
				t.Error(err)
			}
			var images []string
			for _, im := range s.Images {
				images = append(images, im.Path)
			}
			// An image is written in its own blocks, wherever they lie by now.
			f := direct.MustOpen(t, images[len(images)-1], unix.O_RDWR)
			buf := direct.Pages(t, devs[len(devs)-1].LogicalBlockSize)
			for off := int64(0); off < 1<<20; off += 20 << 10 {
				if err := f.ReadAt(buf, off); err != nil {
					t.Fatal(err)
				}
				if err := f.WriteAt(buf, off); err != nil {
					t.Fatalf("write to the image at %d: %v", off, err)
				}
			}
			f.Close()
			if err := win.Check(images...); err != nil {
				t.Errorf("I1: %v", err)
			}
			d.Destroy(s.ID)
		})
	}
}

// isDirect says whether process pid has path open for direct I/O.
func isDirect(t testing.TB, pid int, path string) bool {
	t.Helper()
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err != nil || to != path {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(fd)))
		if err != nil {
			t.Fatal(err)
		}
		var pos, flags int64
		if _, err := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t0%o", &pos, &flags); err != nil {
			t.Fatalf("%q: %v", info, err)
		}
		return flags&unix.O_DIRECT != 0
	}
	t.Fatalf("process %d has not opened %s", pid, path)
	return false
}

// TestAppendStorage appends storage to a snapshot that is running out of it:
// the overflow that was near does not come.
func TestAppendStorage(t *testing.T) {
	guest.NeedEither(t)
	const size = 16 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t, "diff_storage_minimum=2097152") // 1 GiB, much more than there is
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 4 << 20}}})
	win := w.Open()
	s = d.Taken(s.ID)
	win.Close()
	if s.Usage.Capacity != 4<<20 {
		t.Errorf("of a limit of 4 MiB %d bytes are allocated", s.Usage.Capacity)
	}
	if e, err := d.WaitEvent(guest.Context(t), control.WaitRequest{ID: s.ID}); err == nil {
		t.Errorf("event %+v before anything is written", e)
	}

	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, 64<<10)
	pos := int64(0)
	writeUntil := func(end int64) {
		t.Helper()
		for ; pos < end; pos += int64(len(buf)) {
			x := w.Disks[0].Begin(pos/stamp.SectorSize, (pos+int64(len(buf)))/stamp.SectorSize, false)
			stamp.Fill(buf, x.Version, 0, pos/stamp.SectorSize)
			if err := f.WriteAt(buf, pos); err != nil {
				t.Fatal(err)
			}
			x.Done()
		}
	}
	for {
		if pos == 4<<20 {
			t.Fatal("storage is full, and nobody said that it was getting low")
		}
		writeUntil(pos + int64(len(buf)))
		e, err := d.WaitEvent(guest.Context(t), control.WaitRequest{ID: s.ID, Timeout: 100 * time.Millisecond})
		if err == nil {
			if e.Kind != control.EventLowFreeSpace || e.Sectors != (size-4<<20)/stamp.SectorSize {
				t.Fatalf("event %+v, want %d sectors", e, (size-4<<20)/stamp.SectorSize)
			}
			if u := d.Show(s.ID).Usage; e.Percent < 80 || e.Rate <= 0 || e.Left <= 0 || u.Limit != 4<<20 || u.Need != size || u.Percent < e.Percent {
				t.Errorf("event %+v with %+v: want percent, rate and the time that is left", e, u)
			}
			break
		}
		if control.CodeOf(err) != control.Timeout {
			t.Fatal(err)
		}
	}
	if t.Logf("low after %d KiB of 4096", pos>>10); pos < 4<<20*8/10 {
		t.Errorf("low after %d bytes", pos)
	}
	file := filepath.Join(t.TempDir(), "more")
	got, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: file}})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Storage) != 2 || got.Usage.Capacity != size { // no more than all of the disk
		t.Errorf("after appending: %+v", got)
	}
	writeUntil(size)
	if s = d.Show(s.ID); s.Errno != 0 || s.State != control.SnapshotTaken || s.Usage.Copied != size {
		t.Errorf("after all was written: %+v", s)
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if e, err := d.WaitEvent(guest.Context(t), control.WaitRequest{ID: s.ID}); err == nil {
		t.Errorf("event %+v", e)
	}
	f.Close()
	d.Destroy(s.ID)
	if _, err := os.Stat(file); err == nil {
		t.Error("the storage is left")
	}
	d.Remove(dev)
}

// TestLargeDevice is I9 for tables: a snapshot of a device of 1 TiB needs little
// memory before anything is written.
func TestLargeDevice(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.LoopDisk(t, 1<<40, 512)
	d := program.Start(t, "diff_buffer_pool_size=64M", "state_size=1G")
	dev := d.Add(disk)
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, 1<<20)
	stamp.Fill(buf, 1, 0, 0)
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := f.WriteAt(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	s := d.Take(0, dev)
	memory := d.Memory()
	t.Logf("%d MiB resident, chunks of %d KiB", memory>>20, s.ChunkSize>>10)
	if memory > 200<<20 {
		t.Errorf("I9: %d bytes of memory", memory)
	}
	image := direct.MustOpen(t, s.Images[0].Path, unix.O_RDONLY)
	clear(buf)
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := f.WriteAt(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := image.ReadAt(buf, at); err != nil {
			t.Fatal(err)
		}
		for i := range int64(len(buf) / stamp.SectorSize) {
			if v, ok := stamp.Of(buf[i*stamp.SectorSize:][:stamp.SectorSize], 0, i); v != 1 || !ok {
				t.Fatalf("I1: image at %d, sector %d: version %d", at, i, v)
			}
		}
	}
	f.Close()
	image.Close()
	d.Destroy(s.ID)
	d.Remove(dev)
}
