package filter

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestFilesystem makes a filesystem on the filter, and finds the files again
// there and on the original disk.
func TestFilesystem(t *testing.T) {
	for _, k := range []guest.Filesystem{guest.Ext4, guest.XFS} {
		t.Run(k.Name, func(t *testing.T) {
			guest.Need(t)
			disk := guest.RAMDisks(t, 1, max(k.Minimum, 128<<20))[0]
			d := program.Start(t)
			dev := d.Add(disk)
			k.Make(t, dev.Link)
			dir := guest.Mount(t, dev.Link)
			sums := guest.SomeFiles(t, dir, 1)
			if err := os.Remove(filepath.Join(dir, "lost+found")); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			guest.DropCaches(t)
			guest.SameFiles(t, dir, sums)

			err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
			program.WantError(t, err, control.Busy, "mounted on "+dir)
			guest.Unmount(t, dir)
			k.Check(t, dev.Link)
			d.Remove(dev)

			k.Check(t, disk)
			dir = guest.Mount(t, disk)
			guest.SameFiles(t, dir, sums)
			guest.Unmount(t, dir)
		})
	}
}

// TestFioVerify lets fio write with checksums and read back, in the pairs of
// what there is to vary.
func TestFioVerify(t *testing.T) {
	guest.Need(t)
	queues := guest.QueueCounts()
	q := func(n int) int { return queues[min(n, len(queues)-1)] }
	const size = 64 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	fourK := guest.LoopDisk(t, size, 4096)
	d := program.Start(t)
	for _, c := range []struct {
		queues, depth int
		disk          string
		block         int
		how           string
	}{
		{q(0), 1, ram, 512, "--direct=1 --sync=dsync"},
		{q(0), 32, fourK, 4096, "--direct=0 --fsync=16"},
		{q(0), 128, ram, 512, "--direct=1"},
		{q(1), 1, fourK, 4096, "--direct=0"},
		{q(1), 32, ram, 512, "--direct=1 --fsync=16"},
		{q(1), 128, fourK, 4096, "--direct=1 --sync=dsync"},
		{q(2), 1, fourK, 4096, "--direct=1 --fsync=16"},
		{q(2), 32, fourK, 4096, "--direct=1 --sync=dsync"},
		{q(2), 128, ram, 512, "--direct=0"},
	} {
		name := fmt.Sprintf("%dx%d/%d/%s", c.queues, c.depth, c.block, strings.ReplaceAll(strings.ReplaceAll(c.how, "--", ""), " ", ","))
		t.Run(name, func(t *testing.T) {
			guest.NeedEither(t)
			d := d.In(t)
			dev := d.Add(c.disk, program.Queues(c.queues, c.depth))
			if dev.Queues != c.queues || dev.Depth != c.depth || dev.LogicalBlockSize != c.block {
				t.Fatalf("made %d x %d with blocks of %d", dev.Queues, dev.Depth, dev.LogicalBlockSize)
			}
			fio(t, dev.Path, fmt.Sprintf("--rw=randrw --bsrange=4k-1m --size=%d --iodepth=%d --verify=crc32c %s", guest.Span(12<<20, size), c.depth, c.how))
			s, err := d.DeviceStatus(guest.Context(t), dev.Name)
			if err != nil {
				t.Fatal(err)
			}
			for _, op := range []string{control.OpRead, control.OpWrite} {
				if s.Operations[op].Requests == 0 {
					t.Errorf("no %s counted: %+v", op, s.Operations)
				}
			}
			if strings.Contains(c.how, "fsync") && s.Operations[control.OpFlush].Requests == 0 && flushes(t, dev.Path) {
				t.Errorf("no flush counted: %+v", s.Operations)
			}
			if s.Errors != 0 || s.InFlight != 0 {
				t.Errorf("%d errors, %d in flight", s.Errors, s.InFlight)
			}
			d.Remove(dev)
		})
	}
}

func fio(t testing.TB, disk, args string) {
	t.Helper()
	guest.Run(t, "fio", append([]string{"--name=test", "--filename=" + disk, "--ioengine=libaio", "--randrepeat=1", "--output-format=terse"}, strings.Fields(args)...)...)
}

