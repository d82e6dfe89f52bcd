package integration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Data through a filter without snapshots.

// someFiles writes files of all sizes below dir and returns their sums.
func someFiles(t testing.TB, dir string, seed int64) map[string][32]byte {
	t.Helper()
	rnd := rand.New(rand.NewSource(seed))
	sums := map[string][32]byte{}
	for i := range 60 {
		name := fmt.Sprintf("set%d/%d/file%d", seed, i%7, i)
		p := make([]byte, rnd.Intn(1<<uint(4+rnd.Intn(17))))
		rnd.Read(p)
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, p, 0o644); err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(p)
	}
	return sums
}

// sameFiles fails the test unless the files below dir are those of sums.
func sameFiles(t testing.TB, dir string, sums map[string][32]byte) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		sum, ok := sums[name]
		switch {
		case !ok:
			t.Errorf("%s: nobody wrote it", path)
		case sum != sha256.Sum256(p):
			t.Errorf("%s: content differs", path)
		}
		seen++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(sums) {
		t.Errorf("%d files, want %d", seen, len(sums))
	}
}

// dropCaches has the next reads come from the disks.
func dropCaches(t testing.TB) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// TestFilesystem makes a filesystem on the filter, and finds the files again
// there and on the original disk.
func TestFilesystem(t *testing.T) {
	for _, k := range []fsKind{ext4FS, xfsFS} {
		t.Run(k.name, func(t *testing.T) {
			needVM(t)
			disk := ramDisks(t, 1, max(k.minimum, 128<<20))[0]
			d := startDaemon(t)
			dev := d.add(disk)
			k.make(t, dev.Link)
			dir := mount(t, dev.Link)
			sums := someFiles(t, dir, 1)
			if err := os.Remove(filepath.Join(dir, "lost+found")); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			dropCaches(t)
			sameFiles(t, dir, sums)

			err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name})
			want(t, err, control.Busy, "mounted on "+dir)
			umount(t, dir)
			k.clean(t, dev.Link)
			d.remove(dev)

			k.clean(t, disk)
			dir = mount(t, disk)
			sameFiles(t, dir, sums)
			umount(t, dir)
		})
	}
}

// TestFioVerify lets fio write with checksums and read back, in the pairs of
// what there is to vary.
func TestFioVerify(t *testing.T) {
	needVM(t)
	queues := queueCounts()
	q := func(n int) int { return queues[min(n, len(queues)-1)] }
	const size = 64 << 20
	ram := ramDisks(t, 1, size)[0]
	fourK := loopDisk(t, size, 4096)
	d := startDaemon(t)
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
			d := d.in(t)
			dev := d.add(c.disk, with(c.queues, c.depth))
			if dev.Queues != c.queues || dev.Depth != c.depth || dev.LogicalBlockSize != c.block {
				t.Fatalf("made %d x %d with blocks of %d", dev.Queues, dev.Depth, dev.LogicalBlockSize)
			}
			fio(t, dev.Path, fmt.Sprintf("--rw=randrw --bsrange=4k-1m --size=%d --iodepth=%d --verify=crc32c %s", span(24<<20, size), c.depth, c.how))
			s, err := d.DeviceStatus(ctx(t), dev.Name)
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
			d.remove(dev)
		})
	}
}

// flushes says whether the kernel sends flushes to a disk.
func flushes(t testing.TB, disk string) bool {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/queue/write_cache")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b)) == "write back"
}

func fio(t testing.TB, disk, args string) {
	t.Helper()
	run(t, "fio", append([]string{"--name=test", "--filename=" + disk, "--ioengine=libaio", "--randrepeat=1", "--output-format=terse"}, strings.Fields(args)...)...)
}

