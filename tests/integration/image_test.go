package integration

import (
	"bytes"
	"errors"
	"fmt"
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
)

// Images as disks.

// TestImageShape: an image has the size and blocks of its original, on storage
// of other blocks as well, and random writers get along with it.
func TestImageShape(t *testing.T) {
	needVM(t)
	for _, c := range []struct {
		block, storage int
		size           int64
	}{
		{512, 4096, 6<<20 + 7*512},
		{4096, 512, 6<<20 + 4096},
		{4096, 4096, 6 << 20},
	} {
		t.Run(fmt.Sprintf("%d on %d", c.block, c.storage), func(t *testing.T) {
			disk, store := loopDisk(t, c.size, c.block), loopDisk(t, 12<<20, c.storage)
			d := startDaemon(t)
			dev := d.add(disk)
			w := newWorld(c.size)
			if err := w.fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: store}}})
			s = d.taken(s.ID)
			image := s.Images[0].Path
			if n := sizeOf(t, image); n != c.size {
				t.Errorf("size %d, want %d", n, c.size)
			}
			for _, name := range []string{"logical_block_size", "physical_block_size"} {
				if a, b := queueLimit(t, disk, name), queueLimit(t, image, name); a != b {
					t.Errorf("%s: %s, of the original %s", name, b, a)
				}
			}
			if to, err := filepath.EvalSymlinks(s.Images[0].Link); err != nil || to != image {
				t.Errorf("%s leads to %s, %v; want %s", s.Images[0].Link, to, err, image)
			}
			// From here on the image is a disk of its own.
			im := newWorld(c.size)
			copy(im.disks[0].now, w.disks[0].now)
			im.last = w.last + 1<<32
			stopImage := im.writers(t, 21, mix{block: int64(c.block), writers: 3, zeroes: true, largest: 64 << 10}, image)
			stop := w.writers(t, 22, mix{block: int64(c.block), writers: 3, zeroes: true, largest: 64 << 10}, dev.Path)
			time.Sleep(span(700*time.Millisecond, 20*time.Second))
			if err := errors.Join(stop(), stopImage()); err != nil {
				t.Error(err)
			}
			if err := im.same(image); err != nil {
				t.Errorf("I1: %v", err)
			}
			d.destroy(s.ID)
			d.remove(dev)
			if err := w.same(disk); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestImageFio runs fio with checksums on an original and on its image at once.
func TestImageFio(t *testing.T) {
	needVM(t)
	const size = 32 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk, with(queueCounts()[len(queueCounts())-1], 64))
	s := d.take(64<<10, dev)
	out, err := try("fio", "--ioengine=libaio", "--direct=1", "--rw=randrw", "--bsrange=4k-512k", "--iodepth=16", "--verify=crc32c",
		fmt.Sprintf("--size=%d", span(12<<20, size)), "--output-format=terse",
		"--name=original", "--filename="+dev.Path, "--name=image", "--filename="+s.Images[0].Path)
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if got := d.snapshot(s.ID); got.Errno != 0 || got.Usage.Copied == 0 {
		t.Errorf("%+v", got)
	}
	d.destroy(s.ID)
	d.remove(dev)
}