// TestBlockSizes compares the shape of the filter with that of its original,
// and writes to all of it: whole blocks of either size, up to an end that is no
// multiple of 4 KiB.
func TestBlockSizes(t *testing.T) {
	guest.Need(t)
	for _, c := range []struct {
		name  string
		block int64
		disk  func(t *testing.T) string
	}{
		{"loop/512/odd", 512, func(t *testing.T) string { return guest.LoopDisk(t, 12<<20+7*512, 512) }},
		{"loop/4096", 4096, func(t *testing.T) string { return guest.LoopDisk(t, 12<<20+4096, 4096) }},
		{"ram/1KiB", 512, func(t *testing.T) string { return guest.RAMDisks(t, 1, 12<<20+1<<10)[0] }},
		{"scsi/512", 512, func(t *testing.T) string { return guest.SCSIDisk(t, 12, 512) }},
		{"scsi/4096", 4096, func(t *testing.T) string { return guest.SCSIDisk(t, 12, 4096) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := c.disk(t)
			d := program.Start(t)
			dev := d.Add(disk)
			size := guest.SizeOf(t, disk)
			if guest.SizeOf(t, dev.Path) != size || dev.Size != size {
				t.Errorf("size %d, %d in the list, of the original %d", guest.SizeOf(t, dev.Path), dev.Size, size)
			}
			for _, name := range []string{"logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "rotational", "write_cache", "discard_granularity"} {
				if a, b := guest.QueueLimit(t, disk, name), guest.QueueLimit(t, dev.Path, name); a != b {
					t.Errorf("%s: %s, of the original %s", name, b, a)
				}
			}
			if int64(dev.LogicalBlockSize) != c.block {
				t.Errorf("logical blocks of %d bytes, want %d", dev.LogicalBlockSize, c.block)
			}
			w := stamp.NewWorld(size)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			stop := w.StartWriters(t, 1, stamp.Mix{Block: c.block, Writers: 4, Zeroes: true}, dev.Path)
			time.Sleep(guest.Span(time.Second, 20*time.Second))
			if err := stop(); err != nil {
				t.Error(err)
			}
			if err := w.Same(dev.Path); err != nil {
				t.Error(err)
			}
			d.Remove(dev)
			if err := w.Same(disk); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDiscardAndZeroes looks at the original for what discards and write-zeroes
// through the filter have done, on ranges larger than one request can be.
func TestDiscardAndZeroes(t *testing.T) {
	guest.Need(t)
	const size = 10 << 30
	disk := guest.LoopDisk(t, size, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, 1<<20)
	// Stamps here and there, most of all around 4 GiB and the ends of ranges.
	put := func() {
		for _, at := range []int64{0, 1 << 20, 4<<30 - 1<<20, 4 << 30, 5 << 30, 9<<30 - 1<<20, 9 << 30, size - 1<<20} {
			x := w.Disks[0].Begin(at/stamp.SectorSize, (at+1<<20)/stamp.SectorSize, false)
			stamp.Fill(buf, x.Version, 0, at/stamp.SectorSize)
			if err := f.WriteAt(buf, at); err != nil {
				t.Fatal(err)
			}
			x.Done()
		}
	}
	look := func(what string) {
		t.Helper()
		g := direct.MustOpen(t, disk, unix.O_RDONLY)
		defer g.Close()
		for _, at := range []int64{0, 1 << 20, 2 << 30, 4<<30 - 1<<20, 4 << 30, 5 << 30, 9<<30 - 1<<20, 9 << 30, size - 1<<20} {
			if err := g.ReadAt(buf, at); err != nil {
				t.Fatal(err)
			}
			if err := w.Disks[0].Compare(buf, at/stamp.SectorSize); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	for _, c := range []struct {
		what    string
		from, n int64
		do      func(from, n int64) error
	}{
		{"discard of 8 GiB", 1<<20 + 512, 8 << 30, func(from, n int64) error { return guest.IoctlRange(f.FD, unix.BLKDISCARD, from, n) }},
		{"write zeroes over 8 GiB", 1<<20 + 512, 8 << 30, func(from, n int64) error { return f.Zero(from, n, true) }},
		{"write zeroes over 1.5 MiB, allocated", 4<<30 - 1<<19, 3 << 19, func(from, n int64) error { return f.Zero(from, n, false) }},
		{"discard of all", 0, size, func(from, n int64) error { return guest.IoctlRange(f.FD, unix.BLKDISCARD, from, n) }},
	} {
		put()
		if err := c.do(c.from, c.n); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		w.Disks[0].Begin(c.from/stamp.SectorSize, (c.from+c.n)/stamp.SectorSize, true).Done()
		look(c.what)
	}
	s, err := d.DeviceStatus(guest.Context(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	for op, least := range map[string]uint64{control.OpDiscard: 18 << 30, control.OpWriteZeroes: 8 << 30} {
		if got := s.Operations[op].Bytes; got < least {
			t.Errorf("%d bytes of %s counted, want %d", got, op, least)
		}
	}
	f.Close()
	d.Remove(dev)
	look("after removal")
}

// TestManyReaders hammers one filter from many processes' worth of threads with
// the page cache between them.
func TestManyReaders(t *testing.T) {
	guest.Need(t)
	const size = 32 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	w := stamp.NewWorld(size)
	if err := w.Fill(ram); err != nil {
		t.Fatal(err)
	}
	d := program.Start(t)
	dev := d.Add(ram, program.Queues(1, 4))
	var wg sync.WaitGroup
	var n atomic.Int64
	end := time.Now().Add(guest.Span(time.Second, 30*time.Second))
	for i := range 4 * runtime.NumCPU() {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f, err := os.Open(dev.Path)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			rnd := rand.New(rand.NewSource(int64(i)))
			p := make([]byte, 128<<10)
			for time.Now().Before(end) {
				at := rnd.Int63n(size/stamp.SectorSize-int64(len(p)/stamp.SectorSize)) * stamp.SectorSize
				if _, err := f.ReadAt(p, at); err != nil {
					t.Error(err)
					return
				}
				if err := w.Disks[0].Compare(p, at/stamp.SectorSize); err != nil {
					t.Error(err)
					return
				}
				if n.Add(1)%64 == 0 {
					_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				}
			}
		}()
	}
	wg.Wait()
	d.Remove(dev)
}
