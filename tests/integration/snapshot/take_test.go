package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
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

// TestTakeHalfDone: a take that fails on the last device leaves nothing of itself
// on any. The kernel module left the snapshot half taken.
func TestTakeHalfDone(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 3, 64<<20)
	d := program.Start(t)
	var devs []control.Device
	var dirs []string
	for _, disk := range disks {
		dev := d.Add(disk)
		devs = append(devs, dev)
		guest.Ext4.Make(t, dev.Link)
		dirs = append(dirs, guest.Mount(t, dev.Link))
	}
	var info []control.CBTInfo
	for _, dev := range devs {
		d.Destroy(d.Take(0, dev).ID)
		info = append(info, d.CBT(dev))
	}
	s := d.Create(control.CreateRequest{Devices: program.Names(devs), Storage: []control.Storage{{Path: "/dev/shm"}}})
	before := d.Held()
	// Somebody else has frozen the last one: a filesystem cannot be frozen twice.
	guest.Run(t, "fsfreeze", "-f", dirs[2])
	frozen := true
	t.Cleanup(func() {
		if frozen {
			_, _ = guest.Try("fsfreeze", "-u", dirs[2])
		}
	})
	for range 2 {
		_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: s.ID})
		program.WantError(t, err, control.Busy, "freeze "+dirs[2])
	}
	got := d.Show(s.ID)
	if got.State != control.SnapshotCreated || got.Taken != nil {
		t.Errorf("after the failed take: %+v", got)
	}
	for _, im := range got.Images {
		if im.Path != "" || im.Link != "" {
			t.Errorf("image %+v", im)
		}
	}
	for i, dev := range devs {
		if now := d.CBT(dev); now != info[i] {
			t.Errorf("change map of %s: %+v, before %+v", dev.Name, now, info[i])
		}
	}
	d.Settled(before, 3)
	// The others are not left frozen, and nothing is copied.
	for i, dir := range dirs[:2] {
		if err := os.WriteFile(filepath.Join(dir, "after"), make([]byte, 1<<20), 0o600); err != nil {
			t.Error(err)
		}
		guest.Run(t, "sync", "-f", dirs[i])
	}
	if n := d.Show(s.ID).Usage.Copied; n != 0 {
		t.Errorf("%d bytes copied for a snapshot that was not taken", n)
	}
	guest.Run(t, "fsfreeze", "-u", dirs[2])
	frozen = false
	// The same snapshot can be taken now.
	s = d.Taken(s.ID)
	for i, im := range s.Images {
		if im.Take.Number != info[i].Take.Number+1 {
			t.Errorf("image %+v, before the take %+v", im, info[i])
		}
		at := guest.Mount(t, im.Path)
		if _, err := os.Stat(filepath.Join(at, "after")); (err == nil) != (i < 2) {
			t.Errorf("image %d: %v", i, err)
		}
		guest.Unmount(t, at)
	}
	d.Destroy(s.ID)
	for i, dev := range devs {
		guest.Unmount(t, dirs[i])
		d.Remove(dev)
	}
}

// TestTakeWithoutMemory: a take for which there is no memory fails as a whole too.
func TestTakeWithoutMemory(t *testing.T) {
	guest.NeedEither(t)
	small, large := guest.LoopDisk(t, 16<<20, 512), guest.LoopDisk(t, 256<<30, 512)
	d := program.Start(t, "state_size=24M")
	devs := []control.Device{d.Add(small), d.Add(large)}
	before := []control.CBTInfo{d.CBT(devs[0]), d.CBT(devs[1])}
	// 64 Mi chunks of 8 bytes each.
	s := d.Create(control.CreateRequest{Devices: program.Names(devs), ChunkSize: 4 << 10, Storage: []control.Storage{{Path: "/dev/shm"}}})
	_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: s.ID})
	if err == nil || !strings.Contains(err.Error(), "state_size") {
		t.Errorf("take without memory: %v", err)
	}
	for i, dev := range devs {
		if now := d.CBT(dev); now != before[i] {
			t.Errorf("change map of %s: %+v, before %+v", dev.Name, now, before[i])
		}
	}
	if got := d.Show(s.ID); got.State != control.SnapshotCreated {
		t.Errorf("after the failed take: %+v", got)
	}
	d.Destroy(s.ID)
	// With larger chunks there is enough.
	d.Destroy(d.Take(1<<20, devs...).ID)
	for _, dev := range devs {
		d.Remove(dev)
	}
}

