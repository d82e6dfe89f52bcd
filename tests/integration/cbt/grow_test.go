package cbt

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// resize gives a loop device another size.
func resize(t *testing.T, loop string, size int64) {
	t.Helper()
	file, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	if err == nil {
		err = os.Truncate(strings.TrimSpace(string(file)), size)
	}
	if err != nil {
		t.Fatal(err)
	}
	guest.Run(t, "losetup", "-c", loop)
}

// shown is what the daemon tells of a device.
func shown(t *testing.T, d *program.Daemon, name string) control.Device {
	t.Helper()
	s, err := d.DeviceStatus(guest.Context(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return s.Device
}

// events are the kinds of the events of a device, and the last text of each.
func events(t *testing.T, d *program.Daemon, dev control.Device, until string) map[string]string {
	t.Helper()
	texts := map[string]string{}
	ctx := guest.Context(t)
	err := d.Watch(ctx, control.WatchRequest{Since: 1}, func(e control.Event) error {
		if e.Device == dev.OriginalNumber {
			texts[e.Kind] = e.Text
		}
		if e.Device == dev.OriginalNumber && e.Kind == until {
			return os.ErrClosed
		}
		return nil
	})
	if texts[until] == "" {
		t.Fatalf("no event %q: %v, %v", until, texts, err)
	}
	return texts
}

func write(t *testing.T, path string, off int64, n int, fill byte) {
	t.Helper()
	f := direct.MustOpen(t, path, unix.O_RDWR)
	defer f.Close()
	p := direct.Pages(t, n)
	for i := range p {
		p[i] = fill
	}
	if err := f.WriteAt(p, off); err != nil {
		t.Fatalf("write %d bytes at %d of %s: %v", n, off, path, err)
	}
}

// filled says whether all of a part of a disk is fill.
func filled(t *testing.T, path string, off int64, n int, fill byte) bool {
	t.Helper()
	f := direct.MustOpen(t, path, unix.O_RDONLY)
	defer f.Close()
	p := direct.Pages(t, n)
	if err := f.ReadAt(p, off); err != nil {
		t.Fatalf("read %s: %v", path, err)
	}
	return bytes.Count(p, []byte{fill}) == n
}

const (
	grownFrom = 8 << 20
	grownTo   = 12<<20 + 4096
)

// TestGrow: a disk grows under its filter, a mounted filesystem and a snapshot. The filter
// follows, with a new generation that covers all of it; the snapshot keeps its size.
func TestGrow(t *testing.T) {
	guest.NeedKernel(t, 6, 16, "UPDATE_SIZE")
	disk := guest.LoopDisk(t, grownFrom, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Path)
	dir := guest.Mount(t, dev.Path)
	stop := guest.BusyFiles(t, dir)
	s := d.Take(64<<10, dev)
	before := d.CBT(dev)
	held := direct.Digest(t, s.Images[0].Path)

	early := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})

	resize(t, disk, grownTo)
	guest.WaitFor(t, "the filter's growth", func() bool { return guest.SizeOf(t, dev.Path) == grownTo })
	guest.WaitFor(t, "what is told of it", func() bool { return d.CBT(dev).History.Reason == control.HistoryOtherSize })
	guest.Run(t, "resize2fs", dev.Path)
	stop()
	now := d.CBT(dev)
	if now.GenerationID == before.GenerationID || now.DeviceCapacity != grownTo || !strings.Contains(now.History.Text, "has grown") {
		t.Errorf("the change map: %+v", now)
	}
	guest.WaitFor(t, "a log for the new size", func() bool { return d.CBT(dev).PowerFailure.Covered })
	if got := events(t, d, dev, control.EventGrown); got[control.EventNewGeneration] == "" {
		t.Errorf("events: %v", got)
	}
	if got := shown(t, d, dev.Name); got.Size != grownTo || got.OriginalSize != 0 || got.Attention != "" {
		t.Errorf("told: %+v", got)
	}
	if got := guest.SizeOf(t, s.Images[0].Path); got != grownFrom || direct.Digest(t, s.Images[0].Path) != held {
		t.Errorf("the image of before has %d bytes, or shows something else", got)
	}
	d.Destroy(s.ID)
	_, err := d.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: early.ID})
	program.WantError(t, err, control.Busy, "has grown since it was added")
	d.Destroy(early.ID)

	// The next snapshot has the new part, and changes there are told of exactly.
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, dev.Path)
	write(t, dev.Path, 10<<20, 4096, 1)
	s = d.Take(64<<10, dev)
	write(t, dev.Path, 10<<20, 4096, 2)
	image := s.Images[0]
	if guest.SizeOf(t, image.Path) != grownTo || !filled(t, image.Path, 10<<20, 4096, 1) || !filled(t, dev.Path, 10<<20, 4096, 2) {
		t.Error("the image of a take after the growth is not what the disk was")
	}

	// The daemon dies, and the disk grows before the next one.
	d.Kill()
	const more = grownTo + 1<<20
	resize(t, disk, more)
	d.Restart()
	guest.WaitFor(t, "the growth after a death", func() bool { return guest.SizeOf(t, dev.Path) == more })
	// What is written to an image from before is logged by the log of now.
	guest.WaitFor(t, "a log for the new size", func() bool { return d.CBT(dev).DeviceCapacity == more && d.CBT(dev).PowerFailure.Covered })
	logged := d.CBT(dev).PowerFailure.Logged
	write(t, image.Path, 5<<20, 4096, 4)
	if now := d.CBT(dev).PowerFailure.Logged; now != logged+1 {
		t.Errorf("%d zones are logged, %d before a write to an image", now, logged)
	}
	d.Destroy(s.ID)
	s = d.Take(64<<10, dev)
	d.Destroy(s.ID)
	write(t, dev.Path, more-4096, 4096, 3)
	d.Destroy(d.Take(64<<10, dev).ID)
	info := d.CBT(dev)
	blocks, err := d.Changed(dev, *s.Images[0].Take)
	if err != nil || !slices.Equal(blocks, []int64{(more - 4096) / info.BlockSize}) {
		t.Errorf("changed: %v, %v", blocks, err)
	}
	// What is kept of it is believed.
	d.Remove(dev)
	if again := d.CBT(d.Add(disk)); !again.History.Continued || again.GenerationID != info.GenerationID {
		t.Errorf("added again: %+v", again)
	}
}

