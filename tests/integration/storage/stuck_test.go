package storage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestStuckStorage is I5 with storage that neither works nor fails: writers wait
// for it no longer than configured, and everything about the snapshot but its
// memory goes. That the daemon's log is a pipe that nobody reads changes nothing.
func TestStuckStorage(t *testing.T) {
	guest.NeedEither(t)
	const size = 24 << 20
	ram := guest.RAMDisks(t, 2, size)
	guest.Run(t, "modprobe", "dm-mod")
	store := guest.DMDisk(t, "store", guest.LinearTable(t, ram[1]))
	log, into, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d := program.StartLogging(t, into, "storage_timeout=6s", "diff_buffer_pool_size=1M", "log_level=debug")
	fillPipe(t, into)
	into.Close()
	queues := guest.QueueCounts()
	dev := d.Add(ram[0], program.Queues(queues[len(queues)-1], 32))
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: store}}})
	s = d.Taken(s.ID)
	guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "store")
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			guest.Run(t, "dmsetup", "resume", "store")
		}
	}
	t.Cleanup(resume)
	stop := w.StartWriters(t, 6, stamp.Mix{Writers: 4, Zeroes: true}, dev.Path)
	kinds, last := d.Corrupted(s.ID)
	if !slices.Equal(kinds, []string{control.EventCorrupted}) || last.Errno != -int(unix.ETIMEDOUT) || last.Device != dev.OriginalNumber {
		t.Errorf("events %q, the last %+v", kinds, last)
	}
	w.More(t, 50) // I5
	if err := d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID}); control.CodeOf(err) != control.Timeout || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("destroy: %v", err)
	}
	// Its device's ring has I/O under way: neither goes before that has ended.
	if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); control.CodeOf(err) != control.Timeout {
		t.Errorf("remove: %v", err)
	}
	// A new one works at once, on other storage: this one is still at work.
	other := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: "/dev/shm"}}})
	if _, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: other.ID, Storage: control.Storage{Path: store}}); control.CodeOf(err) != control.Busy {
		t.Errorf("storage under way appended to another snapshot: %v", err)
	}
	win := w.Open()
	other = d.Taken(other.ID)
	win.Close()
	if err := win.Check(other.Images[0].Path); err != nil {
		t.Errorf("I1, next snapshot: %v", err)
	}
	d.Destroy(other.ID)
	if err := stop(); err != nil {
		t.Errorf("I5: a writer noticed: %v", err)
	}
	resume()
	guest.WaitFor(t, "the end of the snapshot", func() bool { return len(program.SnapshotIDs(t, d)) == 0 })
	if left, err := os.ReadDir(filepath.Join(d.RunDir.State(), "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("state left: %v, %v", left, err)
	}
	var info control.Info
	guest.WaitFor(t, "the loss of lines of the log", func() bool {
		info, err = d.Info(guest.Context(t))
		return err != nil || info.LogLinesLost > 0
	})
	if a := d.Call("ublk-blksnap", "status", dev.Name); err != nil || a.Status != 0 || !strings.Contains(a.Out, "log lost:") {
		t.Errorf("%v, %+v", err, a)
	}
	said := make(chan string)
	go func() {
		b, _ := io.ReadAll(log)
		said <- string(b)
	}()
	d.Remove(dev)
	if err := w.Same(ram[0]); err != nil {
		t.Errorf("I2: %v", err)
	}
	d.StopAndWait()
	all := guest.Await(t, "the end of the log", said)
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
	guest.NeedEither(t)
	const size = 8 << 20
	ram := guest.RAMDisks(t, 2, size)
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "dm-delay")
	// Over disks with a cache: the kernel flushes no others.
	small := guest.LoopDisk(t, 512<<10, 512)
	late := guest.DMDisk(t, "late", fmt.Sprintf("0 1024 delay %[1]s 0 0 %[1]s 0 0 %[1]s 0 600000", small)) // flushes, until it is loaded anew
	device := guest.DMDisk(t, "store", guest.LinearTable(t, guest.LoopDisk(t, 2*size, 512)))
	files := guest.DMDisk(t, "files", guest.LinearTable(t, guest.LoopDisk(t, guest.Ext4.Minimum, 512)))
	guest.Ext4.Make(t, files)
	dir := guest.Mount(t, files)
	file := filepath.Join(dir, "differences")
	d := program.Start(t, "storage_timeout=3s")
	dev, other := d.Add(ram[0]), d.Add(ram[1])
	storage := []string{device, file}
	var held []control.Snapshot
	for _, path := range storage {
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: path}}})
		held = append(held, d.Taken(s.ID))
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 1 << 20})
	held = append(held, s)
	_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: late}})
	program.WantError(t, err, control.Internal, late, "less than one chunk", "given back when it does")
	suspended := []string{"store", "files"} // with its filesystem frozen
	for _, name := range suspended {
		guest.Run(t, "dmsetup", "suspend", name)
	}
	resume := func() {
		for _, name := range suspended {
			guest.Run(t, "dmsetup", "resume", name)
		}
		if suspended != nil {
			guest.ReloadDM(t, "late", guest.LinearTable(t, small))
		}
		suspended = nil
	}
	t.Cleanup(resume)

	ended := make(chan error, len(held))
	for _, s := range held {
		go func() { ended <- d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID}) }()
	}
	guest.WaitFor(t, "the destruction to begin", func() bool {
		list, err := d.Snapshots(guest.Context(t))
		return err == nil && len(list) == len(held) && !slices.ContainsFunc(list, func(s control.Snapshot) bool { return s.State != control.SnapshotDestroying })
	})
	others := func() {
		t.Helper()
		d.Destroy(d.Take(0, other).ID)
		d.Remove(d.Add(guest.LoopDisk(t, size, 512)))
	}
	others()
	for range held {
		err := guest.Await(t, "the end of the patience", ended)
		program.WantError(t, err, control.Timeout, "does not answer")
	}
	others()
	for _, path := range []string{device, late} {
		_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{other.Name}, Storage: []control.Storage{{Path: path}}})
		program.WantError(t, err, control.Busy, path)
	}
	for i, s := range held {
		now := d.Show(s.ID)
		if now.State != control.SnapshotDestroying || now.Images[0].Path != "" || i < len(storage) && now.Storage[0].Path != storage[i] {
			t.Errorf("while its storage does not answer: %+v", now)
		}
		_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: "/dev/shm"}})
		program.WantError(t, err, control.Busy, "being destroyed")
		if _, err := os.Stat(filepath.Join(d.RunDir.State(), "snapshots", s.ID, "pool")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its memory is not given back: %v", err)
		}
	}
	d.Remove(dev) // which needs none of it
	resume()
	guest.WaitFor(t, "the end of the snapshots", func() bool { return len(program.SnapshotIDs(t, d)) == 0 })
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
	if left, err := os.ReadDir(filepath.Join(d.RunDir.State(), "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("state left: %v, %v", left, err)
	}
	guest.Unmount(t, dir)
}