// TestFreezeFails: a take fails if a filesystem does not freeze, unless it is told
// to do without. The kernel module only logged it.
func TestFreezeFails(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	guest.Run(t, "fsfreeze", "-f", dir)
	t.Cleanup(func() { _, _ = guest.Try("fsfreeze", "-u", dir) })
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
	a := d.Call("ublk-blksnap", "snapshot", "take", s.ID)
	if a.Status != 5 || !strings.Contains(a.Err, "freeze "+dir) {
		t.Errorf("take: %+v", a)
	}
	if got := d.Show(s.ID); got.State != control.SnapshotCreated {
		t.Errorf("after the failed take: %+v", got)
	}
	// Told to go on without freezing, it does.
	a = d.Call("ublk-blksnap", "snapshot", "take", s.ID, "--no-freeze")
	if a.Status != 0 {
		t.Errorf("take without freezing: %+v", a)
	}
	if got := d.Show(s.ID); got.State != control.SnapshotTaken || got.Frozen != 0 {
		t.Errorf("after the take: %+v", got)
	}
	d.Destroy(s.ID)
	guest.Run(t, "fsfreeze", "-u", dir)
	guest.Unmount(t, dir)
	d.Remove(dev)
}

// TestKilledWhileFreezing: the daemon is killed while a filesystem that it freezes writes
// what it has to the filter. That waits for the next daemon, which must not wait for it.
func TestKilledWhileFreezing(t *testing.T) {
	guest.Need(t)
	ram := guest.RAMDisks(t, 1, 64<<20)[0]
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "dm-delay")
	// Each write takes 0.4 s.
	disk := guest.DMDisk(t, "slow", fmt.Sprintf("0 %[2]d delay %[1]s 0 0 %[1]s 0 400", ram, 64<<20>>9))
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	for i := range 3 {
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
		if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 4<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if i == 2 { // it does not answer at all, and the take is given up before the death
			guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "slow")
		}
		taken := make(chan error, 1)
		go func() {
			_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: s.ID})
			taken <- err
		}()
		guest.WaitFor(t, "the take to freeze", func() bool {
			_, begun := os.Stat(filepath.Join(d.RunDir.State(), "frozen"))
			st, err := d.DeviceStatus(guest.Context(t), dev.Name)
			return err == nil && begun == nil && st.InFlight > 0
		})
		if i == 2 {
			program.WantError(t, guest.Await(t, "the end of the take", taken), control.Timeout, "did not freeze in time")
			taken <- nil
		}
		if i > 0 { // all of ours at once
			for _, name := range []string{"ublk-probe", "ublk-freeze"} {
				for _, pid := range program.Processes(name) {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
		d.Kill()
		if i == 2 {
			guest.Run(t, "dmsetup", "resume", "slow")
		}
		d.Restart()
		<-taken
		written := make(chan error, 1)
		go func() { written <- os.WriteFile(filepath.Join(dir, "after"), []byte("x"), 0o600) }()
		if err := guest.Await(t, "a write to the filesystem, which goes on", written); err != nil {
			t.Error(err)
		}
		d.Destroy(s.ID)
	}
	d.Destroy(d.Take(0, dev).ID)
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, dev.Path)
	d.Remove(dev)
}