// TestOtherSize: a filter that cannot follow the size of its disk serves on, and the daemon says
// what there is to do.
func TestOtherSize(t *testing.T) {
	guest.Need(t)
	disk := guest.LoopDisk(t, grownFrom, 512)
	d := program.Start(t)
	dev := d.Add(disk)
	write(t, dev.Path, grownFrom-4096, 4096, 1)
	resize(t, disk, grownFrom-1<<20)
	texts := events(t, d, dev, control.EventShrunk)
	if got := shown(t, d, dev.Name); got.OriginalSize != grownFrom-1<<20 || got.Size != grownFrom || got.Attention != texts[control.EventShrunk] {
		t.Errorf("of a disk that has shrunk is told %+v", got)
	}
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.Contains(a.Err, "has shrunk to 7340032 bytes") {
		t.Errorf("list: %+v", a)
	}
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	if err := f.WriteAt(direct.Pages(t, 4096), grownFrom-4096); err == nil {
		t.Error("a write beyond the end of the disk has succeeded")
	}
	f.Close()
	write(t, dev.Path, 1<<20, 4096, 2)
	resize(t, disk, grownFrom)
	guest.WaitFor(t, "the end of the trouble", func() bool { return shown(t, d, dev.Name).Attention == "" })
	if guest.KernelAtLeast(t, 6, 16) {
		return
	}
	resize(t, disk, grownTo)
	texts = events(t, d, dev, control.EventGrown)
	if got := shown(t, d, dev.Name); !strings.Contains(texts[control.EventGrown], "remove the filter and add it again") || got.OriginalSize != grownTo || got.Size != grownFrom || guest.SizeOf(t, dev.Path) != grownFrom {
		t.Errorf("of a disk that has grown is told %+v, %v", got, texts)
	}
	before := d.CBT(dev)
	if before.History.Reason == control.HistoryOtherSize {
		t.Errorf("the change map: %+v", before)
	}
	d.Remove(dev)
	again := d.Add(disk)
	if now := d.CBT(again); again.Size != grownTo || now.History.Reason != control.HistoryOtherSize || now.GenerationID == before.GenerationID {
		t.Errorf("added again: %+v, %+v", again, now)
	}
}

// TestGrowPowerFailure: when the power fails after a disk has grown, its history goes on, in the
// new part too. What was kept of it before it grew is not believed.
func TestGrowPowerFailure(t *testing.T) {
	guest.NeedKernel(t, 6, 16, "UPDATE_SIZE")
	p := newFailing(t, grownFrom)
	dev := p.add()
	before := p.files()
	grow := func(size int64) {
		t.Helper()
		resize(t, p.disk, size)
		guest.WaitFor(t, "the filter's growth", func() bool {
			i := p.d.CBT(dev)
			return i.DeviceCapacity == size && i.History.Reason == control.HistoryOtherSize && guest.SizeOf(t, dev.Path) == size
		})
		awaitCovered(t, p.d, dev, true, "")
	}
	const size = 12 << 20
	grow(size)
	p.saved = before
	p.rewrite(bootID(t), uuid.NewString())
	if err := p.d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		t.Fatal(err)
	}
	p.again()
	p.restore()
	dev = p.add()
	wants(t, "what was kept before the growth", dev, control.HistoryOtherSize, "the disk had 8388608 bytes")

	grow(2 * size)
	s := p.d.Take(0, dev)
	p.d.Destroy(s.ID)
	writeBlock(t, dev.Path, size+5<<20)
	p.fails(dev)
	dev = p.add()
	wants(t, "after the growth", dev, "", "after a power failure")
	p.d.Destroy(p.d.Take(0, dev).ID)
	info := p.d.CBT(dev)
	blocks, err := p.d.Changed(dev, *s.Images[0].Take)
	if err != nil || !slices.Contains(blocks, (size+5<<20)/info.BlockSize) || slices.Contains(blocks, 2<<20/info.BlockSize) {
		t.Errorf("changed: %v, %v", blocks, err)
	}
}
