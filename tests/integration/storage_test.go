package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

// Difference storage: where it may lie, how it ends, and what is left of it.

// corrupted waits until the snapshot is broken and returns the kinds of the
// events that told of it, in order.
func (d *daemon) corrupted(id string) (kinds []string, last control.Event) {
	d.t.Helper()
	for {
		e, err := d.WaitEvent(ctx(d.t), control.WaitRequest{ID: id, Timeout: patience})
		if err != nil {
			d.t.Fatalf("after the events %q: %v", kinds, err)
		}
		kinds = append(kinds, e.Kind)
		if e.Kind == control.EventCorrupted {
			return kinds, e
		}
	}
}

// TestOverflow is I5: the storage comes to its end, or breaks, while writers go
// on. The snapshot breaks aloud; the original has no part in it.
func TestOverflow(t *testing.T) {
	needVM(t)
	const size = 24 << 20
	ram := ramDisks(t, 2, size)
	run(t, "modprobe", "dm-mod")
	store := linear(t, ram[1])
	for _, c := range []struct {
		name    string
		storage func(t *testing.T) control.Storage
		breaks  func(t *testing.T) // after the take
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
				return control.Storage{Path: filepath.Join(smallFS(t, 6<<20), "differences")}
			},
			errno:  unix.ENOSPC,
			events: []string{control.EventNoSpace, control.EventCorrupted},
		}, {
			name:    "full device",
			storage: func(t *testing.T) control.Storage { return control.Storage{Path: loopDisk(t, 6<<20, 512)} },
			errno:   unix.ENOSPC,
			events:  []string{control.EventNoSpace, control.EventCorrupted},
		}, {
			name:    "storage error",
			storage: func(t *testing.T) control.Storage { return control.Storage{Path: dmDisk(t, "store", store)} },
			breaks:  func(t *testing.T) { reload(t, "store", fmt.Sprintf("0 %d error", size>>9)) },
			errno:   unix.EIO,
			events:  []string{control.EventCorrupted},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			storage := c.storage(t)
			d := startDaemon(t)
			queues := queueCounts()
			dev := d.add(ram[0], with(queues[len(queues)-1], 32))
			w := newWorld(size)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			stop := w.writers(t, 6, mix{writers: 4, zeroes: true}, dev.Path)
			s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{storage}})
			s = d.taken(s.ID)
			if c.breaks != nil {
				c.breaks(t)
			}
			kinds, last := d.corrupted(s.ID)
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
			err := scan(image, 1<<20, func([]byte, int64) error { return nil })
			if !errors.Is(err, unix.EIO) {
				t.Errorf("read of the image: %v", err)
			}
			f := openDirect(t, image, unix.O_RDWR)
			if err := f.write(ublkPages(t, 4096), 0); !errors.Is(err, unix.EIO) {
				t.Errorf("write to the image: %v", err)
			}
			f.close()
			s = d.snapshot(s.ID)
			if s.State != control.SnapshotCorrupted || s.Errno != -int(c.errno) || s.Images[0].Errno != -int(c.errno) {
				t.Errorf("I5: snapshot %+v", s)
			}
			if a := d.call("blksnap", "snapshot_info", "-d", dev.Path, "-f", "error_code"); a.out != fmt.Sprintf("%d\n", -int(c.errno)) {
				t.Errorf("snapshot_info: %+v", a)
			}
			// The original goes on.
			w.more(t, 50) // I5
			// A new one works at once, beside the broken one.
			win := w.open()
			next := d.take(16<<10, dev)
			win.close()
			d.destroy(s.ID)
			if err := win.check(next.Images[0].Path); err != nil {
				t.Errorf("I1, next snapshot: %v", err)
			}
			d.destroy(next.ID)
			if err := stop(); err != nil {
				t.Errorf("I5: a writer noticed: %v", err)
			}
			d.remove(dev)
			if err := w.same(ram[0]); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestStuckStorage is I5 with storage that neither works nor fails: writers wait
