package daemon

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// spoil is what may have become of a file of the state, besides that its bytes are
// others.
var spoil = map[string]func(path string) error{
	"readable by others": func(path string) error { return os.Chmod(path, 0o604) },
	"writable by all":    func(path string) error { return os.Chmod(path, 0o666) },
	"another's": func(path string) error {
		if os.Geteuid() != 0 {
			return os.Chmod(path, 0o644)
		}
		return os.Chown(path, 12345, 0)
	},
	"another name": func(path string) error { return os.Link(path, path+"2") },
	"a link": func(path string) error {
		return errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path))
	},
	"a pipe":      func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
	"a directory": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
	"cut off":     func(path string) error { return os.Truncate(path, 100) },
	"empty":       func(path string) error { return os.Truncate(path, 0) },
	"foreign":     func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte("foreign "), 1000), 0o600) },
}

// TestSpoiltChangeMap: a change map that is not what a daemon left is not believed, and
// that is said: another generation begins.
func TestSpoiltChangeMap(t *testing.T) {
	const size = 1 << 20
	for name, change := range spoil {
		shm, err := os.MkdirTemp("/dev/shm", "test") // what is there is counted
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(shm)
		dir := RunDir(shm)
		d := &Daemon{events: newEventLog(), opts: Options{Dir: dir, Log: quiet(), Config: DefaultConfig()}}
		if err := os.MkdirAll(d.cbtDir(), 0o700); err != nil {
			t.Fatal(err)
		}
		s := &survivor{record: deviceRecord{Name: "vdb"}}
		dev := &device{geo: ublk.Geometry{Size: size}}
		if err := d.createChangeMap(dev, "vdb"); err != nil {
			t.Fatal(err)
		}
		dev.cbt.Mark(0, size)
		before, err := dev.cbt.Info()
		if err := errors.Join(err, dev.cbt.Close()); err != nil {
			t.Fatal(err)
		}
		adopt := func() (control.History, cbtmap.Info) {
			t.Helper()
			dev := &device{geo: ublk.Geometry{Size: size}}
			if err := d.adoptChangeMap(dev, s); err != nil {
				t.Errorf("%s: %v", name, err)
				return control.History{}, cbtmap.Info{}
			}
			info, err := dev.cbt.Info()
			if err := errors.Join(err, dev.cbt.Close()); err != nil {
				t.Fatal(err)
			}
			return dev.History, info
		}
		if h, now := adopt(); now.GenerationID != before.GenerationID || h.Reason != "" {
			t.Fatalf("a map that is whole is at %+v, was at %+v: %+v", now, before, h)
		}
		if err := change(d.cbtFile("vdb")); err != nil {
			t.Fatal(err)
		}
		if name == "a directory" { // nothing can be put in its place
			if err := d.adoptChangeMap(&device{geo: ublk.Geometry{Size: size}}, s); err == nil {
				t.Errorf("%s is taken for a map", name)
			}
			continue
		}
		if h, now := adopt(); now.GenerationID == before.GenerationID || h.Reason != control.HistoryDamaged || h.Text == "" {
			t.Errorf("%s: the map is at %+v, was at %+v: %+v", name, now, before, h)
		}
	}
}

