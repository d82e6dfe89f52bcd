package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// What the kernel module got wrong, a test for each. The first, the wrap of the
// number of takes, is TestMistake1NumberWraps beside the other tests of change
// tracking.

// It corrupted its lists when a device was added again, and memory when a
// snapshot was destroyed whose image was mounted and written (TestDestroyBusy
// does that at greater length).
func TestMistake2AddedTwiceAndDestroyedMounted(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	ext4FS.make(t, dev.Link)
	for range 3 {
		_, err := d.CreateSnapshot(ctx(t), control.CreateRequest{Devices: []string{dev.Name, dev.Path}})
		want(t, err, control.Exists, dev.Name)
		s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
		for _, name := range []string{dev.Name, dev.Path, dev.Link, disk} {
			_, err := d.AddToSnapshot(ctx(t), control.SnapshotDeviceRequest{ID: s.ID, Device: name})
			want(t, err, control.Exists, dev.Name)
			if !errors.Is(err, unix.EALREADY) {
				t.Errorf("%v: errno is not EALREADY", err)
			}
		}
		s = d.taken(s.ID)
		if len(s.Images) != 1 {
			t.Errorf("%d images", len(s.Images))
		}
		_, err = d.AddToSnapshot(ctx(t), control.SnapshotDeviceRequest{ID: s.ID, Device: dev.Name})
		want(t, err, control.Exists)

		at := mount(t, s.Images[0].Link)
		stop := make(chan error, 1)
		go func() {
			for i := 0; ; i++ {
				if err := os.WriteFile(filepath.Join(at, fmt.Sprint(i%4)), make([]byte, 256<<10), 0o600); err != nil {
					stop <- err
					return
				}
				if i%8 == 0 {
					unix.Sync()
				}
			}
		}()
		time.Sleep(200 * time.Millisecond)
		d.destroy(s.ID)
		await(t, "the end of the writer on the image", stop)
		umount(t, at)
	}
	ext4FS.clean(t, dev.Link)
	d.remove(dev)
}

// It went on without copying when a device was detached from a held snapshot.
func TestMistake3DetachWhileHeld(t *testing.T) {
	needVM(t)
	const size = 4 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.open()
	s := d.take(0, dev)
	win.close()
	err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name})
	want(t, err, control.Busy, "held by snapshot "+s.ID)
	if a := d.call("blksnap", "detach", "-d", disk); a.status != 1 || !strings.Contains(a.errout, "held by snapshot "+s.ID) {
		t.Errorf("detach: %+v", a)
	}
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: after a refused detach: %v", err)
	}
	// By force it breaks the snapshot, aloud.
	events := make(chan control.Event, 16)
	watched := make(chan error, 1)
	go func() {
		watched <- d.Watch(ctx(t), s.ID, func(e control.Event) error { events <- e; return nil })
	}()
	// Once it watches: a snapshot that is gone cannot be watched any more.
	if e := await(t, "the first event", events); e.Kind != control.EventCreated {
		t.Errorf("the first event is %+v", e)
	}
	if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		t.Fatal(err)
	}
	if err := await(t, "the end of the watching", watched); err != nil {
		t.Error(err)
	}
	close(events)
	broken := false
	for e := range events {
		broken = broken || e.Kind == control.EventCorrupted && e.Errno == -int(unix.ENODEV)
	}
	if !broken {
		t.Error("nobody was told that the snapshot broke")
	}
	if _, err := os.Stat(s.Images[0].Path); err == nil {
		t.Error("the image is left")
	}
	if err := w.same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// Its take could fail half-way and leave the snapshot half taken.
