package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
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

// TestNothingToRead is I10: after its destruction nothing of a snapshot's data
// can be read from where it lay.
func TestNothingToRead(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	ram := guest.RAMDisks(t, 2, size)
	noDiscard := guest.SCSIDisk(t, 8, 512)
	d := program.Start(t)
	dev := d.Add(ram[0])
	w := stamp.NewWorld(size)
	file := filepath.Join(t.TempDir(), "differences")
	for _, path := range []string{file, "/dev/shm", ram[1], noDiscard} {
		t.Run(filepath.Base(path), func(t *testing.T) {
			d := d.In(t)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: path}}})
			s = d.Taken(s.ID)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			guest.WaitFor(t, "4 MiB in the storage", func() bool { return d.Show(s.ID).Usage.Stored >= 4<<20 })
			// Everything the daemon keeps data in, by its own files: also those
			// that have no name.
			all := dataFiles(t, d)
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
			d.Destroy(s.ID)
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
			if found := grepState(t, d.RunDir.State()); found != "" {
				t.Errorf("I10: old data in %s", found)
			}
		})
	}
	d.Remove(dev)
}

// dataFiles opens the regular files and block devices that the daemon has open
// or mapped, but for the originals and the filters.
func dataFiles(t *testing.T, d *program.Daemon) []*os.File {
	t.Helper()
	devs, err := d.Devices(guest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	var out []*os.File
	seen := map[[2]uint64]bool{}
	for _, dir := range []string{"fd", "map_files"} {
		paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/%s/*", d.PID, dir))
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
			at := int64(binary.LittleEndian.Uint64(p[8:]))
			if at>>48 == 1 {
				if v, ok := stamp.Of(p[:512], 0, at&(1<<48-1)); ok && v != stamp.Zeroes {
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
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 128<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	sums := guest.SomeFiles(t, dir, 1)
	round := func() {
		stop := guest.BusyFiles(t, dir)
		defer stop()
		opened, mounted, written := d.Take(16<<10, dev), d.Take(64<<10, dev), d.Take(64<<10, dev)

		f := direct.MustOpen(t, opened.Images[0].Path, unix.O_RDWR)
		buf := direct.Pages(t, 4096)
		if err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		at := guest.Mount(t, mounted.Images[0].Path)
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
			out, err := guest.Try("fio", "--name=image", "--filename="+written.Images[0].Path, "--ioengine=libaio", "--direct=1",
				"--rw=randrw", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=600")
			if err == nil {
				out = ""
			}
			fioEnd <- out
		}()
		time.Sleep(700 * time.Millisecond)
		for _, s := range []control.Snapshot{written, mounted, opened} {
			d.Destroy(s.ID)
		}
		if err := guest.Await(t, "the end of the writer on the mounted image", fileEnd); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EROFS) {
			t.Errorf("the writer on the mounted image got %v", err)
		}
		if out := <-fioEnd; !strings.Contains(out, "error") {
			t.Errorf("fio on the image: %q", out)
		}
		if err := f.ReadAt(buf, 0); err == nil {
			t.Error("an image that is gone can be read")
		}
		f.Close()
		guest.Unmount(t, at)
		for _, s := range []control.Snapshot{opened, mounted, written} {
			if _, err := os.Stat(s.Images[0].Link); err == nil {
				t.Errorf("%s is left", s.Images[0].Link)
			}
		}
	}
	round()
	before := d.Held()
	round()
	d.Settled(before, 6)
	guest.DropCaches(t)
	guest.SameFiles(t, filepath.Join(dir, "set1"), guest.Below("set1", sums))
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, dev.Link)
	d.Remove(dev)
	guest.Ext4.Check(t, disk)
}