// TestSpoiltCounters: counters that are not what a daemon left begin at zero.
func TestSpoiltCounters(t *testing.T) {
	for name, change := range spoil {
		path := filepath.Join(t.TempDir(), "vdb")
		c, err := openCounters(path, 2)
		if err != nil {
			t.Fatal(err)
		}
		c.queues[1].Errors.Store(7)
		c.unmap()
		if err := change(path); err != nil {
			t.Fatal(err)
		}
		c, err = openCounters(path, 2)
		switch {
		case name == "a directory":
			if err == nil {
				t.Errorf("%s is taken for counters", name)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case c.queues[1].Errors.Load() != 0:
			t.Errorf("%s is believed", name)
		}
		if c != nil {
			c.unmap()
		}
	}
}

// TestSpoiltFrozen: nothing is thawed because a file says so that somebody else has
// written, and the file stays.
func TestSpoiltFrozen(t *testing.T) {
	dir := RunDir(t.TempDir())
	var said strings.Builder
	log := NewLog(&said, 0, false)
	d := &Daemon{events: newEventLog(), opts: Options{Dir: dir, Log: log, Config: DefaultConfig()}, host: disk.Machine()}
	if err := errors.Join(os.MkdirAll(dir.State(), 0o700), statefile.Write(d.frozenFile(), frozenKind, frozenFormat, frozenRecord{[]frozenPoint{{Point: t.TempDir()}}}), os.Chmod(d.frozenFile(), 0o666)); err != nil {
		t.Fatal(err)
	}
	d.readFrozen()
	d.thawLeftover()
	log.Flush(time.Minute)
	if text := said.String(); !strings.Contains(text, d.frozenFile()) || strings.Contains(text, "thaw") || strings.Contains(text, "goes on") {
		t.Errorf("said %q", text)
	}
	if _, err := os.Stat(d.frozenFile()); err != nil {
		t.Error(err)
	}
}

// TestFrozenFormats: what programs of before have put on record is known.
func TestFrozenFormats(t *testing.T) {
	d := &Daemon{opts: Options{Dir: RunDir(t.TempDir())}}
	if err := os.MkdirAll(d.opts.Dir.State(), 0o700); err != nil {
		t.Fatal(err)
	}
	for format, c := range map[int]struct {
		record any
		want   []frozenPoint
	}{
		1: {[]string{"/a", "/b"}, []frozenPoint{{Point: "/a"}, {Point: "/b"}}},
		2: {map[string]any{"points": []string{"/a"}, "pid": 7, "process": "p"}, []frozenPoint{{"/a", 0, 7, "p"}}},
		3: {frozenRecord{[]frozenPoint{{"/a", 3, 7, "p"}, {"/b", 4, 8, "q"}}}, []frozenPoint{{"/a", 3, 7, "p"}, {"/b", 4, 8, "q"}}},
	} {
		if err := statefile.Write(d.frozenFile(), frozenKind, format, c.record); err != nil {
			t.Fatal(err)
		}
		if got, err := d.leftFrozen(); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("format %d: %+v, %v", format, got, err)
		}
	}
}

// TestLateFreeze: a filesystem that may be frozen later stays on record, alone, and is not frozen
// by another take.
func TestLateFreeze(t *testing.T) {
	d := &Daemon{opts: Options{Dir: RunDir(t.TempDir()), Log: quiet()}}
	if err := os.MkdirAll(d.opts.Dir.State(), 0o700); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		f, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	onRecord := func(want ...*os.File) {
		t.Helper()
		left, err := d.leftFrozen()
		if err != nil && !(len(want) == 0 && errors.Is(err, os.ErrNotExist)) || !slices.EqualFunc(left, want, func(f frozenPoint, m *os.File) bool { return f.Point == m.Name() }) {
			t.Errorf("on record: %+v, %v", left, err)
		}
	}
	a, b, ended := open(), open(), make(chan struct{})
	points, err := d.rememberFrozen([]*os.File{a, b})
	if err != nil {
		t.Fatal(err)
	}
	onRecord(a, b)
	d.afterFreeze(nil, nil)
	onRecord(a, b)
	d.lateFreeze = &lateFreeze{b, func() bool { <-ended; return false }}
	d.afterFreeze([]*os.File{a, b}, points)
	onRecord(b)
	if _, err := d.rememberFrozen([]*os.File{a, b}); control.CodeOf(err) != control.Busy {
		t.Errorf("frozen twice: %v", err)
	}
	if points, err = d.rememberFrozen([]*os.File{a}); err != nil {
		t.Error(err)
	}
	d.afterFreeze([]*os.File{a}, points)
	onRecord(b)
	// In another mount namespace another filesystem may have the same point.
	fd, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := os.NewFile(uintptr(fd), b.Name())
	defer elsewhere.Close()
	if points, err = d.rememberFrozen([]*os.File{elsewhere}); err != nil {
		t.Error(err)
	}
	onRecord(b, elsewhere)
	d.afterFreeze([]*os.File{elsewhere}, points)
	onRecord(b)
	close(ended)
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(d.frozenFile()); err != nil {
			break
		}
	}
	onRecord()
}