// for it no longer than configured, and everything about the snapshot but its
// memory goes. That the daemon's log is a pipe that nobody reads changes nothing.
func TestStuckStorage(t *testing.T) {
	needVM(t)
	const size = 24 << 20
	ram := ramDisks(t, 2, size)
	run(t, "modprobe", "dm-mod")
	store := dmDisk(t, "store", linear(t, ram[1]))
	log, into, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d := startDaemonLogging(t, into, "storage_timeout=6s", "diff_buffer_pool_size=1M", "log_level=debug")
	fillPipe(t, into)
	into.Close()
	queues := queueCounts()
	dev := d.add(ram[0], with(queues[len(queues)-1], 32))
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: store}}})
	s = d.taken(s.ID)
	run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "store")
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			run(t, "dmsetup", "resume", "store")
		}
	}
	t.Cleanup(resume)
	stop := w.writers(t, 6, mix{writers: 4, zeroes: true}, dev.Path)
	kinds, last := d.corrupted(s.ID)
	if !slices.Equal(kinds, []string{control.EventCorrupted}) || last.Errno != -int(unix.ETIMEDOUT) || last.Device != dev.OriginalNumber {
		t.Errorf("events %q, the last %+v", kinds, last)
	}
	w.more(t, 50) // I5
	if err := d.DestroySnapshot(ctx(t), s.ID); control.CodeOf(err) != control.Timeout || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("destroy: %v", err)
	}
	// Its device's ring has I/O under way: neither goes before that has ended.
	if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: true}); control.CodeOf(err) != control.Timeout {
		t.Errorf("remove: %v", err)
	}
	// A new one works at once, on other storage: this one is still at work.
	other := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: "/dev/shm"}}})
	if _, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: other.ID, Storage: control.Storage{Path: store}}); control.CodeOf(err) != control.Busy {
		t.Errorf("storage under way appended to another snapshot: %v", err)
	}
	win := w.open()
	other = d.taken(other.ID)
	win.close()
	if err := win.check(other.Images[0].Path); err != nil {
		t.Errorf("I1, next snapshot: %v", err)
	}
	d.destroy(other.ID)
	if err := stop(); err != nil {
		t.Errorf("I5: a writer noticed: %v", err)
	}
	resume()
	waitFor(t, "the end of the snapshot", func() bool { return len(snapshotIDs(t, d)) == 0 })
	if left, err := os.ReadDir(filepath.Join(d.dir.State(), "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("state left: %v, %v", left, err)
	}
	var info control.Info
	waitFor(t, "the loss of lines of the log", func() bool {
		info, err = d.Info(ctx(t))
		return err != nil || info.LogLinesLost > 0
	})
	if a := d.call("ublk-blksnap", "status", dev.Name); err != nil || a.status != 0 || !strings.Contains(a.out, "log lost:") {
		t.Errorf("%v, %+v", err, a)
	}
	said := make(chan string)
	go func() {
		b, _ := io.ReadAll(log)
		said <- string(b)
	}()
	d.remove(dev)
	if err := w.same(ram[0]); err != nil {
		t.Errorf("I2: %v", err)
	}
	d.stop()
	all := await(t, "the end of the log", said)
	for _, line := range []string{"the snapshot is given up", "lines of this log were dropped: nobody took them", "daemon stopped"} {
		if !strings.Contains(all, line) {
			t.Errorf("the log does not say %q", line)
		}
	}
}

// fillPipe fills a pipe to its end.
func fillPipe(t testing.TB, w *os.File) {
	t.Helper()
	fd := int(w.Fd()) // blocking from here on
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := unix.Write(fd, []byte("x\n")); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
}

// TestDestroyStuckStorage destroys snapshots whose storage stops to answer while
// nothing is under way on it, or when it was not even appended: that is told in
// time, holds up nobody else, and ends by itself when the storage answers. Until
// then it is claimed.
func TestDestroyStuckStorage(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	ram := ramDisks(t, 2, size)
	run(t, "modprobe", "dm-mod")
	run(t, "modprobe", "dm-delay")
	// Over disks with a cache: the kernel flushes no others.
	small := loopDisk(t, 512<<10, 512)
	late := dmDisk(t, "late", fmt.Sprintf("0 1024 delay %[1]s 0 0 %[1]s 0 0 %[1]s 0 600000", small)) // flushes, until it is loaded anew
	device := dmDisk(t, "store", linear(t, loopDisk(t, 2*size, 512)))
	files := dmDisk(t, "files", linear(t, loopDisk(t, ext4FS.minimum, 512)))
	ext4FS.make(t, files)
	dir := mount(t, files)
	file := filepath.Join(dir, "differences")
	d := startDaemon(t, "storage_timeout=3s")
	dev, other := d.add(ram[0]), d.add(ram[1])
	storage := []string{device, file}
	var held []control.Snapshot
	for _, path := range storage {
		s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: path}}})
		held = append(held, d.taken(s.ID))
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 1 << 20})
	held = append(held, s)
	_, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: late}})
	want(t, err, control.Internal, late, "less than one chunk", "given back when it does")
	suspended := []string{"store", "files"} // with its filesystem frozen
	for _, name := range suspended {
		run(t, "dmsetup", "suspend", name)
	}
	resume := func() {
		for _, name := range suspended {
			run(t, "dmsetup", "resume", name)
		}
		if suspended != nil {
			reload(t, "late", linear(t, small))
		}
		suspended = nil
	}
	t.Cleanup(resume)

	ended := make(chan error, len(held))
	for _, s := range held {
		go func() { ended <- d.DestroySnapshot(ctx(t), s.ID) }()
	}
	waitFor(t, "the destruction to begin", func() bool {
		list, err := d.Snapshots(ctx(t))
		return err == nil && len(list) == len(held) && !slices.ContainsFunc(list, func(s control.Snapshot) bool { return s.State != control.SnapshotDestroying })
	})
	others := func() {
		t.Helper()
		d.destroy(d.take(0, other).ID)
		d.remove(d.add(loopDisk(t, size, 512)))
	}
	others()
	for range held {
		err := await(t, "the end of the patience", ended)
		want(t, err, control.Timeout, "does not answer")
	}
	others()
	for _, path := range []string{device, late} {
		_, err := d.CreateSnapshot(ctx(t), control.CreateRequest{Devices: []string{other.Name}, Storage: []control.Storage{{Path: path}}})
		want(t, err, control.Busy, path)
	}
	for i, s := range held {
		now := d.snapshot(s.ID)
		if now.State != control.SnapshotDestroying || now.Images[0].Path != "" || i < len(storage) && now.Storage[0].Path != storage[i] {
			t.Errorf("while its storage does not answer: %+v", now)
		}
		_, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: "/dev/shm"}})
		want(t, err, control.Busy, "being destroyed")
		if _, err := os.Stat(filepath.Join(d.dir.State(), "snapshots", s.ID, "pool")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its memory is not given back: %v", err)
		}
	}
	d.remove(dev) // which needs none of it
	resume()
	waitFor(t, "the end of the snapshots", func() bool { return len(snapshotIDs(t, d)) == 0 })
	if _, err := os.Stat(file); err == nil {
		t.Error("the file is left")
	}
	for _, path := range []string{device, late} {
		if f, err := claim(path); err != nil {
			t.Error(err)
		} else {
			f.Close()
		}
	}
	if left, err := os.ReadDir(filepath.Join(d.dir.State(), "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("state left: %v, %v", left, err)
	}
	umount(t, dir)
}

