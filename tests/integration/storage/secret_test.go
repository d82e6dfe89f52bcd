package storage

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestEncrypted: with --encrypt nothing of the disk's data can be read in the storage,
// while it is held, after a kill and after the destruction, and the images are right
// all the same, written or not. Without it, the same look finds the data. The key is
// nowhere in the end.
func TestEncrypted(t *testing.T) {
	guest.Need(t)
	modes := []control.Mode{control.ModeCopy}
	if guest.KernelAtLeast(t, 6, 16) {
		modes = append(modes, control.ModeZeroCopy)
	}
	size := int64(guest.Span(2<<20, 8<<20))
	ram := guest.RAMDisks(t, 2, size+1<<20)
	disk := guest.LoopDisk(t, size, 512)
	for i, mode := range modes {
		d := program.Start(t, fmt.Sprintf("encrypt=%v", i > 0))
		dev := d.Add(disk, func(r *control.AddRequest) { r.Mode = mode })
		for j, path := range []string{ram[1], filepath.Join(t.TempDir(), "differences"), "/dev/shm"} {
			for _, encrypt := range []bool{false, true} {
				if !guest.Long() && !(encrypt && j == i+1 || i+j == 0) {
					continue // the short form has each kind of storage in one mode, and one as it is
				}
				t.Run(fmt.Sprintf("%s/%s/%v", mode, filepath.Base(path), encrypt), func(t *testing.T) {
					encrypted(t, d, dev, path, encrypt)
				})
			}
		}
		// As configured.
		s := d.Create(control.CreateRequest{Devices: []string{dev.Name}})
		if s.Encrypted != (i > 0) {
			t.Errorf("encrypt=%v in the configuration: %v", i > 0, s.Encrypted)
		}
		d.Destroy(s.ID)
		d.Remove(dev)
		d.StopAndWait()
	}
}

func encrypted(t *testing.T, outer *program.Daemon, dev control.Device, path string, encrypt bool) {
	d := outer.In(t)
	w := stamp.NewWorld(dev.Size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Encrypt: &encrypt, Storage: []control.Storage{{Path: path, Overwrite: true}}})
	if s.Encrypted != encrypt {
		t.Errorf("it says encrypted: %v", s.Encrypted)
	}
	image := w.Fork() // what is written to it
	s = d.Taken(s.ID)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stored := func() {
		guest.WaitFor(t, "all in the storage", func() bool { u := d.Show(s.ID).Usage; return u.Stored == dev.Size })
	}
	stored()
	same := func(when string) {
		t.Helper()
		if err := image.Same(s.Images[0].Path); err != nil {
			t.Errorf("%s: the image: %v", when, err)
		}
		if err := w.Same(dev.Path); err != nil {
			t.Errorf("%s: the original: %v", when, err)
		}
	}
	look := func(when string) (files []*os.File) {
		t.Helper()
		n := 0
		for _, f := range dataFiles(t, d) {
			if strings.HasPrefix(target(f), d.RunDir.State()+"/") && !strings.Contains(target(f), "/storage-") {
				continue // memory: the pool holds data as it is
			}
			files = append(files, f)
			n += stamps(t, f)
		}
		if len(files) == 0 {
			t.Fatal("the storage is not found")
		}
		if (n > 0) == encrypt {
			t.Errorf("%s: %d sectors of the disk can be read in the storage", when, n)
		}
		return files
	}
	same("taken")
	look("held")
	stop := image.StartWriters(t, 1, stamp.Mix{Writers: 2, Zeroes: true}, s.Images[0].Path)
	image.More(t, 200)
	if err := stop(); err != nil {
		t.Error(err)
	}
	same("written")
	look("written")
	key, _ := os.ReadFile(filepath.Join(d.RunDir.State(), "snapshots", s.ID, "key"))
	if (len(key) == 64) != encrypt {
		t.Fatalf("a key of %d bytes", len(key))
	}
	outer.Kill()
	outer.Restart()
	*d = *outer.In(t)
	same("taken over")
	files := look("taken over")
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	same("written again")
	if encrypt && !inMemory(t, d.PID, key[:32]) {
		t.Error("the key is not found in memory: the test does not see it")
	}
	d.Destroy(s.ID)
	unix.Sync()
	for _, f := range files {
		if n := stamps(t, f); n > 0 {
			t.Errorf("I10: %d sectors of old data in %s", n, f.Name())
		}
	}
	if path[:8] == "/dev/ram" {
		head := direct.Pages(t, 1<<20)
		f := direct.MustOpen(t, path, unix.O_RDONLY)
		if err := f.ReadAt(head, 0); err != nil || !bytes.Equal(head, make([]byte, len(head))) {
			t.Errorf("the head of %s is not zeroes: %v", path, err)
		}
	}
	if encrypt && inMemory(t, d.PID, key[:32]) {
		t.Error("the key is still in the daemon's memory")
	}
}

// target is what an open file was opened as.
func target(f *os.File) string {
	name, _ := os.Readlink(f.Name())
	return name
}

// inMemory says whether a process has b in its memory.
func inMemory(t *testing.T, pid int, b []byte) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	buf := make([]byte, 1<<20)
	for _, line := range strings.Split(string(maps), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 || !strings.HasPrefix(f[1], "rw") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		at, _ := strconv.ParseInt(from, 16, 64)
		end, _ := strconv.ParseInt(to, 16, 64)
		for ; at < end; at += int64(len(buf)) - 64 {
			n, err := mem.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
			if bytes.Contains(buf[:n], b) {
				return true
			}
			if err != nil && err != io.EOF {
				break // not to be read
			}
		}
	}
	return false
}
