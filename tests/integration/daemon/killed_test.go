package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestKilled: a SIGKILL of the daemon is a pause for those who use its devices. The
// next daemon goes on with what the dead one had.
func TestKilled(t *testing.T) {
	guest.Need(t)
	disks := guest.RAMDisks(t, 3, 64<<20)
	d := program.Start(t, "freeze_timeout=1h") // a start that waits for the thawing would hang
	dev, other := d.Add(disks[0]), d.Add(disks[1], program.Queues(min(2, runtime.NumCPU()), 16))
	third := d.Add(disks[2])
	guest.Ext4.Make(t, third.Link)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	stop := make(chan struct{})
	writer := func(path string) chan error {
		end := make(chan error, 1)
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_SYNC|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer f.Close()
			block := make([]byte, 4096)
			for n := uint64(1); ; n++ {
				select {
				case <-stop:
					end <- nil
					return
				default:
				}
				back := make([]byte, len(block))
				binary.LittleEndian.PutUint64(block, n)
				_, err := f.WriteAt(block, int64(n%1024)*4096)
				if err == nil {
					_, err = f.ReadAt(back, int64(n%1024)*4096)
				}
				if err == nil && !bytes.Equal(back, block) {
					err = fmt.Errorf("write %d reads as %d", n, binary.LittleEndian.Uint64(back))
				}
				if err != nil {
					end <- err
					return
				}
			}
		}()
		return end
	}
	writers := []chan error{writer(filepath.Join(dir, "file")), writer(other.Path)}
	time.Sleep(300 * time.Millisecond)
	onFilter := guest.Mount(t, third.Link)
	guest.Run(t, "fsfreeze", "-f", onFilter)
	before := d.CBT(other)
	status, err := d.DeviceStatus(guest.Context(t), other.Name)
	if err != nil {
		t.Fatal(err)
	}
	dead := d.PID
	d.Kill()

	// Who looks is told, and no daemon is started.
	for _, args := range [][]string{{"list"}, {"status", dev.Name}, {"remove", dev.Name}, {"snapshot", "list"}, {"cbt", "info", dev.Name}} {
		a := d.Call("ublk-blksnap", args...)
		for _, w := range []string{"no daemon runs", fmt.Sprintf("process %d", dead), "start it with", "for the next one wait",
			"filter " + dev.Name + " over " + disks[0] + " (" + dev.Path + ")", "filter " + other.Name + " over " + disks[1]} {
			if a.Status != 4 || a.Out != "" || !strings.Contains(a.Err, w) {
				t.Errorf("%v without a daemon: %+v; want %q", args, a, w)
			}
		}
	}

	// As if it had died in a take: filesystems stand still, one of them on a filter, and
	// are on record.
	still := guest.LoopDisk(t, 64<<20, 512)
	guest.Ext4.Make(t, still)
	frozen := guest.Mount(t, still)
	guest.Run(t, "fsfreeze", "-f", frozen)
	if err := statefile.Write(filepath.Join(d.RunDir.State(), "frozen"), "frozen", 1, []string{frozen, onFilter}); err != nil {
		t.Fatal(err)
	}

	for i := range 3 {
		d.Restart()
		info, err := d.Info(guest.Context(t))
		if err != nil || info.Recovered == nil || info.Recovered.Devices != 3 || info.Recovered.Count != i+1 || info.Lost != nil {
			t.Fatalf("the daemon says of itself %+v, %v", info, err)
		}
		t.Logf("taken over, I/O waited for %v", info.Recovered.Pause)
		if i < 2 {
			time.Sleep(200 * time.Millisecond)
			d.Kill()
		}
	}
	for _, dir := range []string{frozen, onFilter} {
		if _, err := guest.Try("fsfreeze", "-u", dir); err == nil {
			t.Error("a filesystem that the dead daemon froze still stands still")
		}
	}
	now, err := d.Devices(guest.Context(t))
	if err != nil || len(now) != 3 {
		t.Fatalf("devices %+v, %v", now, err)
	}
	for i, want := range []control.Device{dev, other} {
		if got := now[i]; !got.Added.Equal(want.Added) || got.Path != want.Path || got.Link != want.Link || got.Number != want.Number || got.Queues != want.Queues || got.Depth != want.Depth || got.Mode != want.Mode || got.Size != want.Size {
			t.Errorf("taken over as %+v, was %+v", got, want)
		}
	}
	if after := d.CBT(other); after.GenerationID != before.GenerationID || after.Take != before.Take {
		t.Errorf("the change map was at %+v, is at %+v", before, after)
	}
	if s, err := d.DeviceStatus(guest.Context(t), other.Name); err != nil || s.Operations[control.OpWrite].Requests < status.Operations[control.OpWrite].Requests || s.State != "live" {
		t.Errorf("status was %+v, is %+v, %v", status, s, err)
	}
	time.Sleep(200 * time.Millisecond)
	close(stop)
	for i, w := range writers {
		if err := guest.Await(t, "the end of a writer", w); err != nil {
			t.Errorf("writer %d: %v", i, err)
		}
	}
	guest.Unmount(t, dir)
	guest.Unmount(t, onFilter)
	d.Remove(dev)
	d.Remove(other)
	d.Remove(third)
	for _, kind := range []string{"cbt", "counters", "devices", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(d.RunDir.State(), kind)); err != nil || len(left) > 0 {
			t.Errorf("state of devices that are gone: %v, %v", left, err)
		}
	}
	guest.Run(t, "e2fsck", "-fn", disks[0])
}