// TestImagePartitions: an image does not show the partitions of its original of
// its own accord.
func TestImagePartitions(t *testing.T) {
	needVM(t)
	needKernel(t, 7, 0, "a disk that is not to be scanned for partitions")
	disk := ramDisks(t, 1, 16<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	// A table of one partition, from sector 2048 to the end.
	f := openDirect(t, dev.Path, unix.O_RDWR)
	mbr := ublkPages(t, 512)
	copy(mbr[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x70, 0, 0})
	mbr[510], mbr[511] = 0x55, 0xaa
	if err := f.write(mbr, 0); err != nil {
		t.Fatal(err)
	}
	f.close()
	run(t, "blockdev", "--rereadpt", dev.Path)
	if parts, _ := filepath.Glob("/sys/block/" + filepath.Base(dev.Path) + "/ublkb*p1"); len(parts) != 1 {
		t.Fatal("the filter does not show the partition: the test sees nothing")
	}
	s := d.take(0, dev)
	image := s.Images[0].Path
	for range 10 {
		f, err := os.Open(image) // which is when the kernel would look
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		time.Sleep(20 * time.Millisecond)
	}
	if parts, _ := filepath.Glob("/sys/block/" + filepath.Base(image) + "/ublkb*p*"); len(parts) > 0 {
		t.Errorf("the image shows %v", parts)
	}
	d.destroy(s.ID)
	d.remove(dev)
}

// TestPartitionsMade: partitions made and deleted through the filter are so on the
// original when it is used again.
func TestPartitionsMade(t *testing.T) {
	needVM(t)
	disk := scsiDisk(t, 16, 512)
	d := startDaemon(t)
	for _, there := range []bool{true, false} {
		dev := d.add(disk)
		mbr := ublkPages(t, 512)
		if there {
			// One partition, from sector 2048 to the end.
			copy(mbr[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x70, 0, 0})
			mbr[510], mbr[511] = 0x55, 0xaa
		}
		f := openDirect(t, dev.Path, unix.O_RDWR)
		if err := f.write(mbr, 0); err != nil {
			t.Fatal(err)
		}
		f.close()
		run(t, "blockdev", "--rereadpt", dev.Path)
		d.remove(dev)
		waitFor(t, fmt.Sprintf("the partition of the original: %v", there), func() bool {
			_, err := os.Stat(disk + "1")
			return there == (err == nil)
		})
	}
}

// TestHungOriginal: while a disk does not answer nothing can be done with its
// filter, but with those of others. What was written gets there in the end.
func TestHungOriginal(t *testing.T) {
	needVM(t)
	ram := ramDisks(t, 2, 16<<20)
	run(t, "modprobe", "dm-mod")
	disk := dmDisk(t, "hung", linear(t, ram[0]))
	hung := false
	hang := func() {
		run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "hung")
		hung = true
	}
	resume := func() {
		if hung {
			run(t, "dmsetup", "resume", "hung")
			hung = false
		}
	}
	d := startDaemon(t, "disk_timeout=10s", "storage_timeout=3s")
	t.Cleanup(resume)
	others := func() {
		t.Helper()
		other := d.add(ram[1])
		d.destroy(d.take(0, other).ID)
		d.remove(other)
	}
	remove := func(dev control.Device, force bool, fix string) {
		t.Helper()
		err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: force})
		want(t, err, control.Timeout, disk+" does not answer", fix)
	}
	for _, force := range []bool{false, true} {
		var ahead control.Device
		if !force {
			ahead = d.add(ram[1])
		}
		dev := d.add(disk)
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
		waitFor(t, "writes under way", func() bool {
			s, err := d.DeviceStatus(ctx(t), dev.Name)
			return err == nil && s.InFlight > 0
		})
		if force {
			remove(dev, true, "remove it again")
		} else {
			// It does not begin, so that the device is still there for whoever comes.
			remove(dev, false, "nothing has changed")
			if s, err := d.DeviceStatus(ctx(t), dev.Name); err != nil || s.State != "live" {
				t.Errorf("state %s, %v", s.State, err)
			}
			// Nor does the end of the daemon, with the removal of those that could be removed.
			want(t, d.Stop(ctx(t)), control.Timeout, disk+" does not answer", "nothing has changed")
			if list, err := d.Devices(ctx(t)); err != nil || len(list) != 2 {
				t.Errorf("after a stop that was refused: %+v, %v", list, err)
			}
			d.remove(ahead)
		}
		others()
		resume()
		if err := dd.Wait(); err != nil {
			t.Errorf("dd: %v", err)
		}
		waitFor(t, "the removal", func() bool {
			return d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: force}) == nil
		})
		f := openDirect(t, disk, unix.O_RDONLY)
		back := ublkPages(t, len(text))
		if err := f.read(back, 0); err != nil {
			t.Fatal(err)
		}
		f.close()
		if !bytes.Equal(back, text) {
			t.Errorf("force %v: what was written is not on the disk", force)
		}
	}
	// Added while it hangs: before Linux 7.0 the kernel looks for partitions first.
	hang()
	dev, err := d.AddDevice(ctx(t), control.AddRequest{Path: disk})
	if err != nil {
		want(t, err, control.Timeout, "does not answer")
	}
	others()
	resume()
	list, err := d.Devices(ctx(t))
	if err != nil || len(list) > 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, dev = range list {
		waitFor(t, "the removal", func() bool {
			return d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: true}) == nil
		})
	}
	d.remove(d.add(disk))

	// A snapshot waits for the original too, and does not lay that to its storage.
	dev = d.add(disk)
	s := d.take(64<<10, dev)
	hang()
	dd := exec.Command("dd", "if=/dev/urandom", "of="+dev.Path, "bs=64k", "count=1", "conv=fsync,notrunc")
	if err := dd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a write under way", func() bool {
		st, err := d.DeviceStatus(ctx(t), dev.Name)
		return err == nil && st.InFlight > 0
	})
	err = d.DestroySnapshot(ctx(t), s.ID)
	want(t, err, control.Timeout, "destroy snapshot "+s.ID+": "+disk+": does not answer")
	// Who is killed while he waits for his snapshot leaves none.
	create := exec.Command(program(t), "--run-dir", string(d.dir), "snapshot", "create", dev.Name, "--storage", "/dev/shm", "--take")
	if err := create.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the take", func() bool {
		i, err := d.Info(ctx(t))
		return err == nil && strings.HasPrefix(i.Activity, "take snapshot")
	})
	_ = create.Process.Kill()
	_ = create.Wait()
	waitFor(t, "the end of the snapshot", func() bool {
		return !slices.ContainsFunc(snapshotIDs(t, d), func(id string) bool { return id != s.ID })
	})
	resume()
	if err := dd.Wait(); err != nil {
		t.Errorf("dd: %v", err)
	}
	waitFor(t, "the end of the snapshot", func() bool { return len(snapshotIDs(t, d)) == 0 })
	// One that cannot be taken is not left either, and one that can is taken by the same call.
	if _, err := d.CreateSnapshot(ctx(t), control.CreateRequest{Devices: []string{dev.Name}, Take: true}); control.CodeOf(err) != control.NoSpace {
		t.Errorf("a take without storage: %v", err)
	}
	if ids := snapshotIDs(t, d); len(ids) > 0 {
		t.Errorf("left of a failed take: %v", ids)
	}
	s = d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}, Take: true})
	if s.State != control.SnapshotTaken || s.Taken == nil || len(s.Images) != 1 || s.Images[0].Path == "" {
		t.Errorf("taken at once: %+v", s)
	}
	d.destroy(s.ID)
	d.remove(dev)
}

// TestPulledOut takes the original away under load, with a snapshot held: its
// users get errors, and everything can be put away.
func TestPulledOut(t *testing.T) {
	needVM(t)
	disk := scsiDisk(t, 16, 512)
	d := startDaemon(t)
	dev := d.add(disk)
	w := newWorld(dev.Size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.take(64<<10, dev)
	stop := w.writers(t, 31, mix{writers: 4}, dev.Path)
	time.Sleep(300 * time.Millisecond)
	if err := os.WriteFile("/sys/block/"+filepath.Base(disk)+"/device/delete", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		time.Sleep(500 * time.Millisecond)
		ended <- stop()
	}()
	if err := await(t, "the end of the writers", ended); err == nil {
		t.Error("nobody noticed")
	}
	d.destroy(s.ID)
	// What cannot be synced is not removed unasked.
	err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name})
	want(t, err, control.Internal, "ublk-blksnap remove --force "+dev.Name)
	if !errors.Is(err, unix.EIO) {
		t.Errorf("remove: %v", err)
	}
	if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		t.Errorf("remove by force: %v", err)
	}
}