func TestMistake4TakeHalfDone(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 3, 64<<20)
	d := startDaemon(t)
	var devs []control.Device
	var dirs []string
	for _, disk := range disks {
		dev := d.add(disk)
		devs = append(devs, dev)
		ext4FS.make(t, dev.Link)
		dirs = append(dirs, mount(t, dev.Link))
	}
	var info []control.CBTInfo
	for _, dev := range devs {
		d.destroy(d.take(0, dev).ID)
		info = append(info, d.cbt(dev))
	}
	s := d.create(control.CreateRequest{Devices: names(devs), Storage: []control.Storage{{Path: "/dev/shm"}}})
	before := d.held()
	// Somebody else has frozen the last one: a filesystem cannot be frozen twice.
	run(t, "fsfreeze", "-f", dirs[2])
	frozen := true
	t.Cleanup(func() {
		if frozen {
			_, _ = try("fsfreeze", "-u", dirs[2])
		}
	})
	for range 2 {
		_, err := d.TakeSnapshot(ctx(t), control.TakeRequest{ID: s.ID})
		want(t, err, control.Busy, "freeze "+dirs[2])
	}
	got := d.snapshot(s.ID)
	if got.State != control.SnapshotCreated || got.Taken != nil {
		t.Errorf("after the failed take: %+v", got)
	}
	for _, im := range got.Images {
		if im.Path != "" || im.Link != "" {
			t.Errorf("image %+v", im)
		}
	}
	for i, dev := range devs {
		if now := d.cbt(dev); now != info[i] {
			t.Errorf("change map of %s: %+v, before %+v", dev.Name, now, info[i])
		}
	}
	d.settled(before, 3)
	// The others are not left frozen, and nothing is copied.
	for i, dir := range dirs[:2] {
		if err := os.WriteFile(filepath.Join(dir, "after"), make([]byte, 1<<20), 0o600); err != nil {
			t.Error(err)
		}
		run(t, "sync", "-f", dirs[i])
	}
	if n := d.snapshot(s.ID).Usage.Copied; n != 0 {
		t.Errorf("%d bytes copied for a snapshot that was not taken", n)
	}
	run(t, "fsfreeze", "-u", dirs[2])
	frozen = false
	// The same snapshot can be taken now.
	s = d.taken(s.ID)
	for i, im := range s.Images {
		if im.Take.Number != info[i].Take.Number+1 {
			t.Errorf("image %+v, before the take %+v", im, info[i])
		}
		at := mount(t, im.Path)
		if _, err := os.Stat(filepath.Join(at, "after")); (err == nil) != (i < 2) {
			t.Errorf("image %d: %v", i, err)
		}
		umount(t, at)
	}
	d.destroy(s.ID)
	for i, dev := range devs {
		umount(t, dirs[i])
		d.remove(dev)
	}
}

// A take for which there is no memory fails as a whole too.
func TestMistake4TakeWithoutMemory(t *testing.T) {
	needVM(t)
	small, large := loopDisk(t, 16<<20, 512), loopDisk(t, 256<<30, 512)
	d := startDaemon(t, "state_size=24M")
	devs := []control.Device{d.add(small), d.add(large)}
	before := []control.CBTInfo{d.cbt(devs[0]), d.cbt(devs[1])}
	// 64 Mi chunks of 8 bytes each.
	s := d.create(control.CreateRequest{Devices: names(devs), ChunkSize: 4 << 10, Storage: []control.Storage{{Path: "/dev/shm"}}})
	_, err := d.TakeSnapshot(ctx(t), control.TakeRequest{ID: s.ID})
	if err == nil || !strings.Contains(err.Error(), "state_size") {
		t.Errorf("take without memory: %v", err)
	}
	for i, dev := range devs {
		if now := d.cbt(dev); now != before[i] {
			t.Errorf("change map of %s: %+v, before %+v", dev.Name, now, before[i])
		}
	}
	if got := d.snapshot(s.ID); got.State != control.SnapshotCreated {
		t.Errorf("after the failed take: %+v", got)
	}
	d.destroy(s.ID)
	// With larger chunks there is enough.
	d.destroy(d.take(1<<20, devs...).ID)
	for _, dev := range devs {
		d.remove(dev)
	}
}

// Its cbtdirty marked the first range as often as there were ranges; TestMarkDirty
// does the same through the API.
func TestMistake5OnlyFirstRangeMarked(t *testing.T) {
	needVM(t)
	const size = 4 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	file := filepath.Join(t.TempDir(), "map")
	marked := func() []int {
		d.destroy(d.take(0, dev).ID)
		if a := d.call("blksnap", "readcbtmap", "-d", disk, "-f", file); a.status != 0 {
			t.Fatalf("readcbtmap: %+v", a)
		}
		m, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := d.cbt(dev).ChangesNumber
		var out []int
		for i, x := range m {
			if x == n {
				out = append(out, i)
			}
		}
		return out
	}
	marked()
	if a := d.call("blksnap", "markdirtyblock", "-d", disk, "-r", "0:1", "1280:128", "8191:1"); a.status != 0 || a.out != "" {
		t.Errorf("markdirtyblock: %+v", a)
	}
	if got := marked(); !slices.Equal(got, []int{0, 10, 63}) {
		t.Errorf("marked %v", got)
	}
	if a := d.call("blksnap", "markdirtyblock", "-d", disk, "-r", "0:1", "8191:2"); a.status != 1 || a.errout == "" {
		t.Errorf("markdirtyblock beyond the end: %+v", a)
	}
	if got := marked(); len(got) > 0 {
		t.Errorf("a refused request marked %v", got)
	}
	d.remove(dev)
}