// TestFlush makes sure that flushes and FUA writes reach an original with a
// volatile cache, and only there.
func TestFlush(t *testing.T) {
	needVM(t)
	disk := loopDisk(t, 16<<20, 512)
	if !flushes(t, disk) {
		t.Fatal("a loop device without a cache")
	}
	d := startDaemon(t)
	dev := d.add(disk)
	if !flushes(t, dev.Path) {
		t.Fatal("the filter hides the cache")
	}
	before := flushCount(t, disk)
	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, 4096)
	for i := range int64(5) {
		if err := f.write(buf, i*4096); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fsync(f.fd); err != nil {
			t.Fatal(err)
		}
	}
	afterFlush := flushCount(t, disk)
	if afterFlush-before < 5 {
		t.Errorf("%d flushes of the original, want 5", afterFlush-before)
	}
	g := openDirect(t, dev.Path, unix.O_RDWR|unix.O_DSYNC)
	for i := range int64(5) {
		if err := g.write(buf, i*4096); err != nil {
			t.Fatal(err)
		}
	}
	if n := flushCount(t, disk) - afterFlush; n < 5 {
		t.Errorf("%d flushes of the original after FUA writes, want 5", n)
	}
	f.close()
	g.close()
	d.remove(dev)
}

// TestFUA makes sure that a FUA write stays one on its way to an original that
// knows it, and that nothing else becomes one.
func TestFUA(t *testing.T) {
	needVM(t)
	disk := scsiDisk(t, 8, 512)
	if queueLimit(t, disk, "fua") != "1" {
		t.Fatal("a SCSI disk without FUA")
	}
	d := startDaemon(t)
	dev := d.add(disk)
	if queueLimit(t, dev.Path, "fua") != "1" {
		t.Fatal("the filter hides FUA")
	}
	var st unix.Stat_t
	if err := unix.Stat(disk, &st); err != nil {
		t.Fatal(err)
	}
	buf := ublkPages(t, 4096)
	for _, c := range []struct {
		flags, fua int
	}{{0, 0}, {unix.O_DSYNC, 7}} {
		f := openDirect(t, dev.Path, unix.O_RDWR|c.flags)
		fua := 0
		for _, rwbs := range issued(t, unix.Major(st.Rdev), unix.Minor(st.Rdev), func() {
			for i := range int64(7) {
				if err := f.write(buf, i*4096); err != nil {
					t.Error(err)
				}
			}
		}) {
			// W is the write, an F behind it FUA.
			if _, after, ok := strings.Cut(rwbs, "W"); ok && strings.Contains(after, "F") {
				fua++
			}
		}
		if fua != c.fua {
			t.Errorf("%d of 7 writes are FUA, want %d", fua, c.fua)
		}
		f.close()
	}
	d.remove(dev)
}

// issued are the kinds of the requests, as the kernel's tracing writes them, that
// a disk gets while f runs.
func issued(t testing.TB, major, minor uint32, f func()) (kinds []string) {
	t.Helper()
	const dir = "/sys/kernel/tracing/instances/issued"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	set := func(file, value string) {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	const event = "events/block/block_rq_issue/"
	set(event+"filter", fmt.Sprintf("dev == %d", major<<20|minor))
	set(event+"enable", "1")
	f()
	set(event+"enable", "0")
	b, err := os.ReadFile(filepath.Join(dir, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		// … block_rq_issue: 8,0 WFS 4096 () 0 + 8 …
		if _, rest, ok := strings.Cut(line, "block_rq_issue: "); ok {
			kinds = append(kinds, strings.Fields(rest)[1])
		}
	}
	return kinds
}

// flushCount is how many flushes a disk has done.
func flushCount(t testing.TB, disk string) int {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b))
	if len(f) < 17 {
		t.Fatalf("stat: %q", b)
	}
	var n int
	fmt.Sscan(f[15], &n)
	return n
}

