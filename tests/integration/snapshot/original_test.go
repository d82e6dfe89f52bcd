package snapshot

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"os"
	"os/exec"
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

// TestHungOriginal: while a disk does not answer nothing can be done with its
// filter, but with those of others. What was written gets there in the end.
func TestHungOriginal(t *testing.T) {
	guest.NeedEither(t)
	ram := guest.RAMDisks(t, 2, 16<<20)
	guest.Run(t, "modprobe", "dm-mod")
	disk := guest.DMDisk(t, "hung", guest.LinearTable(t, ram[0]))
	hung := false
	hang := func() {
		guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "hung")
		hung = true
	}
	resume := func() {
		if hung {
			guest.Run(t, "dmsetup", "resume", "hung")
			hung = false
		}
	}
	d := program.Start(t, "disk_timeout=10s", "storage_timeout=3s")
	t.Cleanup(resume)
	others := func() {
		t.Helper()
		other := d.Add(ram[1])
		d.Destroy(d.Take(0, other).ID)
		d.Remove(other)
	}
	remove := func(dev control.Device, force bool, fix string) {
		t.Helper()
		err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: force})
		program.WantError(t, err, control.Timeout, disk+" does not answer", fix)
	}
	for _, force := range []bool{false, true} {
		var ahead control.Device
		if !force {
			ahead = d.Add(ram[1])
		}
		dev := d.Add(disk)
		text := make([]byte, 256<<10)
		rand.New(rand.NewSource(77)).Read(text)
		if force {
			slices.Reverse(text)
		}
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		hang()
		// Through the page cache: it is written when dd closes the device, and dd waits for that.
		dd := exec.Command("dd", "if="+file, "of="+dev.Path, "bs=64k", "conv=notrunc")
		if err := dd.Start(); err != nil {
			t.Fatal(err)
		}
		guest.WaitFor(t, "writes under way", func() bool {
			s, err := d.DeviceStatus(guest.Context(t), dev.Name)
			return err == nil && s.InFlight > 0
		})
		if force {
			remove(dev, true, "remove it again")
		} else {
			// It does not begin, so that the device is still there for whoever comes.
			remove(dev, false, "nothing has changed")
			if s, err := d.DeviceStatus(guest.Context(t), dev.Name); err != nil || s.State != "live" {
				t.Errorf("state %s, %v", s.State, err)
			}
			// Nor does the end of the daemon, with the removal of those that could be removed.
			program.WantError(t, d.Stop(guest.Context(t)), control.Timeout, disk+" does not answer", "nothing has changed")
			if list, err := d.Devices(guest.Context(t)); err != nil || len(list) != 2 {
				t.Errorf("after a stop that was refused: %+v, %v", list, err)
			}
			d.Remove(ahead)
		}
		others()
		resume()
		if err := dd.Wait(); err != nil {
			t.Errorf("dd: %v", err)
		}
		guest.WaitFor(t, "the removal", func() bool {
			return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: force}) == nil
		})
		f := direct.MustOpen(t, disk, unix.O_RDONLY)
		back := direct.Pages(t, len(text))
		if err := f.ReadAt(back, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if !bytes.Equal(back, text) {
			t.Errorf("force %v: what was written is not on the disk", force)
		}
	}
	// Added while it hangs: before Linux 7.0 the kernel looks for partitions first.
	hang()
	dev, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: disk})
	if err != nil {
		program.WantError(t, err, control.Timeout, "does not answer")
	}
	others()
	resume()
	list, err := d.Devices(guest.Context(t))
	if err != nil || len(list) > 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, dev = range list {
		guest.WaitFor(t, "the removal", func() bool {
			return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}) == nil
		})
	}
	d.Remove(d.Add(disk))

	// A snapshot waits for the original too, and does not lay that to its storage.
	dev = d.Add(disk)
	s := d.Take(64<<10, dev)
	hang()
	dd := exec.Command("dd", "if=/dev/urandom", "of="+dev.Path, "bs=64k", "count=1", "conv=fsync,notrunc")
	if err := dd.Start(); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "a write under way", func() bool {
		st, err := d.DeviceStatus(guest.Context(t), dev.Name)
		return err == nil && st.InFlight > 0
	})
	err = d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID})
	program.WantError(t, err, control.Timeout, "destroy snapshot "+s.ID+": "+disk+": does not answer")
	// Who is killed while he waits for his snapshot leaves none.
	create := exec.Command(program.Path(t), "--run-dir", string(d.RunDir), "snapshot", "create", dev.Name, "--storage", "/dev/shm", "--take")
	if err := create.Start(); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the take", func() bool {
		i, err := d.Info(guest.Context(t))
		return err == nil && strings.HasPrefix(i.Activity, "take snapshot")
	})
	_ = create.Process.Kill()
	_ = create.Wait()
	guest.WaitFor(t, "the end of the snapshot", func() bool {
		return !slices.ContainsFunc(program.SnapshotIDs(t, d), func(id string) bool { return id != s.ID })
	})
	resume()
	if err := dd.Wait(); err != nil {
		t.Errorf("dd: %v", err)
	}
	guest.WaitFor(t, "the end of the snapshot", func() bool { return len(program.SnapshotIDs(t, d)) == 0 })
	// One that cannot be taken is not left either, and one that can is taken by the same call.
	if _, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name}, Take: true}); control.CodeOf(err) != control.NoSpace {
		t.Errorf("a take without storage: %v", err)
	}
	if ids := program.SnapshotIDs(t, d); len(ids) > 0 {
		t.Errorf("left of a failed take: %v", ids)
	}
	s = d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}, Take: true})
	if s.State != control.SnapshotTaken || s.Taken == nil || len(s.Images) != 1 || s.Images[0].Path == "" {
		t.Errorf("taken at once: %+v", s)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}

