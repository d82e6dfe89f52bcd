package snapshots

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// memoryDir makes a directory on a tmpfs.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "snapshots-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// testState makes the state of a snapshot without one. What a test leaves mounted
// goes with it.
func testState(t *testing.T) *state {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: storage is kept by a mount")
	}
	id := uuid.New()
	st, err := newState(filepath.Join(memoryDir(t), id.String()), "", record{ID: id, Chunk: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	unpin(t, st.pins)
	return st
}

func unpin(t *testing.T, p pins) {
	t.Cleanup(func() {
		for _, n := range p.all() {
			if err := p.release(n); err != nil {
				t.Error(err)
			}
		}
	})
}

// leftOf is what a dead daemon would have left of a state.
func leftOf(t *testing.T, st *state) *Left {
	t.Helper()
	left, err := LeftBehind(filepath.Dir(st.dir))
	if err != nil || len(left) != 1 {
		t.Fatalf("%d left, %v", len(left), err)
	}
	return left[0]
}

// openStorage opens a path as storage, as the daemon does it.
func openStorage(t *testing.T, path string, overwrite bool) (*storage, error) {
	t.Helper()
	p, err := disk.Machine().OpenPlace(path)
	if err != nil {
		return nil, err
	}
	st := testState(t)
	s, err := st.openStorage(StorageConfig{
		Place: p, RealPath: path, Overwrite: overwrite, Probe: func(*os.File) (string, error) { return "", nil },
	}, 512)
	if err != nil {
		for n, r := range st.recorded().Storage {
			if r.Stage != storageGone || len(st.pins.all()) > 0 {
				t.Errorf("refused, and there is %d: %+v, %v", n, r, st.pins.all())
			}
		}
	}
	return s, err
}

func mustOpenStorage(t *testing.T, path string, overwrite bool) *storage {
	t.Helper()
	s, err := openStorage(t, path, overwrite)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func writeFile(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// secret is what was on a disk.
var secret = bytes.Repeat([]byte("secret!!"), 8<<10)

// store writes the secret to the storage, as the log does.
func store(t *testing.T, s *storage) {
	t.Helper()
	if err := s.setDirect(false); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(s.file.Fd(), 0, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(s.file.Fd(), secret, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fsync(s.file.Fd()); err != nil {
		t.Fatal(err)
	}
}

// reads fails the test if the secret is seen.
func reads(t *testing.T, who string, f io.ReaderAt) {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<62))
	if err != nil || bytes.Contains(b, []byte("secret")) {
		t.Errorf("%s reads what was on the disk, among %d bytes, %v", who, len(b), err)
	}
}

func stat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st
}

// TestStorageOfOthers: a file that is somebody else's, or has another name, is
// not used.
func TestStorageOfOthers(t *testing.T) {
	dir := t.TempDir()
	empty := func(name string) string {
		path := filepath.Join(dir, name)
		writeFile(t, path, "", 0o666)
		return path
	}
	linked := empty("linked")
	if err := os.Link(linked, filepath.Join(dir, "second")); err != nil {
		t.Fatal(err)
	}
	refused := []string{linked}
	if os.Geteuid() == 0 {
		theirs := empty("theirs")
		if err := os.Chown(theirs, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		refused = append(refused, theirs)
	}
	for _, path := range refused {
		for _, overwrite := range []bool{false, true} {
			if _, err := openStorage(t, path, overwrite); !errors.Is(err, ErrStorageInUse) {
				t.Errorf("%s, overwrite %v: %v, want %v", path, overwrite, err, ErrStorageInUse)
			}
		}
		if st := stat(t, path); st.Mode&0o777 != 0o666 {
			t.Errorf("a file that was refused has mode %o", st.Mode)
		}
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, "/dev/null"} {
		if _, err := openStorage(t, path, true); err == nil || !strings.Contains(err.Error(), "neither") {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range []string{empty("ours"), filepath.Join(dir, "new"), dir} {
		s := mustOpenStorage(t, path, false)
		var st unix.Stat_t
		if err := unix.Fstat(s.file.Fd(), &st); err != nil || st.Mode&0o777 != 0o600 {
			t.Errorf("%s: mode %o, %v", path, st.Mode, err)
		}
		if path != dir {
			if _, err := openStorage(t, path, true); !errors.Is(err, ErrStorageInUse) {
				t.Errorf("%s for a second snapshot: %v", path, err)
			}
		}
		if err := s.wipe(0); err != nil {
			t.Error(err)
		}
	}
}

// TestStorageThatWasThere has files of every kind as storage. Who had them open
// before sees nothing of what is stored, and afterwards they are what they were,
// without their contents.
func TestStorageThatWasThere(t *testing.T) {
	const size = 256 << 10
	for _, c := range []struct {
		name      string
		make      func(f *os.File) error
		overwrite bool // is needed
	}{
		{"empty", func(*os.File) error { return nil }, false},
		{"sparse", func(f *os.File) error { return f.Truncate(size) }, false},
		{"allocated", func(f *os.File) error { return unix.Fallocate(int(f.Fd()), 0, 0, size) }, false},
		{"full", func(f *os.File) error { _, err := f.Write(bytes.Repeat([]byte("x"), size)); return err }, true},
		{"data behind a hole", func(f *os.File) error { _, err := f.WriteAt([]byte("x"), size-1); return err }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			writeFile(t, path, "", 0o644)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := c.make(f); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, io.NewSectionReader(f, 0, size)) // into the page cache
			before := stat(t, path)
			if c.overwrite {
				_, err := openStorage(t, path, false)
				if !errors.Is(err, ErrStorageInUse) || !strings.Contains(err.Error(), "--overwrite") {
					t.Errorf("without overwrite: %v", err)
				}
				_, err = openStorage(t, path, true)
				if !errors.Is(err, ErrStorageInUse) || !strings.Contains(err.Error(), "open") {
					t.Errorf("while somebody has it open: %v", err)
				}
				f.Close()
				if now := stat(t, path); now.Blocks != before.Blocks || now.Mtim != before.Mtim {
					t.Errorf("a file that was refused has changed: %+v", now)
				}
			}
			s := mustOpenStorage(t, path, c.overwrite)
			if _, err := openStorage(t, path, true); !errors.Is(err, ErrStorageInUse) {
				t.Errorf("for a second snapshot: %v", err)
			}
			if c.overwrite {
				if f, err = os.Open(path); err != nil {
					t.Fatal(err)
				}
				defer f.Close()
			}
			store(t, s)
			reads(t, "who had it open before", f)
			if err := s.wipe(int64(len(secret))); err != nil {
				t.Error(err)
			}
			reads(t, "who had it open before, afterwards,", f)
			now := stat(t, path)
			if now.Ino != before.Ino || now.Mode != before.Mode || now.Size != before.Size || now.Uid != before.Uid {
				t.Errorf("it was %+v and is %+v", before, now)
			}
			if full := before.Blocks*512 >= size; full && now.Blocks < before.Blocks {
				t.Errorf("%d blocks were allocated, %d are", before.Blocks, now.Blocks)
			}
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
				t.Errorf("data at %d, %v", n, err)
			}
			if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

// TestStorageSomebodyHasOpen: what has no data yet may get some while it is looked
// at, from whoever has it open, and so keeps its space.
func TestStorageSomebodyHasOpen(t *testing.T) {
	const size = 256 << 10
	path := filepath.Join(t.TempDir(), "file")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, size), f.Sync()); err != nil {
		t.Fatal(err)
	}
	before := stat(t, path)
	s := mustOpenStorage(t, path, false)
	if now := stat(t, path); now.Blocks != before.Blocks {
		t.Errorf("%d blocks were allocated for it, %d are", before.Blocks, now.Blocks)
	}
	store(t, s)
	if _, err := f.WriteAt([]byte("mine"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.wipe(int64(len(secret))); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || len(b) != size || string(b[:4]) != "mine" {
		t.Errorf("it holds %d bytes, %v", len(b), err)
	}
}

// TestStorageMoved: whatever somebody does with the names while a storage is
// held, what he put there stays, and what was stored can not be read.
func TestStorageMoved(t *testing.T) {
	for _, c := range []struct {
		name  string
		do    func(dir string) error
		moved bool // is reported
		left  string
	}{
		{"nothing", func(string) error { return nil }, false, ""},
		{"removed", func(dir string) error { return os.Remove(dir + "/in/store") }, false, ""},
		{"moved", func(dir string) error { return os.Rename(dir+"/in/store", dir+"/in/other") }, true, "in/other"},
		{"replaced", func(dir string) error { return os.Rename(dir+"/precious", dir+"/in/store") }, false, "in/store"},
		{"replaced by a link", func(dir string) error {
			return errors.Join(os.Remove(dir+"/in/store"), os.Symlink("../precious", dir+"/in/store"))
		}, false, "precious"},
		{"another name", func(dir string) error { return os.Link(dir+"/in/store", dir+"/in/other") }, true, "in/other"},
		{"another file of the name", func(dir string) error {
			return errors.Join(os.Rename(dir+"/in/store", dir+"/in/other"), os.Link(dir+"/precious", dir+"/in/store"))
		}, true, "in/store"},
		{"the directory swapped for a link", func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/elsewhere", 0o700), os.Rename(dir+"/precious", dir+"/elsewhere/store"),
				os.Rename(dir+"/in", dir+"/away"), os.Symlink("elsewhere", dir+"/in"))
		}, false, "elsewhere/store"},
	} {
		for _, killed := range []bool{false, true} {
			what := c.name
			if killed {
				what += ", with the daemon killed"
			}
			t.Run(what, func(t *testing.T) {
				if killed && os.Geteuid() != 0 {
					t.Skip("needs root: a file is found by its handle")
				}
				dir := t.TempDir()
				if err := os.Mkdir(filepath.Join(dir, "in"), 0o700); err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "precious"), "precious", 0o600)
				path := filepath.Join(dir, "in", "store")
				s := mustOpenStorage(t, path, false)
				store(t, s)
				f, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := c.do(dir); err != nil {
					t.Fatal(err)
				}
				if killed {
					s.close()
					err = leftOf(t, s.state).Clear(Config{StorageTimeout: time.Minute})
				} else {
					err = s.wipe(int64(len(secret)))
				}
				if c.moved != errors.Is(err, errMoved) || !c.moved && err != nil {
					t.Errorf("reported: %v, want it: %v", err, c.moved)
				}
				reads(t, "who has it open", f)
				if c.left == "" {
					if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
						t.Errorf("left: %v, %v", left, err)
					}
					return
				}
				b, err := os.ReadFile(filepath.Join(dir, c.left))
				if err != nil {
					t.Error(err)
				}
				if want := "precious"; !strings.HasSuffix(c.left, "other") && string(b) != want {
					t.Errorf("%s holds %q", c.left, b)
				} else if strings.HasSuffix(c.left, "other") && len(b) != 0 {
					t.Errorf("%s holds %d bytes", c.left, len(b))
				}
			})
		}
	}
}
