package filter

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// flushes says whether the kernel sends flushes to a disk.
func flushes(t testing.TB, disk string) bool {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/queue/write_cache")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b)) == "write back"
}

// TestFlush makes sure that flushes and FUA writes reach an original with a
// volatile cache, and only there.
func TestFlush(t *testing.T) {
	guest.Need(t)
	disk := guest.LoopDisk(t, 16<<20, 512)
	if !flushes(t, disk) {
		t.Fatal("a loop device without a cache")
	}
	d := program.Start(t)
	dev := d.Add(disk)
	if !flushes(t, dev.Path) {
		t.Fatal("the filter hides the cache")
	}
	before := flushCount(t, disk)
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, 4096)
	for i := range int64(5) {
		if err := f.WriteAt(buf, i*4096); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fsync(f.FD); err != nil {
			t.Fatal(err)
		}
	}
	afterFlush := flushCount(t, disk)
	if afterFlush-before < 5 {
		t.Errorf("%d flushes of the original, want 5", afterFlush-before)
	}
	g := direct.MustOpen(t, dev.Path, unix.O_RDWR|unix.O_DSYNC)
	for i := range int64(5) {
		if err := g.WriteAt(buf, i*4096); err != nil {
			t.Fatal(err)
		}
	}
	if n := flushCount(t, disk) - afterFlush; n < 5 {
		t.Errorf("%d flushes of the original after FUA writes, want 5", n)
	}
	f.Close()
	g.Close()
	d.Remove(dev)
}

// TestFUA makes sure that a FUA write stays one on its way to an original that
// knows it, and that nothing else becomes one.
func TestFUA(t *testing.T) {
	guest.Need(t)
	disk := guest.SCSIDisk(t, 8, 512)
	if guest.QueueLimit(t, disk, "fua") != "1" {
		t.Fatal("a SCSI disk without FUA")
	}
	d := program.Start(t)
	dev := d.Add(disk)
	if guest.QueueLimit(t, dev.Path, "fua") != "1" {
		t.Fatal("the filter hides FUA")
	}
	var st unix.Stat_t
	if err := unix.Stat(disk, &st); err != nil {
		t.Fatal(err)
	}
	buf := direct.Pages(t, 4096)
	for _, c := range []struct {
		flags, fua int
	}{{0, 0}, {unix.O_DSYNC, 7}} {
		f := direct.MustOpen(t, dev.Path, unix.O_RDWR|c.flags)
		fua := 0
		for _, rwbs := range issued(t, unix.Major(st.Rdev), unix.Minor(st.Rdev), func() {
			for i := range int64(7) {
				if err := f.WriteAt(buf, i*4096); err != nil {
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
		f.Close()
	}
	d.Remove(dev)
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