// TestKilledStuckStorage: the daemon after one that was killed serves, though what
// is left of a storage does not answer. It goes when it does.
func TestKilledStuckStorage(t *testing.T) {
	needVM(t)
	run(t, "modprobe", "dm-mod")
	files := dmDisk(t, "files", linear(t, loopDisk(t, ext4FS.minimum, 512)))
	ext4FS.make(t, files)
	dir := mount(t, files)
	file := filepath.Join(dir, "differences")
	d := startDaemon(t)
	dev := d.add(ramDisks(t, 1, 8<<20)[0])
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: file}}})
	d.taken(s.ID)
	if err := unix.Kill(d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !d.ended(patience) {
		t.Fatal("the process does not end")
	}
	state := filepath.Join(d.dir.State(), "snapshots")
	run(t, "dmsetup", "suspend", "files") // with its filesystem frozen
	suspended := true
	resume := func() {
		if suspended {
			suspended = false
			run(t, "dmsetup", "resume", "files")
		}
	}
	t.Cleanup(resume)
	config := filepath.Join(t.TempDir(), "conf")
	if err := os.WriteFile(config, []byte("disk_timeout = \"3s\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	next := exec.Command(program(t), "daemon", "--run-dir", string(d.dir), "--config", config)
	next.Stdout, next.Stderr = os.Stdout, os.Stderr
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the next daemon", func() bool { _, err := d.Info(ctx(t)); return err == nil })
	if left, err := os.ReadDir(filepath.Join(state, s.ID)); err != nil || len(left) != 1 {
		t.Errorf("while the storage does not answer there are %v, %v; want its record", left, err)
	}
	resume()
	waitFor(t, "the end of the storage", func() bool {
		left, err := os.ReadDir(state)
		_, gone := os.Stat(file)
		return err == nil && len(left) == 0 && errors.Is(gone, os.ErrNotExist)
	})
	if err := next.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := next.Wait(); err != nil {
		t.Error(err)
	}
	umount(t, dir)
}

// TestStuckFile has storage files on a filesystem that stands still: opening or
// allocating one ends in time, and nobody gets a file that another snapshot
// still waits for.
func TestStuckFile(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	disk := loopDisk(t, ext4FS.minimum, 512)
	ext4FS.make(t, disk)
	dir := mount(t, disk)
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, "storage_timeout=3s")
	dev := d.add(ramDisks(t, 1, size)[0])
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10})
	run(t, "fsfreeze", "--freeze", dir)
	frozen := true
	thaw := func() {
		if frozen {
			frozen = false
			run(t, "fsfreeze", "--unfreeze", dir)
		}
	}
	t.Cleanup(thaw)
	for _, c := range []struct {
		path string
		want control.Code
	}{
		{filepath.Join(dir, "new"), control.Timeout}, // cannot be made
		{there, control.Timeout},                     // nor one beside this
		{there, control.Busy},
	} {
		_, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: c.path}})
		if control.CodeOf(err) != c.want {
			t.Errorf("append %s: %v, want %v", c.path, err, c.want)
		}
	}
	if _, err := d.CreateSnapshot(ctx(t), control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: there}}}); control.CodeOf(err) != control.Busy {
		t.Errorf("create on storage of another: %v", err)
	}
	thaw()
	waitFor(t, "the end of one file and the use of the other", func() bool {
		_, gone := os.Stat(filepath.Join(dir, "new"))
		_, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: there}})
		if err != nil && control.CodeOf(err) != control.Busy {
			t.Fatal(err)
		}
		return err == nil && errors.Is(gone, os.ErrNotExist)
	})
	win := w.open()
	s = d.taken(s.ID)
	win.close()
	stop := w.writers(t, 9, mix{writers: 2}, dev.Path)
	time.Sleep(span(500*time.Millisecond, 5*time.Second))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	d.destroy(s.ID)
	if st, err := os.Stat(there); err != nil || st.Size() != 0 {
		t.Errorf("the file that was there: %+v, %v", st, err)
	}
	d.remove(dev)
}

// TestPoolsGivenBack: what a queue's ring holds of a snapshot goes with it, even
// if nothing else happens on that queue.
func TestPoolsGivenBack(t *testing.T) {
	needVM(t)
	const size, pool = 4 << 20, 32 << 20
	d := startDaemon(t, "diff_buffer_pool_size=32M", "state_size=256M")
	dev := d.add(ramDisks(t, 1, size)[0])
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
	d.destroy(d.take(0, dev).ID)
	before := available()
	const rounds = 12
	for range rounds {
		d.destroy(d.take(0, dev).ID)
	}
	waitFor(t, "the memory of the pools (I9)", func() bool {
		more := before - available()
		t.Logf("%d KiB less after %d rounds with pools of %d KiB", more>>10, rounds, pool>>10)
		return more < 4*pool
	})
}