// TestPulledOut takes the original away under load, with a snapshot held: its
// users get errors. The filter stays as long as somebody has it open, and then goes by itself,
// with the snapshot.
func TestPulledOut(t *testing.T) {
	guest.Need(t)
	disk := guest.SCSIDisk(t, 16, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(dev.Size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Take(64<<10, dev)
	stop := w.StartWriters(t, 31, stamp.Mix{Writers: 4}, dev.Path)
	time.Sleep(300 * time.Millisecond)
	user, err := os.Open(dev.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	image, err := os.Open(s.Images[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if err := os.WriteFile("/sys/block/"+filepath.Base(disk)+"/device/delete", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		time.Sleep(500 * time.Millisecond)
		ended <- stop()
	}()
	if err := guest.Await(t, "the end of the writers", ended); err == nil {
		t.Error("nobody noticed")
	}
	guest.WaitFor(t, "what is told of it", func() bool {
		status, err := d.DeviceStatus(guest.Context(t), dev.Name)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(status.Attention, "its disk is gone")
	})
	// What is in use is not removed unasked.
	err = d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
	program.WantError(t, err, control.Busy)
	user.Close()
	wantEvents(t, d, dev, control.EventGone)
	if got := d.Show(s.ID); got.State == control.SnapshotDestroying {
		t.Errorf("a snapshot whose image is in use: %+v", got)
	}
	image.Close()
	wantEvents(t, d, dev, control.EventRemoved)
	if left, err := d.Devices(guest.Context(t)); err != nil || len(left) > 0 || len(guest.UblkDevices()) > 0 {
		t.Errorf("left: %v, %v, %v", left, guest.UblkDevices(), err)
	}
	kinds, _ := d.Corrupted(s.ID)
	if _, err := d.Snapshot(guest.Context(t), s.ID); control.CodeOf(err) != control.NotFound {
		t.Errorf("the snapshot had %v, and is there: %v", kinds, err)
	}

	// Who detaches a loop device has to wait for whoever has it open. The filter lets go of it,
	// and its change map goes on.
	loop := guest.LoopDisk(t, 8<<20, 512)
	file, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	dev = d.Add(loop)
	d.Destroy(d.Take(0, dev).ID)
	before := d.CBT(dev)
	guest.Run(t, "losetup", "-d", loop)
	wantEvents(t, d, dev, control.EventRemoved)
	again := func() {
		guest.WaitFor(t, "the end of the loop device", func() bool {
			_, err := os.Stat("/sys/block/" + filepath.Base(loop) + "/loop")
			return err != nil
		})
		guest.Run(t, "losetup", "-b", "512", loop, strings.TrimSpace(string(file)))
	}
	again()
	dev = d.Add(loop)
	if now := d.CBT(dev); !now.History.Continued || now.GenerationID != before.GenerationID {
		t.Errorf("attached again: %+v, was %+v", now, before)
	}
	d.Remove(dev)

	// One that is to be detached gets no filter, because a daemon's death would detach it.
	if user, err = os.Open(loop); err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	guest.Run(t, "losetup", "-d", loop)
	_, err = d.AddDevice(guest.Context(t), control.AddRequest{Path: loop})
	program.WantError(t, err, control.Invalid, "as soon as nobody has it open", "losetup")
	user.Close()
	again()
	pulledZram(t, d)
}

// pulledZram: the driver zram removes no disk that somebody has open, as a filter has its. Trying
// does no harm, and without the filter the disk goes.
func pulledZram(t *testing.T, d *program.Daemon) {
	guest.Run(t, "modprobe", "zram")
	t.Cleanup(func() { guest.Run(t, "modprobe", "-r", "zram") })
	number, err := os.ReadFile("/sys/class/zram-control/hot_add")
	if err != nil {
		t.Fatal(err)
	}
	name := "zram" + strings.TrimSpace(string(number))
	if err := os.WriteFile("/sys/block/"+name+"/disksize", []byte("8M"), 0); err != nil {
		t.Fatal(err)
	}
	pull := func() error { return os.WriteFile("/sys/class/zram-control/hot_remove", number, 0) }
	dev := d.Add("/dev/" + name)
	s := d.Take(64<<10, dev)
	if err := pull(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("zram removes a disk under its filter: %v", err)
	}
	w := stamp.NewWorld(dev.Size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	if status, err := d.DeviceStatus(guest.Context(t), dev.Name); err != nil || status.State != "live" || status.Attention != "" {
		t.Errorf("after a removal that was refused: %+v, %v", status, err)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
	guest.WaitFor(t, "the end of the disk", func() bool { return pull() == nil }) // udev may have it open too
	if _, err := os.Stat("/sys/block/" + name); err == nil {
		t.Error("the disk is there")
	}
}

// wantEvents waits for an event of a device.
func wantEvents(t *testing.T, d *program.Daemon, dev control.Device, kind string) {
	t.Helper()
	err := d.Watch(guest.Context(t), control.WatchRequest{Since: 1}, func(e control.Event) error {
		if e.Device == dev.OriginalNumber && e.Kind == kind {
			return io.EOF
		}
		return nil
	})
	if !errors.Is(err, io.EOF) {
		t.Fatalf("no event %q: %v", kind, err)
	}
}