// TestDiskInUse: a filter whose disk cannot be had, because somebody took it while no
// daemon lived, waits, and goes on when he lets go of it. All of it counts as changed
// then. Or it is removed by force, and the I/O fails.
func TestDiskInUse(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	d := program.Start(t)
	dev, other := d.Add(disks[0]), d.Add(disks[1])
	before := d.CBT(dev)
	d.Kill()
	claim := func(disk string) (f *os.File) {
		guest.WaitFor(t, "the dead process to let go of "+disk, func() (ok bool) {
			var err error
			f, err = os.OpenFile(disk, os.O_RDWR|unix.O_EXCL, 0)
			return err == nil
		})
		return f
	}
	thief, second := claim(disks[0]), claim(disks[1])
	defer thief.Close()
	defer second.Close()
	written := make(chan error, 2)
	for _, path := range []string{dev.Path, other.Path} {
		go func() {
			f, err := os.OpenFile(path, os.O_RDWR|unix.O_DSYNC, 0)
			if err == nil {
				_, err = f.WriteAt(make([]byte, 4096), 32<<20)
				f.Close()
			}
			written <- err
		}()
	}
	d.Restart()
	d.Refused([]string{"waits to be taken over", "remove --force " + dev.Name}, "remove", dev.Path)
	d.Refused([]string{"waits to be taken over", "opened exclusively by"}, "remove", dev.Name)
	d.Refused([]string{"waits to be taken over"}, "add", disks[0])
	d.Refused([]string{"waits to be taken over"}, "status", dev.Name)
	d.Refused([]string{"waits to be taken over"}, "daemon", "stop")
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.Contains(a.Err, "the filter "+dev.Name+" over "+disks[0]) || !strings.Contains(a.Err, "whose I/O waits") {
		t.Errorf("list while I/O waits: %+v", a)
	}
	select {
	case err := <-written:
		t.Fatalf("a write did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}

	thief.Close()
	if err := guest.Await(t, "the write", written); err != nil {
		t.Error(err)
	}
	guest.WaitFor(t, "the filter", func() bool { _, err := d.DeviceStatus(guest.Context(t), dev.Name); return err == nil })
	if after := d.CBT(dev); after.GenerationID == before.GenerationID {
		t.Errorf("the change map of a disk that somebody else had goes on: %+v", after)
	}

	if a := d.Call("ublk-blksnap", "remove", "--force", other.Name); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	if err := guest.Await(t, "the end of the write", written); err == nil {
		t.Error("a write succeeded without a filter")
	}
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil {
		t.Errorf("nothing waits any more, but %+v, %v", i.Lost, err)
	}
	second.Close()
	d.Remove(d.Add(disks[1]))
	d.Remove(dev)
}

// TestDamagedRecord: a record that cannot be trusted is left alone and told, with the
// way out, and so is the device of it.
func TestDamagedRecord(t *testing.T) {
	guest.NeedEither(t)
	var disks []string
	for range 3 {
		disks = append(disks, guest.LoopDisk(t, 4<<20, 512))
	}
	d := program.Start(t)
	dev, other := d.Add(disks[0]), d.Add(disks[1])
	d.Kill()
	record := filepath.Join(d.RunDir.State(), "devices", dev.Name+".json")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(text)
	damaged[len(damaged)/2] ^= 1
	if err := os.WriteFile(record, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	// Of this one there is no device, so there is nothing to be mended.
	gone := filepath.Join(d.RunDir.State(), "devices", "gone.json")
	if err := os.WriteFile(gone, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	running := func(want int) {
		t.Helper()
		if left, err := filepath.Glob(filepath.Join(d.StateDir, "*.running")); err != nil || len(left) != want {
			t.Errorf("there are %v, %v", left, err)
		}
	}
	running(2)
	if err := os.WriteFile(filepath.Join(d.RunDir.State(), "cbt", other.Name), []byte("no map"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.Contains(a.Out, other.Name) || !strings.Contains(a.Err, record) {
		t.Errorf("%+v", a)
	}
	// Its disk gets no other filter meanwhile, nor has it lost the notes that say which it is.
	for range 2 {
		guest.WaitFor(t, "the end of "+gone, func() bool { _, err := os.Stat(gone); return err != nil })
		// Somebody may write to its disk now, and the machine's power may fail.
		guest.WaitFor(t, "an answer", func() bool { i, err := d.Info(guest.Context(t)); return err == nil && i.Activity == "" })
		running(1)
		if i, err := d.Info(guest.Context(t)); err != nil || i.Lost == nil || len(i.Lost.Devices) != 1 || i.Lost.Devices[0].Original != disks[0] || i.Lost.Devices[0].Path != dev.Path {
			t.Errorf("%+v, %v", i.Lost, err)
		}
		d.Refused([]string{"add " + disks[0], "has the filter " + dev.Name + " already", dev.Path, record, "remove --force " + dev.Path}, "add", disks[0], "--name", "another")
		d.Remove(d.Add(disks[2]))
		d.Kill()
		d.Restart()
	}
	if i := d.CBT(other); i.Take.Number != 0 {
		t.Errorf("the map of a damaged file is at %+v", i)
	}
	// Mended, it is taken over.
	d.Kill()
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil || i.Recovered == nil || i.Recovered.Devices != 2 {
		t.Errorf("%+v, %v", i, err)
	}
	running(2)
	// Removed by force, nothing is left of it.
	d.Kill()
	if err := os.WriteFile(record, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if a := d.Call("ublk-blksnap", "remove", "--force", dev.Path); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil {
		t.Errorf("%+v, %v", i.Lost, err)
	}
	running(1)
	dev = d.Add(disks[0], named("another"))
	d.Kill()
	d.Restart()
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil {
		t.Errorf("%+v, %v", i.Lost, err)
	}
	d.Remove(dev)
	d.Remove(other)
}

func named(name string) func(*control.AddRequest) {
	return func(r *control.AddRequest) { r.Name = name }
}

// ownName is what the kernel calls this process.
func ownName(t *testing.T) string {
	t.Helper()
	name, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(name))
}

// TestRemovedByForce: the users of a filter get errors, those of its images too,
// and the snapshot breaks aloud. The one who used force reads who they are.
func TestRemovedByForce(t *testing.T) {
	guest.Need(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	s := d.Take(0, dev)
	image, err := os.OpenFile(s.Images[0].Path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var kinds []string
	watched := make(chan error, 1)
	go func() {
		watched <- d.Watch(context.Background(), control.WatchRequest{ID: s.ID}, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil })
	}()
	what := "ublk-blksnap: remove " + dev.Name + ": "
	want := fmt.Sprintf("%sI/O fails from now on: the image of %s: opened by %s (process %d)\n%ssnapshot %s is destroyed\n", what, dev.Name, ownName(t), os.Getpid(), what, s.ID)
	if a := d.Call("ublk-blksnap", "remove", "--force", dev.Name); a.Status != 0 || a.Out != "" || a.Err != want {
		t.Fatalf("%+v, want %q", a, want)
	}
	if err := <-watched; err != nil && control.CodeOf(err) != control.NotFound {
		t.Error(err)
	} else if got := strings.Join(kinds, " "); err == nil && got != "created taken corrupted destroyed" {
		t.Errorf("events: %s", got)
	}
	if _, err := image.Read(alignedBuf(4096)); err == nil {
		t.Error("the image of a removed device can be read")
	}
	if ss, err := d.Snapshots(guest.Context(t)); err != nil || len(ss) != 0 {
		t.Errorf("snapshots left: %v, %v", ss, err)
	}
	image.Close()
	d.Remove(d.Add(disk))
}

func alignedBuf(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return b
}