// TestAttachForNothing: a snapshot that cannot be created leaves no filter
// behind that was attached for it, and those that were there.
func TestAttachForNothing(t *testing.T) {
	needVM(t)
	ram := ramDisks(t, 3, 4<<20)
	d := startDaemon(t)
	dev := d.add(ram[0])
	for _, r := range []control.CreateRequest{
		{Devices: ram[:2], Storage: []control.Storage{{Path: "/nowhere/storage"}}},
		{Devices: ram[:2], Storage: []control.Storage{{Path: ram[1]}}}, // on itself
		{Devices: []string{ram[0], ram[1], "/dev/nothing"}},
		{Devices: ram[:2], ChunkSize: 5},
	} {
		r.Attach = true
		if _, err := d.CreateSnapshot(ctx(t), r); err == nil {
			t.Errorf("%+v was created", r)
		}
		devs, err := d.Devices(ctx(t))
		if err != nil || len(devs) != 1 || devs[0].Name != dev.Name {
			t.Errorf("after %+v: devices %+v, %v", r, devs, err)
		}
	}
	s := d.take(0, dev)
	if _, err := d.AddToSnapshot(ctx(t), control.SnapshotDeviceRequest{ID: s.ID, Device: ram[1], Attach: true}); err == nil {
		t.Error("a device was added to a taken snapshot")
	}
	if devs, err := d.Devices(ctx(t)); err != nil || len(devs) != 1 {
		t.Errorf("after a refused addition: devices %+v, %v", devs, err)
	}
}

// TestStorageBlocks has originals and storage of different logical blocks: the
// storage is used directly if it can do what the images need, else through the
// page cache, and the images are right.
func TestStorageBlocks(t *testing.T) {
	needVM(t)
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
			d := startDaemon(t)
			storage := loopDisk(t, 4*size, c.storage)
			devs := []control.Device{d.add(loopDisk(t, size, c.first))}
			if c.later != 0 {
				devs = append(devs, d.add(loopDisk(t, size, c.later)))
			}
			w := newWorld(slices.Repeat([]int64{size}, len(devs))...)
			var paths []string
			for _, dev := range devs {
				paths = append(paths, dev.Path)
			}
			if err := w.fill(paths...); err != nil {
				t.Fatal(err)
			}
			s := d.create(control.CreateRequest{Devices: []string{devs[0].Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: storage}}})
			if c.later != 0 {
				if _, err := d.AddToSnapshot(ctx(t), control.SnapshotDeviceRequest{ID: s.ID, Device: devs[1].Name}); err != nil {
					t.Fatal(err)
				}
			}
			if direct := isDirect(t, d.pid, storage); direct != c.direct {
				t.Errorf("direct I/O on the storage: %v, want %v", direct, c.direct)
			}
			win := w.open()
			s = d.taken(s.ID)
			win.close()
			stop := w.writers(t, 8, mix{block: 4096, writers: 2, zeroes: true}, paths...)
			time.Sleep(span(500*time.Millisecond, 10*time.Second))
			if err := stop(); err != nil {
				t.Error(err)
			}
			var images []string
			for _, im := range s.Images {
				images = append(images, im.Path)
			}
			// An image is written in its own blocks, wherever they lie by now.
			f := openDirect(t, images[len(images)-1], unix.O_RDWR)
			buf := ublkPages(t, devs[len(devs)-1].LogicalBlockSize)
			for off := int64(0); off < 1<<20; off += 20 << 10 {
				if err := f.read(buf, off); err != nil {
					t.Fatal(err)
				}
				if err := f.write(buf, off); err != nil {
					t.Fatalf("write to the image at %d: %v", off, err)
				}
			}
			f.close()
			if err := win.check(images...); err != nil {
				t.Errorf("I1: %v", err)
			}
			d.destroy(s.ID)
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
	needVM(t)
	const size = 16 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t, "diff_storage_minimum=2097152") // 1 GiB, much more than there is
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 4 << 20}}})
	win := w.open()
	s = d.taken(s.ID)
	win.close()
	if s.Usage.Capacity != 4<<20 {
		t.Errorf("of a limit of 4 MiB %d bytes are allocated", s.Usage.Capacity)
	}
	if e, err := d.WaitEvent(ctx(t), control.WaitRequest{ID: s.ID}); err == nil {
		t.Errorf("event %+v before anything is written", e)
	}

	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, 64<<10)
	pos := int64(0)
	writeUntil := func(end int64) {
		t.Helper()
		for ; pos < end; pos += int64(len(buf)) {
			x := w.disks[0].begin(pos/sectorSize, (pos+int64(len(buf)))/sectorSize, false)
			stamp(buf, x.v, 0, pos/sectorSize)
			if err := f.write(buf, pos); err != nil {
				t.Fatal(err)
			}
			x.done()
		}
	}
	for {
		if pos == 4<<20 {
			t.Fatal("storage is full, and nobody said that it was getting low")
		}
		writeUntil(pos + int64(len(buf)))
		e, err := d.WaitEvent(ctx(t), control.WaitRequest{ID: s.ID, Timeout: 100 * time.Millisecond})
		if err == nil {
			if e.Kind != control.EventLowFreeSpace || e.Sectors != (size-4<<20)/sectorSize {
				t.Fatalf("event %+v, want %d sectors", e, (size-4<<20)/sectorSize)
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
	got, err := d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: file}})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Storage) != 2 || got.Usage.Capacity != size { // no more than all of the disk
		t.Errorf("after appending: %+v", got)
	}
	writeUntil(size)
	if s = d.snapshot(s.ID); s.Errno != 0 || s.State != control.SnapshotTaken || s.Usage.Copied != size {
		t.Errorf("after all was written: %+v", s)
	}
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if e, err := d.WaitEvent(ctx(t), control.WaitRequest{ID: s.ID}); err == nil {
		t.Errorf("event %+v", e)
	}
	f.close()
	d.destroy(s.ID)
	if _, err := os.Stat(file); err == nil {
		t.Error("the storage is left")
	}
	d.remove(dev)
}

