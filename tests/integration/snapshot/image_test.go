package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestImageShape: an image has the size and blocks of its original, on storage
// of other blocks as well, and random writers get along with it.
func TestImageShape(t *testing.T) {
	guest.NeedEither(t)
	for _, c := range []struct {
		block, storage int
		size           int64
	}{
		{512, 4096, 6<<20 + 7*512},
		{4096, 512, 6<<20 + 4096},
		{4096, 4096, 6 << 20},
	} {
		t.Run(fmt.Sprintf("%d on %d", c.block, c.storage), func(t *testing.T) {
			disk, store := guest.LoopDisk(t, c.size, c.block), guest.LoopDisk(t, 12<<20, c.storage)
			d := program.Start(t)
			dev := d.Add(disk)
			w := stamp.NewWorld(c.size)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{{Path: store}}})
			s = d.Taken(s.ID)
			image := s.Images[0].Path
			if n := guest.SizeOf(t, image); n != c.size {
				t.Errorf("size %d, want %d", n, c.size)
			}
			for _, name := range []string{"logical_block_size", "physical_block_size"} {
				if a, b := guest.QueueLimit(t, disk, name), guest.QueueLimit(t, image, name); a != b {
					t.Errorf("%s: %s, of the original %s", name, b, a)
				}
			}
			if to, err := filepath.EvalSymlinks(s.Images[0].Link); err != nil || to != image {
				t.Errorf("%s leads to %s, %v; want %s", s.Images[0].Link, to, err, image)
			}
			// From here on the image is a disk of its own.
			im := w.Fork()
			stopImage := im.StartWriters(t, 21, stamp.Mix{Block: int64(c.block), Writers: 3, Zeroes: true, Largest: 64 << 10}, image)
			stop := w.StartWriters(t, 22, stamp.Mix{Block: int64(c.block), Writers: 3, Zeroes: true, Largest: 64 << 10}, dev.Path)
			time.Sleep(guest.Span(700*time.Millisecond, 20*time.Second))
			if err := errors.Join(stop(), stopImage()); err != nil {
				t.Error(err)
			}
			if err := im.Same(image); err != nil {
				t.Errorf("I1: %v", err)
			}
			d.Destroy(s.ID)
			d.Remove(dev)
			if err := w.Same(disk); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestImageFio runs fio with checksums on an original and on its image at once.
func TestImageFio(t *testing.T) {
	guest.Need(t)
	const size = 32 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 64))
	s := d.Take(64<<10, dev)
	out, err := guest.Try("fio", "--ioengine=libaio", "--direct=1", "--rw=randrw", "--bsrange=4k-512k", "--iodepth=16", "--verify=crc32c",
		fmt.Sprintf("--size=%d", guest.Span(12<<20, size)), "--output-format=terse",
		"--name=original", "--filename="+dev.Path, "--name=image", "--filename="+s.Images[0].Path)
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if got := d.Show(s.ID); got.Errno != 0 || got.Usage.Copied == 0 {
		t.Errorf("%+v", got)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}

// TestImagePartitions: an image does not show the partitions of its original of
// its own accord.
func TestImagePartitions(t *testing.T) {
	guest.Need(t)
	guest.NeedKernel(t, 7, 0, "a disk that is not to be scanned for partitions")
	disk := guest.RAMDisks(t, 1, 16<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	// A table of one partition, from sector 2048 to the end.
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	mbr := direct.Pages(t, 512)
	copy(mbr[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x70, 0, 0})
	mbr[510], mbr[511] = 0x55, 0xaa
	if err := f.WriteAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	guest.Run(t, "blockdev", "--rereadpt", dev.Path)
	if parts, _ := filepath.Glob("/sys/block/" + filepath.Base(dev.Path) + "/ublkb*p1"); len(parts) != 1 {
		t.Fatal("the filter does not show the partition: the test sees nothing")
	}
	s := d.Take(0, dev)
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
	d.Destroy(s.ID)
	d.Remove(dev)
}