// TestKilledStuckStorage: the daemon after one that was killed serves, though a
// storage does not answer. To take the storage over it need not answer. If it does not
// even when the snapshot is destroyed, what is left of it goes when it answers.
func TestKilledStuckStorage(t *testing.T) {
	guest.NeedEither(t)
	guest.Run(t, "modprobe", "dm-mod")
	files := guest.DMDisk(t, "files", guest.LinearTable(t, guest.LoopDisk(t, guest.Ext4.Minimum, 512)))
	guest.Ext4.Make(t, files)
	dir := guest.Mount(t, files)
	file := filepath.Join(dir, "differences")
	d := program.Start(t, "storage_timeout=5s", "disk_timeout=5s")
	dev := d.Add(guest.RAMDisks(t, 1, 8<<20)[0])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: file}}})
	d.Taken(s.ID)
	d.Kill()
	state := filepath.Join(d.RunDir.State(), "snapshots")
	guest.Run(t, "dmsetup", "suspend", "files") // with its filesystem frozen
	suspended := true
	resume := func() {
		if suspended {
			suspended = false
			guest.Run(t, "dmsetup", "resume", "files")
		}
	}
	t.Cleanup(resume)
	write := func() {
		t.Helper()
		f, err := os.OpenFile(dev.Path, os.O_RDWR|unix.O_DSYNC, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 4096), 0)
			f.Close()
		}
		if err != nil {
			t.Errorf("write: %v", err)
		}
	}
	d.Launch()
	write() // waits for the daemon, and not for the storage
	guest.WaitFor(t, "the next daemon", func() bool { _, err := d.Info(guest.Context(t)); return err == nil })
	if got := d.Show(s.ID); got.State != control.SnapshotTaken {
		t.Errorf("the snapshot is %+v", got)
	}
	err := d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID})
	program.WantError(t, err, control.Timeout, "does not answer")
	write()
	if _, err := os.Stat(filepath.Join(state, s.ID, "record.json")); err != nil {
		t.Errorf("while the storage does not answer it is on no record: %v", err)
	}
	resume()
	guest.WaitFor(t, "the end of the storage", func() bool {
		left, err := os.ReadDir(state)
		_, gone := os.Stat(file)
		return err == nil && len(left) == 0 && errors.Is(gone, os.ErrNotExist)
	})
	d.Remove(dev)
	guest.Unmount(t, dir)
}