// TestStorageOnItself: storage that lies on a filtered device, in whatever way,
// is refused, and nothing is left of the attempt.
func TestStorageOnItself(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 2, 160<<20)
	run(t, "modprobe", "dm-mod")
	run(t, "modprobe", "loop")
	d := startDaemon(t)
	direct := d.add(disks[0])
	stacked := d.add(disks[1])
	dm := dmDisk(t, "over", linear(t, stacked.Path))
	ext4FS.make(t, direct.Link)
	ext4FS.make(t, dm)
	dir, dmDir := mount(t, direct.Link), mount(t, dm)
	// A loop device over a file on it, and a filesystem on the loop device.
	file := sparseFile(t, dir, 80<<20)
	loop := loopOver(t, file, 512)
	ext4FS.make(t, loop)
	loopDir := mount(t, loop)
	// The same through an overlay.
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		t.Fatal(err)
	}
	overlay := t.TempDir()
	run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+upper+",workdir="+work, "over", overlay)
	t.Cleanup(func() { run(t, "umount", overlay) })
	// Both where no path leads to them.
	hidden := filepath.Join(dir, "hidden")
	for _, sub := range []string{"", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(hidden, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	hiddenLoop := loopOver(t, sparseFile(t, hidden, 80<<20), 512)
	hiddenOverlay := t.TempDir()
	run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+hidden+"/upper,workdir="+hidden+"/work", "over", hiddenOverlay)
	t.Cleanup(func() { run(t, "umount", hiddenOverlay) })
	run(t, "mount", "-t", "tmpfs", "cover", hidden)
	t.Cleanup(func() { run(t, "umount", hidden) })
	// A symbolic link and a bind mount.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	bind := t.TempDir()
	run(t, "mount", "--bind", dir, bind)
	t.Cleanup(func() { run(t, "umount", bind) })

	for _, c := range []struct{ what, path string }{
		{"the original", disks[0]},
		{"the filter device", direct.Path},
		{"its link", direct.Link},
		{"a directory", dir},
		{"a new file", filepath.Join(dir, "new")},
		{"a link to it", link},
		{"a bind mount of it", bind},
		{"an overlay", overlay},
		{"an overlay over a directory that is mounted over", hiddenOverlay},
		{"a loop device over a file that is mounted over", hiddenLoop},
		{"a dm device over it", dm},
		{"a filesystem on a dm device over it", dmDir},
		{"a loop device over a file on it", loop},
		{"a filesystem on a loop device over a file on it", filepath.Join(loopDir, "new")},
	} {
		_, err := d.CreateSnapshot(ctx(t), control.CreateRequest{Devices: []string{direct.Name, stacked.Name}, Storage: []control.Storage{{Path: c.path}}})
		if err == nil {
			t.Errorf("%s: not refused", c.what)
			for _, id := range snapshotIDs(t, d) {
				d.destroy(id)
			}
			continue
		}
		if control.CodeOf(err) != control.Busy || !strings.Contains(err.Error(), "lies on /dev/ram") {
			t.Errorf("%s: %v", c.what, err)
		}
		// Not even of one that has only the other device.
		s := d.create(control.CreateRequest{Devices: []string{stacked.Name}})
		_, err = d.AppendStorage(ctx(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: c.path}})
		want(t, err, control.Busy, c.path, "lies on /dev/ram")
		d.destroy(s.ID)
	}
	if ids := snapshotIDs(t, d); len(ids) > 0 {
		t.Errorf("snapshots %v are left", ids)
	}
	for _, p := range []string{filepath.Join(dir, "new"), filepath.Join(loopDir, "new")} {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
	// An overlay over what cannot be seen, but not on these disks: as much is said.
	covered, unseen := smallFS(t, 16<<20), t.TempDir()
	if err := errors.Join(os.Mkdir(covered+"/upper", 0o755), os.Mkdir(covered+"/work", 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+covered+"/upper,workdir="+covered+"/work", "over", unseen)
	t.Cleanup(func() { run(t, "umount", unseen) })
	run(t, "mount", "-t", "tmpfs", "cover", covered)
	t.Cleanup(func() { run(t, "umount", covered) })
	a := d.call("ublk-blksnap", "snapshot", "create", direct.Name, "--storage", unseen, "--take")
	if a.status != 0 || !strings.Contains(a.errout, "warning: storage "+unseen) || !strings.Contains(a.errout, "cannot be seen") {
		t.Errorf("storage on an unseen overlay: %+v", a)
	}
	for _, id := range snapshotIDs(t, d) {
		if st := d.snapshot(id).Storage[0]; !strings.Contains(st.Warning, covered+"/upper cannot be seen") {
			t.Errorf("storage on an unseen overlay: %+v", st)
		}
		d.destroy(id)
	}
	// The other way round: what is in use as storage can not be added.
	free := loopDisk(t, 16<<20, 512)
	s := d.create(control.CreateRequest{Devices: []string{direct.Name}, Storage: []control.Storage{{Path: free}}})
	_, err := d.AddDevice(ctx(t), control.AddRequest{Path: free})
	want(t, err, control.Busy, free)
	_, err = d.AddToSnapshot(ctx(t), control.SnapshotDeviceRequest{ID: s.ID, Device: free, Attach: true})
	want(t, err, control.Busy, free)
	d.destroy(s.ID)
	d.remove(d.add(free))

	for _, dir := range []string{loopDir, dmDir} {
		umount(t, dir)
	}
}

// TestTrim is the trim of a whole filesystem while a snapshot is held: it
// neither copies nor overflows, and the image stays right.
func TestTrim(t *testing.T) {
	needVM(t)
	disk := loopDisk(t, 128<<20, 512)
	d := startDaemon(t)
	dev := d.add(disk)
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link)
	sums := someFiles(t, dir, 1)
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, bytes.Repeat([]byte("data"), 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 4 << 10, Storage: []control.Storage{{Path: "/dev/shm", Limit: 8 << 20}}})
	s = d.taken(s.ID)
	image := s.Images[0].Path
	was := digest(t, image)
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	unix.Sync()
	before := d.snapshot(s.ID).Usage.Copied
	out := run(t, "fstrim", "-v", dir)
	unix.Sync()
	after := d.snapshot(s.ID)
	// The filesystem writes a little of its own.
	if after.Errno != 0 || after.Usage.Copied-before > 1<<20 {
		t.Errorf("the trim (%s) copied %d bytes: %+v", strings.TrimSpace(out), after.Usage.Copied-before, after)
	}
	if got := digest(t, image); got != was {
		t.Error("I1: the image has changed")
	}
	st, err := d.DeviceStatus(ctx(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	if n := st.Operations[control.OpDiscard].Bytes; n < 64<<20 || st.DiscardsSkipped < 32<<20 {
		t.Errorf("%d bytes discarded, %d not passed on", n, st.DiscardsSkipped)
	}
	at := mount(t, image)
	if p, err := os.ReadFile(filepath.Join(at, "big")); err != nil || !bytes.Equal(p, bytes.Repeat([]byte("data"), 8<<20)) {
		t.Errorf("the removed file in the image: %d bytes, %v", len(p), err)
	}
	umount(t, at)
	d.destroy(s.ID)

	// Without a snapshot the trim reaches the original. Until it is mounted anew
	// ext4 thinks that it has been trimmed.
	umount(t, dir)
	dir = mount(t, dev.Link)
	allocated := blocksOf(t, disk)
	run(t, "fstrim", "-v", dir)
	if now := blocksOf(t, disk); now > allocated-16<<20 {
		t.Errorf("%d bytes are allocated after the trim, %d before", now, allocated)
	}
	dropCaches(t)
	sameFiles(t, filepath.Join(dir, "set1"), below("set1", sums))
	umount(t, dir)
	ext4FS.clean(t, dev.Link)
	d.remove(dev)
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
	needVM(t)
	const size = 16 << 20
	disk := loopDisk(t, size, 512)
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.open()
	a, b := d.take(4<<10, dev), d.take(64<<10, dev)
	win.close()
	f := openDirect(t, dev.Path, unix.O_RDWR)
	r := &randomWriter{d: newWorld(size).disks[0], m: mix{block: sectorSize, writers: 1, largest: maxWrite}, rnd: newRand(9)}
	buf := ublkPages(t, maxWrite)
	for range 400 {
		from, to := r.place()
		var err error
		if r.rnd.Intn(2) == 0 {
			err = ioctlRange(f.fd, unix.BLKDISCARD, from*sectorSize, (to-from)*sectorSize)
		} else {
			stamp(buf[:(to-from)*sectorSize], 1<<40, 0, from)
			err = f.write(buf[:(to-from)*sectorSize], from*sectorSize)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := ioctlRange(f.fd, unix.BLKDISCARD, 0, size); err != nil {
		t.Fatal(err)
	}
	for _, s := range []control.Snapshot{a, b} {
		if err := win.check(s.Images[0].Path); err != nil {
			t.Errorf("I1, chunks of %d: %v", s.ChunkSize, err)
		}
		d.destroy(s.ID)
	}
	// All of it counts as changed.
	d.destroy(d.take(0, dev).ID)
	if i := slices.Index(d.cbtMap(dev), 0); i >= 0 {
		t.Errorf("I3: block %d, which was discarded, is not marked", i)
	}
	f.close()
	d.remove(dev)
}

// TestNothingToRead is I10: after its destruction nothing of a snapshot's data
// can be read from where it lay.
func TestNothingToRead(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	ram := ramDisks(t, 2, size)
	noDiscard := scsiDisk(t, 8, 512)
	d := startDaemon(t)
	dev := d.add(ram[0])
	w := newWorld(size)
	file := filepath.Join(t.TempDir(), "differences")
	for _, path := range []string{file, "/dev/shm", ram[1], noDiscard} {
		t.Run(filepath.Base(path), func(t *testing.T) {
			d := d.in(t)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: path}}})
			s = d.taken(s.ID)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "4 MiB in the storage", func() bool { return d.snapshot(s.ID).Usage.Stored >= 4<<20 })
			// Everything the daemon keeps data in, by its own files: also those
			// that have no name.
			all := d.dataFiles(t)
			found := 0
			for _, f := range all {
				if stamps(t, f) == 0 {
					continue
				}
				found++
				if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s can be read by others: %v", f.Name(), st.Mode())
				}
			}
			if found == 0 {
				t.Fatalf("no data found in %v: the test does not see it", all)
			}
			d.destroy(s.ID)
			unix.Sync()
			for _, f := range all {
				if n := stamps(t, f); n > 0 {
					t.Errorf("I10: %d sectors of old data in %s", n, f.Name())
				}
			}
			if path == file {
				if _, err := os.Stat(file); err == nil {
					t.Error("I10: the file is left")
				}
			}
			if found := grepState(t, d.dir.State()); found != "" {
				t.Errorf("I10: old data in %s", found)
			}
		})
	}
	d.remove(dev)
}