// A writer that was killed could corrupt its snapshot. TestSmallPool has the
// other half: without memory writes went by uncopied.
func TestMistake6WriterKilled(t *testing.T) {
	needVM(t)
	const size = 32 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk, with(queueCounts()[len(queueCounts())-1], 64))
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.open()
	s := d.take(256<<10, dev)
	win.close()
	for i := range int(span(6, 100)) {
		c := exec.Command("fio", "--name=test", "--filename="+dev.Path, "--ioengine=io_uring", "--direct=1", "--rw=randwrite",
			"--bsrange=4k-512k", "--iodepth=32", "--time_based", "--runtime=60", fmt.Sprintf("--randseed=%d", i))
		if i%2 == 1 {
			c = exec.Command("dd", "if=/dev/urandom", "of="+dev.Path, "bs=1M", "conv=notrunc", fmt.Sprintf("seek=%d", 3*i))
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(300+i*37) * time.Millisecond)
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if got := d.snapshot(s.ID); got.Errno != 0 || got.Usage.Copied == 0 {
		t.Errorf("%+v", got)
	}
	d.destroy(s.ID)
	waitFor(t, "the end of the last request", func() bool {
		st, err := d.DeviceStatus(ctx(t), dev.Name)
		if err != nil || st.Errors != 0 {
			t.Fatalf("%d errors, %v", st.Errors, err)
		}
		return st.InFlight == 0
	})
	d.remove(dev)
}

// It took storage that lay on a device of the same snapshot. TestStorageOnItself
// tries every way to that; here it is blksnap's own command.
func TestMistake7StorageOnItself(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link)
	for _, path := range []string{filepath.Join(dir, "differences"), dir, disk} {
		a := d.call("blksnap", "snapshot_create", "-d", disk, "-f", path, "-l", "10M")
		if a.status != 1 || a.out != "" || !strings.Contains(a.errout, "lies on "+disk) {
			t.Errorf("storage %s: %+v", path, a)
		}
	}
	if a := d.call("blksnap", "snapshot_collect"); a.status != 0 || a.out != "\n" {
		t.Errorf("snapshots are left: %+v", a)
	}
	umount(t, dir)
	d.remove(dev)
}

// It copied what was discarded, until the storage overflowed. TestTrim does that
// with a filesystem.
func TestMistake8DiscardCopied(t *testing.T) {
	needVM(t)
	const size = 64 << 20
	disk := loopDisk(t, size, 512)
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 1 << 20}}})
	win := w.open()
	s = d.taken(s.ID)
	win.close()
	run(t, "blkdiscard", dev.Path)
	if got := d.snapshot(s.ID); got.Usage.Copied != 0 || got.Errno != 0 {
		t.Errorf("the discard copied: %+v", got)
	}
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	// Zeroes are content: they are copied, and here that overflows.
	run(t, "blkdiscard", "-z", dev.Path)
	if got := d.snapshot(s.ID); got.Errno != -int(unix.ENOSPC) {
		t.Errorf("after 64 MiB of zeroes: %+v", got)
	}
	zero := bytes.Repeat([]byte{0}, maxWrite)
	if err := scan(disk, size, func(p []byte, sector int64) error {
		if !bytes.Equal(p, zero[:len(p)]) {
			return fmt.Errorf("I5: no zeroes at sector %d", sector)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	d.destroy(s.ID)
	d.remove(dev)
}

// It only logged that a filesystem did not freeze.
func TestMistake9FreezeFails(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link)
	run(t, "fsfreeze", "-f", dir)
	t.Cleanup(func() { _, _ = try("fsfreeze", "-u", dir) })
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
	a := d.call("ublk-blksnap", "snapshot", "take", s.ID)
	if a.status != 5 || !strings.Contains(a.errout, "freeze "+dir) {
		t.Errorf("take: %+v", a)
	}
	if got := d.snapshot(s.ID); got.State != control.SnapshotCreated {
		t.Errorf("after the failed take: %+v", got)
	}
	// Told to go on without freezing, it does.
	a = d.call("ublk-blksnap", "snapshot", "take", s.ID, "--no-freeze")
	if a.status != 0 {
		t.Errorf("take without freezing: %+v", a)
	}
	if got := d.snapshot(s.ID); got.State != control.SnapshotTaken || got.Frozen != 0 {
		t.Errorf("after the take: %+v", got)
	}
	d.destroy(s.ID)
	run(t, "fsfreeze", "-u", dir)
	umount(t, dir)
	d.remove(dev)
}