// TestBlockSizes compares the shape of the filter with that of its original,
// and writes to all of it: whole blocks of either size, up to an end that is no
// multiple of 4 KiB.
func TestBlockSizes(t *testing.T) {
	needVM(t)
	for _, c := range []struct {
		name  string
		block int64
		disk  func(t *testing.T) string
	}{
		{"loop/512/odd", 512, func(t *testing.T) string { return loopDisk(t, 12<<20+7*512, 512) }},
		{"loop/4096", 4096, func(t *testing.T) string { return loopDisk(t, 12<<20+4096, 4096) }},
		{"ram/1KiB", 512, func(t *testing.T) string { return ramDisks(t, 1, 12<<20+1<<10)[0] }},
		{"scsi/512", 512, func(t *testing.T) string { return scsiDisk(t, 12, 512) }},
		{"scsi/4096", 4096, func(t *testing.T) string { return scsiDisk(t, 12, 4096) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := c.disk(t)
			d := startDaemon(t)
			dev := d.add(disk)
			size := sizeOf(t, disk)
			if sizeOf(t, dev.Path) != size || dev.Size != size {
				t.Errorf("size %d, %d in the list, of the original %d", sizeOf(t, dev.Path), dev.Size, size)
			}
			for _, name := range []string{"logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "rotational", "write_cache", "discard_granularity"} {
				if a, b := queueLimit(t, disk, name), queueLimit(t, dev.Path, name); a != b {
					t.Errorf("%s: %s, of the original %s", name, b, a)
				}
			}
			if int64(dev.LogicalBlockSize) != c.block {
				t.Errorf("logical blocks of %d bytes, want %d", dev.LogicalBlockSize, c.block)
			}
			w := newWorld(size)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			stop := w.writers(t, 1, mix{block: c.block, writers: 4, zeroes: true}, dev.Path)
			time.Sleep(span(time.Second, 20*time.Second))
			if err := stop(); err != nil {
				t.Error(err)
			}
			if err := w.same(dev.Path); err != nil {
				t.Error(err)
			}
			d.remove(dev)
			if err := w.same(disk); err != nil {
				t.Error(err)
			}
		})
	}
}