// TestThreeDevices is I7: a snapshot of three devices under load shows them at
// one instant. Besides the random writers, one writes the number of its step to
// the last sector of each in turn.
func TestThreeDevices(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	disks := guest.RAMDisks(t, 3, size+4096)
	d := program.Start(t)
	var devs []control.Device
	var paths []string
	for i, disk := range disks {
		queues := guest.QueueCounts()
		dev := d.Add(disk, program.Queues(queues[i%len(queues)], 32))
		devs, paths = append(devs, dev), append(paths, dev.Path)
	}
	w := stamp.NewWorld(size, size, size)
	if err := w.Fill(paths...); err != nil {
		t.Fatal(err)
	}
	stop := w.StartWriters(t, 7, stamp.Mix{Writers: 2, Largest: 256 << 10, Pause: rest / 4}, paths...)

	end := make(chan struct{})
	var steps stamp.Version
	stepped := make(chan error, 1)
	go func() {
		var fs []*direct.File
		buf := direct.Buffers.Get().(*[]byte)
		defer direct.Buffers.Put(buf)
		for _, p := range paths {
			f, err := direct.Open(p, unix.O_WRONLY)
			if err != nil {
				stepped <- err
				return
			}
			defer f.Close()
			fs = append(fs, f)
		}
		for {
			select {
			case <-end:
				stepped <- nil
				return
			default:
			}
			steps++
			for i, f := range fs {
				p := (*buf)[:stamp.SectorSize]
				stamp.Fill(p, steps, i, size/stamp.SectorSize)
				if err := f.WriteAt(p, size); err != nil {
					stepped <- err
					return
				}
			}
		}
	}()
	for range int(guest.Span(4, 50)) {
		time.Sleep(100 * time.Millisecond)
		win := w.Open()
		s := d.Take(64<<10, devs...)
		win.Close()
		var images []string
		var at [3]stamp.Version
		for i, im := range s.Images {
			if im.Device != devs[i].Name {
				t.Fatalf("image %d is of %s, want %s", i, im.Device, devs[i].Name)
			}
			images = append(images, im.Path)
			f := direct.MustOpen(t, im.Path, unix.O_RDONLY)
			buf := direct.Buffers.Get().(*[]byte)
			if err := f.ReadAt((*buf)[:stamp.SectorSize], size); err != nil {
				t.Fatal(err)
			}
			v, ok := stamp.Of(*buf, i, size/stamp.SectorSize)
			if !ok {
				t.Errorf("counter of device %d is torn", i)
			}
			at[i] = v
			direct.Buffers.Put(buf)
			f.Close()
		}
		if at[0] < at[1] || at[1] < at[2] || at[2]+1 < at[0] || at[0] == 0 {
			t.Errorf("I7: the counters are %v", at)
		}
		if err := win.Check(images...); err != nil {
			t.Errorf("I7: %v", err)
		}
		d.Destroy(s.ID)
	}
	close(end)
	if err := <-stepped; err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, dev := range devs {
		d.Remove(dev)
	}
	if err := w.Same(disks...); err != nil {
		t.Errorf("I2: %v", err)
	}
	t.Logf("%d steps", steps)
}

// TestNoFreeze takes without freezing: the image is as after a power failure,
// and its journal brings it back.
func TestNoFreeze(t *testing.T) {
	for _, k := range []guest.Filesystem{guest.Ext4, guest.XFS} {
		t.Run(k.Name, func(t *testing.T) {
			guest.NeedEither(t)
			disk := guest.RAMDisks(t, 1, max(k.Minimum, 128<<20))[0]
			d := program.Start(t)
			dev := d.Add(disk)
			k.Make(t, dev.Link)
			dir := guest.Mount(t, dev.Link)
			old := guest.SomeFiles(t, dir, 1)
			unix.Sync() // what is synced has to be there
			stop := guest.BusyFiles(t, dir)
			time.Sleep(500 * time.Millisecond)
			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
			s, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: s.ID, NoFreeze: true})
			if err != nil {
				t.Fatal(err)
			}
			if s.Frozen != 0 {
				t.Errorf("frozen for %v", s.Frozen)
			}
			image := s.Images[0].Path
			if k.Name == "ext4" {
				if out, err := guest.Try("dumpe2fs", "-h", image); err != nil || !strings.Contains(out, "needs_recovery") {
					t.Errorf("the image does not look as after a power failure: %v\n%s", err, out)
				}
				// Status 1: errors were corrected.
				out, err := guest.Try("e2fsck", "-f", "-y", image)
				if n := guest.ExitStatus(t, err); n > 1 || !strings.Contains(out, "recovering journal") {
					t.Errorf("e2fsck: status %d\n%s", n, out)
				}
			}
			at := guest.Mount(t, image, k.Beside...)
			guest.SameFiles(t, filepath.Join(at, "set1"), guest.Below("set1", old))
			guest.Unmount(t, at)
			k.Check(t, image)
			stop()
			d.Destroy(s.ID)
			guest.Unmount(t, dir)
			k.Check(t, dev.Link)
			d.Remove(dev)
		})
	}
}