// dataFiles opens the regular files and block devices that the daemon has open
// or mapped, but for the originals and the filters.
func (d *daemon) dataFiles(t *testing.T) []*os.File {
	t.Helper()
	devs, err := d.Devices(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	var out []*os.File
	seen := map[[2]uint64]bool{}
	for _, dir := range []string{"fd", "map_files"} {
		paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/%s/*", d.pid, dir))
		for _, p := range paths {
			var st unix.Stat_t
			if unix.Stat(p, &st) != nil {
				continue
			}
			kind := st.Mode & unix.S_IFMT
			if kind != unix.S_IFREG && kind != unix.S_IFBLK || seen[[2]uint64{st.Dev, st.Ino}] {
				continue
			}
			seen[[2]uint64{st.Dev, st.Ino}] = true
			number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
			if kind == unix.S_IFBLK && slices.ContainsFunc(devs, func(x control.Device) bool { return x.OriginalNumber == number || x.Number == number }) {
				continue
			}
			f, err := os.Open(p)
			if err != nil {
				continue
			}
			t.Cleanup(func() { f.Close() })
			out = append(out, f)
		}
	}
	return out
}

// stamps counts the stamped sectors of disk 0 in a file.
func stamps(t *testing.T, f *os.File) int {
	t.Helper()
	// What the page cache has of a disk may be old.
	_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	n := 0
	buf := make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(buf)) {
		got, err := f.ReadAt(buf, off)
		for p := buf[:got&^511]; len(p) > 0; p = p[512:] {
			// A stamp says itself where it belongs.
			at := int64(le64(p[8:]))
			if at>>48 == 1 {
				if v, ok := stampOf(p[:512], 0, at&(1<<48-1)); ok && v != zeroes {
					n++
				}
			}
		}
		if err != nil || got == 0 {
			return n
		}
	}
}

// grepState is the first file below dir with stamps in it.
func grepState(t *testing.T, dir string) string {
	found := ""
	_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if f, err := os.Open(path); err == nil {
				if stamps(t, f) > 0 {
					found = path
				}
				f.Close()
			}
		}
		return nil
	})
	return found
}

// TestDestroyBusy destroys snapshots whose images are open, mounted and under
// I/O: their users get errors, nothing hangs, nothing is left, and the original
// does not notice.
func TestDestroyBusy(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 128<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link)
	sums := someFiles(t, dir, 1)
	round := func() {
		stop := busyFiles(t, dir)
		defer stop()
		opened, mounted, written := d.take(16<<10, dev), d.take(64<<10, dev), d.take(64<<10, dev)

		f := openDirect(t, opened.Images[0].Path, unix.O_RDWR)
		buf := ublkPages(t, 4096)
		if err := f.read(buf, 0); err != nil {
			t.Fatal(err)
		}
		at := mount(t, mounted.Images[0].Path)
		fileEnd := make(chan error, 1)
		go func() {
			// Writes to the mounted image until that fails.
			p := make([]byte, 64<<10)
			for i := 0; ; i++ {
				g, err := os.Create(filepath.Join(at, fmt.Sprintf("new%d", i%8)))
				if err == nil {
					_, err = g.Write(p)
				}
				if err == nil {
					err = g.Sync()
				}
				g.Close()
				if err != nil {
					fileEnd <- err
					return
				}
			}
		}()
		fioEnd := make(chan string, 1)
		go func() {
			out, err := try("fio", "--name=image", "--filename="+written.Images[0].Path, "--ioengine=libaio", "--direct=1",
				"--rw=randrw", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=600")
			if err == nil {
				out = ""
			}
			fioEnd <- out
		}()
		time.Sleep(700 * time.Millisecond)
		for _, s := range []control.Snapshot{written, mounted, opened} {
			d.destroy(s.ID)
		}
		if err := await(t, "the end of the writer on the mounted image", fileEnd); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EROFS) {
			t.Errorf("the writer on the mounted image got %v", err)
		}
		if out := <-fioEnd; !strings.Contains(out, "error") {
			t.Errorf("fio on the image: %q", out)
		}
		if err := f.read(buf, 0); err == nil {
			t.Error("an image that is gone can be read")
		}
		f.close()
		umount(t, at)
		for _, s := range []control.Snapshot{opened, mounted, written} {
			if _, err := os.Stat(s.Images[0].Link); err == nil {
				t.Errorf("%s is left", s.Images[0].Link)
			}
		}
	}
	round()
	before := d.held()
	round()
	d.settled(before, 6)
	dropCaches(t)
	sameFiles(t, filepath.Join(dir, "set1"), below("set1", sums))
	umount(t, dir)
	ext4FS.clean(t, dev.Link)
	d.remove(dev)
	ext4FS.clean(t, disk)
}

// TestCopyError has the original fail to read what a snapshot needs: that
// breaks the snapshot (I5), and the write that needed it goes on.
func TestCopyError(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	ram := ramDisks(t, 1, size)[0]
	run(t, "modprobe", "dm-flakey")
	disk := dmDisk(t, "readerrors", linear(t, ram))
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.take(64<<10, dev)
	reload(t, "readerrors", fmt.Sprintf("0 %d flakey %s 0 0 100 1 error_reads", size>>9, ram))
	if err := w.fill(dev.Path); err != nil {
		t.Errorf("I5: a write fails with the copy: %v", err)
	}
	kinds, last := d.corrupted(s.ID)
	if len(kinds) != 1 || last.Errno != -int(unix.EIO) {
		t.Errorf("events %q, the last %+v", kinds, last)
	}
	reload(t, "readerrors", linear(t, ram))
	err := scan(s.Images[0].Path, size, func([]byte, int64) error { return nil })
	if !errors.Is(err, unix.EIO) {
		t.Errorf("read of the image: %v", err)
	}
	d.destroy(s.ID)
	d.remove(dev)
	if err := w.same(ram); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestStorageCutOff has somebody cut the storage file off: whoever comes upon
// that first, a read, a store, or a write to the image, breaks the snapshot, and no
// image ever shows zeroes for what was lost. The original goes on.
func TestStorageCutOff(t *testing.T) {
	needVM(t)
	const size, chunk = 8 << 20, 64 << 10
	d := startDaemon(t)
	ram := ramDisks(t, 1, size)[0]
	dev := d.add(ram)
	w := newWorld(size)
	disk := loopDisk(t, ext4FS.minimum, 512)
	ext4FS.make(t, disk)
	dir := mount(t, disk)
	buf := ublkPages(t, chunk)
	for _, c := range []struct {
		name string
		to   int64 // is left of the file, bytes
		meet func(t *testing.T, image *directFile, write func())
	}{
		{"read", 0, func(t *testing.T, image *directFile, _ func()) {
			if err := image.read(buf, 0); !errors.Is(err, unix.EIO) {
				t.Errorf("read of the image: %v", err)
			}
		}},
		{"store", 0, func(_ *testing.T, _ *directFile, write func()) { write() }},
		{"store behind what is left", 2<<20 + 100, func(_ *testing.T, _ *directFile, write func()) { write() }},
		{"image write", 0, func(t *testing.T, image *directFile, _ func()) {
			if err := image.write(buf[:4096], 2<<20); !errors.Is(err, unix.EIO) {
				t.Errorf("write to the image: %v", err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := d.in(t)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "differences")
			s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: chunk, Storage: []control.Storage{{Path: file}}})
			s = d.taken(s.ID)
			f := openDirect(t, dev.Path, unix.O_RDWR)
			defer f.close()
			write := func(from, to int64) {
				t.Helper()
				for pos := from; pos < to; pos += chunk {
					x := w.disks[0].begin(pos/sectorSize, (pos+chunk)/sectorSize, false)
					stamp(buf, x.v, 0, pos/sectorSize)
					if err := f.write(buf, pos); err != nil {
						t.Errorf("I5: write to the original: %v", err)
					}
					x.done()
				}
			}
			write(0, 3<<20)
			waitFor(t, "3 MiB in the storage", func() bool { return d.snapshot(s.ID).Usage.Stored == 3<<20 })
			if err := os.Truncate(file, c.to); err != nil {
				t.Fatal(err)
			}
			image := openDirect(t, s.Images[0].Path, unix.O_RDWR)
			defer image.close()
			c.meet(t, image, func() { write(3<<20, 4<<20) })
			kinds, last := d.corrupted(s.ID)
			if len(kinds) != 1 || last.Errno != -int(unix.EIO) || last.Device != dev.OriginalNumber {
				t.Errorf("events %q, the last %+v", kinds, last)
			}
			write(4<<20, 5<<20)
			for _, at := range []int64{0, 2 << 20, 3 << 20, 5 << 20} {
				if err := image.read(buf, at); !errors.Is(err, unix.EIO) {
					t.Errorf("read of the broken snapshot's image at %d: %v", at, err)
				}
			}
			if now := d.snapshot(s.ID); now.State != control.SnapshotCorrupted || now.Errno != -int(unix.EIO) {
				t.Errorf("snapshot %+v", now)
			}
			image.close()
			d.destroy(s.ID)
			if err := w.same(dev.Path); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
	d.remove(dev)
	umount(t, dir)
}

// TestLargeDevice is I9 for tables: a snapshot of a device of 1 TiB needs little
// memory before anything is written.
func TestLargeDevice(t *testing.T) {
	needVM(t)
	disk := loopDisk(t, 1<<40, 512)
	d := startDaemon(t, "diff_buffer_pool_size=64M", "state_size=1G")
	dev := d.add(disk)
	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, 1<<20)
	stamp(buf, 1, 0, 0)
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := f.write(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	s := d.take(0, dev)
	memory := d.memory()
	t.Logf("%d MiB resident, chunks of %d KiB", memory>>20, s.ChunkSize>>10)
	if memory > 200<<20 {
		t.Errorf("I9: %d bytes of memory", memory)
	}
	image := openDirect(t, s.Images[0].Path, unix.O_RDONLY)
	clear(buf)
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := f.write(buf, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []int64{0, 1<<39 - 4096, 1<<40 - 1<<20} {
		if err := image.read(buf, at); err != nil {
			t.Fatal(err)
		}
		for i := range int64(len(buf) / sectorSize) {
			if v, ok := stampOf(buf[i*sectorSize:][:sectorSize], 0, i); v != 1 || !ok {
				t.Fatalf("I1: image at %d, sector %d: version %d", at, i, v)
			}
		}
	}
	f.close()
	image.close()
	d.destroy(s.ID)
	d.remove(dev)
}