func queueLimit(t testing.TB, disk, name string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/queue/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestDiscardAndZeroes looks at the original for what discards and write-zeroes
// through the filter have done, on ranges larger than one request can be.
func TestDiscardAndZeroes(t *testing.T) {
	needVM(t)
	const size = 10 << 30
	disk := loopDisk(t, size, 512)
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, 1<<20)
	// Stamps here and there, most of all around 4 GiB and the ends of ranges.
	put := func() {
		for _, at := range []int64{0, 1 << 20, 4<<30 - 1<<20, 4 << 30, 5 << 30, 9<<30 - 1<<20, 9 << 30, size - 1<<20} {
			x := w.disks[0].begin(at/sectorSize, (at+1<<20)/sectorSize, false)
			stamp(buf, x.v, 0, at/sectorSize)
			if err := f.write(buf, at); err != nil {
				t.Fatal(err)
			}
			x.done()
		}
	}
	look := func(what string) {
		t.Helper()
		g := openDirect(t, disk, unix.O_RDONLY)
		defer g.close()
		for _, at := range []int64{0, 1 << 20, 2 << 30, 4<<30 - 1<<20, 4 << 30, 5 << 30, 9<<30 - 1<<20, 9 << 30, size - 1<<20} {
			if err := g.read(buf, at); err != nil {
				t.Fatal(err)
			}
			if err := w.disks[0].compare(buf, at/sectorSize); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	for _, c := range []struct {
		what    string
		from, n int64
		do      func(from, n int64) error
	}{
		{"discard of 8 GiB", 1<<20 + 512, 8 << 30, func(from, n int64) error { return ioctlRange(f.fd, unix.BLKDISCARD, from, n) }},
		{"write zeroes over 8 GiB", 1<<20 + 512, 8 << 30, func(from, n int64) error { return f.zero(from, n, true) }},
		{"write zeroes over 1.5 MiB, allocated", 4<<30 - 1<<19, 3 << 19, func(from, n int64) error { return f.zero(from, n, false) }},
		{"discard of all", 0, size, func(from, n int64) error { return ioctlRange(f.fd, unix.BLKDISCARD, from, n) }},
	} {
		put()
		if err := c.do(c.from, c.n); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		w.disks[0].begin(c.from/sectorSize, (c.from+c.n)/sectorSize, true).done()
		look(c.what)
	}
	s, err := d.DeviceStatus(ctx(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	for op, least := range map[string]uint64{control.OpDiscard: 18 << 30, control.OpWriteZeroes: 8 << 30} {
		if got := s.Operations[op].Bytes; got < least {
			t.Errorf("%d bytes of %s counted, want %d", got, op, least)
		}
	}
	f.close()
	d.remove(dev)
	look("after removal")
}

// ioctlRange is BLKDISCARD and its like.
func ioctlRange(fd int, req uint, from, n int64) error {
	r := [2]uint64{uint64(from), uint64(n)}
	return ioctlPointer(fd, req, &r)
}

// TestOriginalError has a part of the original fail: what touches it gets EIO,
// and nothing else does.
func TestOriginalError(t *testing.T) {
	needVM(t)
	const size = 16 << 20
	ram := ramDisks(t, 1, size)[0]
	good := linear(t, ram)
	const bad, badEnd = 8 << 20 >> 9, 8<<20>>9 + 64 // sectors
	broken := []string{
		fmt.Sprintf("0 %d linear %s 0", bad, ram),
		fmt.Sprintf("%d %d error", bad, badEnd-bad),
		fmt.Sprintf("%d %d linear %s %d", badEnd, size>>9-badEnd, ram, badEnd),
	}
	disk := dmDisk(t, "original", good)
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	reload(t, "original", broken...)
	before := d.held()

	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, 1<<20)
	for _, c := range []struct {
		at, n int64 // sectors
		fails bool
	}{
		{bad - 8, 8, false}, {bad, 8, true}, {bad - 8, 16, true}, {badEnd - 8, 8, true}, {badEnd, 8, false},
		{bad - 512, 2048, true}, {badEnd - 1, 1, true}, {0, 2048, false},
	} {
		p := buf[:c.n*sectorSize]
		if err := f.read(p, c.at*sectorSize); errors.Is(err, unix.EIO) != c.fails || err != nil && !c.fails {
			t.Errorf("read of sectors %d+%d: %v", c.at, c.n, err)
		} else if err == nil {
			if err := w.disks[0].compare(p, c.at); err != nil {
				t.Error(err)
			}
		}
		if c.fails {
			if err := f.write(p, c.at*sectorSize); !errors.Is(err, unix.EIO) {
				t.Errorf("write of sectors %d+%d: %v", c.at, c.n, err)
			}
			continue
		}
		x := w.disks[0].begin(c.at, c.at+c.n, false)
		stamp(p, x.v, 0, c.at)
		if err := f.write(p, c.at*sectorSize); err != nil {
			t.Errorf("write of sectors %d+%d: %v", c.at, c.n, err)
		}
		x.done()
	}
	if err := unix.Fsync(f.fd); err != nil {
		t.Errorf("flush: %v", err)
	}
	s, err := d.DeviceStatus(ctx(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	if s.Errors == 0 || s.InFlight != 0 {
		t.Errorf("%d errors counted, %d in flight", s.Errors, s.InFlight)
	}
	f.close()
	d.settled(before, 3)

	// Random writers elsewhere do not notice; then all is well again.
	reload(t, "original", good)
	x := w.disks[0].begin(bad-512, badEnd+2048, false)
	p := buf[:1<<20]
	f = openDirect(t, dev.Path, unix.O_RDWR)
	for at := x.from; at < x.to; {
		n := min(int64(2048), x.to-at)
		stamp(p[:n*sectorSize], x.v, 0, at)
		if err := f.write(p[:n*sectorSize], at*sectorSize); err != nil {
			t.Fatal(err)
		}
		at += n
	}
	x.done()
	f.close()
	d.remove(dev)
	if err := w.same(disk); err != nil {
		t.Error(err)
	}
}

// TestRemoveForced removes a filter under fio: it gets I/O errors and ends.
func TestRemoveForced(t *testing.T) {
	needVM(t)
	ram := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	round := func() {
		dev := d.add(ram, with(queueCounts()[len(queueCounts())-1], 32))
		c := exec.Command("fio", "--name=test", "--filename="+dev.Path, "--ioengine=libaio", "--direct=1", "--rw=randrw",
			"--bsrange=4k-256k", "--iodepth=32", "--time_based", "--runtime=600")
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "writes of fio", func() bool {
			s, err := d.DeviceStatus(ctx(t), dev.Name)
			if err != nil {
				t.Fatal(err)
			}
			return s.Operations[control.OpWrite].Requests > 100
		})
		err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name})
		want(t, err, control.Busy, "fio")
		if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Wait() }()
		if err := await(t, "the end of fio", ended); status(t, err) == 0 || !strings.Contains(out.String(), "error") {
			t.Errorf("fio noticed nothing: %v\n%s", err, out.String())
		}
		if _, err := os.Stat(dev.Link); err == nil {
			t.Errorf("%s is still there", dev.Link)
		}
		// Nobody holds the disk any more.
		f, err := blockdev.OpenExclusive(ram, ram, unix.O_RDWR)
		if err != nil {
			t.Fatalf("open the original: %v", err)
		}
		f.Close()
	}
	round()
	before := d.held()
	round()
	d.settled(before, 3)
}

// TestRounds adds and removes a filter 50 times: it leaves nothing.
func TestRounds(t *testing.T) {
	needVM(t)
	leakTest(t)
	const size = 4 << 20
	ram := ramDisks(t, 2, size)
	d := startDaemon(t)
	w := newWorld(size, size)
	if err := w.fill(ram...); err != nil {
		t.Fatal(err)
	}
	round := func(i int) {
		dev := d.add(ram[i%2], with(queueCounts()[i%len(queueCounts())], 1<<(i%8)))
		if err := scan(dev.Link, size, w.disks[i%2].compare); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		d.remove(dev)
	}
	for i := range 4 {
		round(i)
	}
	before := d.held()
	memory := d.memory()
	for i := range 50 {
		round(i)
	}
	d.settled(before, 3)
	grown := d.memory() - memory
	t.Logf("%d KiB more after 50 rounds", grown>>10)
	if grown > 4<<20 {
		t.Errorf("%d bytes more memory", grown)
	}
	if left := entries("/dev/ublk-blksnap"); left > 1 {
		t.Errorf("%d links are left", left)
	}
	if left := entries(d.dir.State() + "/cbt"); left > 0 {
		t.Errorf("%d change maps are left", left)
	}
}

// TestSteadyState is I9 for a filter under load: after the first requests it
// takes no more memory, and starts no threads.
func TestSteadyState(t *testing.T) {
	needVM(t)
	leakTest(t)
	const size = 64 << 20
	ram := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(ram, with(queueCounts()[len(queueCounts())-1], 64))
	w := newWorld(size)
	stop := w.writers(t, 3, mix{writers: 8, zeroes: true, largest: 64 << 10}, dev.Path)
	w.more(t, 2000)
	before, memory := d.held(), d.memory()
	n := int64(span(5000, 1000000))
	w.more(t, n)
	after, grown := d.held(), d.memory()-memory
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d KiB more after %d writes", grown>>10, n)
	if grown > 1<<20 {
		t.Errorf("I9: %d bytes more memory after %d writes", grown, n)
	}
	if after.threads > before.threads+2 || after.fds > before.fds {
		t.Errorf("I9: now %+v, before %+v, after %d writes", after, before, n)
	}
	d.remove(dev)
}

// TestManyReaders hammers one filter from many processes' worth of threads with
// the page cache between them.
func TestManyReaders(t *testing.T) {
	needVM(t)
	const size = 32 << 20
	ram := ramDisks(t, 1, size)[0]
	w := newWorld(size)
	if err := w.fill(ram); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t)
	dev := d.add(ram, with(1, 4))
	var wg sync.WaitGroup
	var n atomic.Int64
	end := time.Now().Add(span(time.Second, 30*time.Second))
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
				at := rnd.Int63n(size/sectorSize-int64(len(p)/sectorSize)) * sectorSize
				if _, err := f.ReadAt(p, at); err != nil {
					t.Error(err)
					return
				}
				if err := w.disks[0].compare(p, at/sectorSize); err != nil {
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
	d.remove(dev)
}