// TestKilledWhileStoring: the daemon is killed while stores are under way to a device that
// does not answer. Neither its disk nor another waits for that.
func TestKilledWhileStoring(t *testing.T) {
	guest.NeedEither(t)
	const size = 24 << 20
	ram := guest.RAMDisks(t, 3, size)
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "dm-delay")
	// Writes take ten minutes, until another table is loaded.
	store := guest.DMDisk(t, "store", fmt.Sprintf("0 %[2]d delay %[1]s 0 0 %[1]s 0 600000", ram[1], size>>9))
	d := program.Start(t, "storage_timeout=6s", "diff_buffer_pool_size=1M")
	dev, free := d.Add(ram[0]), d.Add(ram[2])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: store}}})
	s = d.Taken(s.ID)
	resume := sync.OnceFunc(func() { guest.ReloadDM(t, "store", guest.LinearTable(t, ram[1])) })
	t.Cleanup(resume)
	write := func(path string, chunks int64) <-chan error {
		done := make(chan error, 1)
		f := direct.MustOpen(t, path, unix.O_RDWR)
		go func() {
			var err error
			buf := direct.Buffers.Get().(*[]byte)
			defer direct.Buffers.Put(buf)
			for n := int64(0); n < chunks && err == nil; n++ {
				err = f.WriteAt((*buf)[:4<<10], n*s.ChunkSize)
			}
			f.Close()
			done <- err
		}()
		return done
	}
	// As many copies as fit the pool, because their stores do not end.
	if err := guest.Await(t, "the first writes", write(dev.Path, 8)); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "stores under way", func() bool {
		u := d.Show(s.ID).Usage
		return u.Copied > u.Stored
	})
	d.Kill()
	d.Launch()
	for what, done := range map[string]<-chan error{"the disk": write(dev.Path, 16), "another disk": write(free.Path, 1)} {
		if err := guest.Await(t, "writes to "+what, done); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	var i control.Info
	var err error
	guest.WaitFor(t, "the next daemon", func() bool {
		i, err = d.Info(guest.Context(t))
		return err == nil
	})
	if err != nil || i.Lost == nil || len(i.Lost.Devices) != 0 || len(i.Lost.Snapshots) != 1 || i.Lost.Snapshots[0].ID != s.ID {
		t.Errorf("the daemon says %+v, %v", i.Lost, err)
	}
	resume()
	guest.WaitFor(t, "the end of the storage", func() bool {
		left, err := os.ReadDir(filepath.Join(d.RunDir.State(), "snapshots"))
		return err == nil && len(left) == 0
	})
	d.Remove(dev)
	d.Remove(free)
}

// TestStorageGone: a block device of the storage goes while no daemon lives. The
// snapshot ends with its events, the filter goes on.
func TestStorageGone(t *testing.T) {
	guest.NeedEither(t)
	guest.Run(t, "modprobe", "dm-mod")
	loop := guest.LoopDisk(t, 32<<20, 512)
	store := guest.DMDisk(t, "gone", guest.LinearTable(t, loop))
	d := program.Start(t, "storage_timeout=5s")
	dev := d.Add(guest.RAMDisks(t, 1, 8<<20)[0])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: store}}})
	s = d.Taken(s.ID)
	image, err := os.Open(s.Images[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var kinds []string
	begun, watched := make(chan error, 4), make(chan error, 1)
	watch := func() error {
		return d.Watch(guest.Context(t), control.WatchRequest{ID: s.ID}, func(e control.Event) error {
			kinds = append(kinds, e.Kind)
			if e.Kind == control.EventTaken {
				begun <- nil
			}
			return nil
		})
	}
	go func() { watched <- watch() }() // through the daemon's death
	if err := guest.Await(t, "the snapshot's first events", begun); err != nil {
		t.Fatal(err)
	}
	d.Kill()
	guest.WaitFor(t, "the dead process to let go of the storage", func() bool {
		_, err := guest.Try("dmsetup", "remove", "gone")
		return err == nil
	})
	d.Restart()
	i, err := d.Info(guest.Context(t))
	if err != nil || i.Lost == nil || len(i.Lost.Devices) != 0 || len(i.Lost.Snapshots) != 1 || i.Lost.Snapshots[0].Storage[0] != store {
		t.Fatalf("the daemon says %+v, %v", i.Lost, err)
	}
	const told = "created taken corrupted destroyed"
	if err := guest.Await(t, "the end of the watching", watched); err != nil || strings.Join(kinds, " ") != told {
		t.Errorf("who watched was told %v, %v", kinds, err)
	}
	kinds = nil
	if err := watch(); err != nil || strings.Join(kinds, " ") != told {
		t.Errorf("who asks for the snapshot is told %v, %v", kinds, err)
	}
	kinds = nil
	err = d.Watch(guest.Context(t), control.WatchRequest{}, func(e control.Event) error {
		if e.Kind == control.EventCorrupted && !strings.Contains(e.Text, store) {
			t.Errorf("the snapshot's end does not say why: %+v", e)
		}
		if kinds = append(kinds, e.Kind); e.Kind == control.EventDestroyed {
			return io.EOF
		}
		return nil
	})
	if !errors.Is(err, io.EOF) || strings.Join(kinds, " ") != "corrupted destroyed" {
		t.Errorf("who watches everything is told %v, %v", kinds, err)
	}
	if e, err := d.WaitEvent(guest.Context(t), control.WaitRequest{ID: s.ID}); err != nil || e.Kind != control.EventCorrupted {
		t.Errorf("who waits is told %+v, %v", e, err)
	}
	if ids := program.SnapshotIDs(t, d); len(ids) != 0 {
		t.Errorf("snapshots %v", ids)
	}
	if _, err := image.ReadAt(make([]byte, 4096), 0); err == nil {
		t.Error("the image of a snapshot that has ended can be read")
	}
	image.Close()
	if st, err := d.DeviceStatus(guest.Context(t), dev.Name); err != nil || st.State != "live" {
		t.Errorf("%+v, %v", st, err)
	}
	d.Destroy(d.Take(0, dev).ID)
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil {
		t.Errorf("another was taken, and told is %+v, %v", i.Lost, err)
	}
	d.Remove(dev)
	guest.Run(t, "dmsetup", "create", "gone", "--table", guest.LinearTable(t, loop)) // for the end of the test
}

// TestStuckFile has storage files on a filesystem that stands still: opening or
// allocating one ends in time, and nobody gets a file that another snapshot
// still waits for.
func TestStuckFile(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	disk := guest.LoopDisk(t, guest.Ext4.Minimum, 512)
	guest.Ext4.Make(t, disk)
	dir := guest.Mount(t, disk)
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := program.Start(t, "storage_timeout=3s")
	dev := d.Add(guest.RAMDisks(t, 1, size)[0])
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10})
	guest.Run(t, "fsfreeze", "--freeze", dir)
	frozen := true
	thaw := func() {
		if frozen {
			frozen = false
			guest.Run(t, "fsfreeze", "--unfreeze", dir)
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
		_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: c.path}})
		if control.CodeOf(err) != c.want {
			t.Errorf("append %s: %v, want %v", c.path, err, c.want)
		}
	}
	if _, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: there}}}); control.CodeOf(err) != control.Busy {
		t.Errorf("create on storage of another: %v", err)
	}
	thaw()
	guest.WaitFor(t, "the end of one file", func() bool {
		_, err := os.Stat(filepath.Join(dir, "new"))
		return errors.Is(err, os.ErrNotExist)
	})
	guest.WaitFor(t, "the use of the other", func() bool {
		_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: there}})
		if err != nil && control.CodeOf(err) != control.Busy {
			t.Fatal(err)
		}
		return err == nil
	})
	win := w.Open()
	s = d.Taken(s.ID)
	win.Close()
	stop := w.StartWriters(t, 9, stamp.Mix{Writers: 2}, dev.Path)
	time.Sleep(guest.Span(500*time.Millisecond, 5*time.Second))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	d.Destroy(s.ID)
	if st, err := os.Stat(there); err != nil || st.Size() != 0 {
		t.Errorf("the file that was there: %+v, %v", st, err)
	}
	d.Remove(dev)
}
