package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// privately runs f on a thread with a mount namespace of its own.
func privately(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the namespace ends with the thread
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Skipf("no mount namespace to be had (%v): run it as root", err)
	}
}

// TestStateMemory: the tmpfs of the state has the configured size, also if it
// was there before, and nothing is put on it beyond what has been promised.
func TestStateMemory(t *testing.T) {
	dir := RunDir(t.TempDir())
	privately(t, func() {
		defer func() { _ = unix.Unmount(dir.State(), unix.MNT_DETACH) }()
		for _, want := range []int64{8 << 20, 16 << 20} {
			if err := dir.mountState(want); err != nil {
				t.Errorf("mount: %v", err)
				return
			}
			var fs unix.Statfs_t
			if err := unix.Statfs(dir.State(), &fs); err != nil || int64(fs.Blocks)*fs.Bsize != want {
				t.Errorf("the tmpfs has %d bytes, %v; want %d", int64(fs.Blocks)*fs.Bsize, err, want)
			}
		}
		d := &Daemon{opts: Options{Dir: dir, Config: DefaultConfig()}}
		if err := os.MkdirAll(d.cbtDir(), 0o700); err != nil {
			t.Error(err)
			return
		}
		dev := &device{geo: ublk.Geometry{Size: 64 << 30}} // a map of 2 MiB
		if err := d.createChangeMap(dev, "a"); err != nil {
			t.Errorf("with room: %v", err)
			return
		}
		dev.closeCBT()
		// A table of which nothing has been used yet.
		table := filepath.Join(dir.State(), "words")
		if err := os.WriteFile(table, nil, 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Truncate(table, 15<<20); err != nil {
			t.Error(err)
		}
		if err := d.createChangeMap(dev, "b"); err == nil || !strings.Contains(err.Error(), "state_size") {
			t.Errorf("a map was made of memory that a table was promised: %v", err)
		}
	})
}

// TestRunDirOfOthers: nothing happens in a directory that somebody else can
// change, or through a link that was put there.
func TestRunDirOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes directories of others")
	}
	precious := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	place := func(mode os.FileMode, uid int) string {
		dir := filepath.Join(t.TempDir(), "place")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode), os.Chown(dir, uid, 0)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	below := func(dir string) string { return filepath.Join(dir, "run") }
	lies := func(dir string, uid int) string { // a link of that user
		link := filepath.Join(place(0o777|os.ModeSticky, 0), "link")
		if err := errors.Join(os.Symlink(dir, link), os.Lchown(link, uid, 0)); err != nil {
			t.Fatal(err)
		}
		return link
	}
	full := place(0o755, 0)
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dir, why string // empty: it is fine
	}{
		{place(0o755, 0), ""},
		{place(0o700, 0), ""},
		{below(place(0o755, 0)), ""},
		{below(place(0o777|os.ModeSticky, 0)), ""},
		{lies(place(0o700, 0), 0), ""},
		{place(0o700, 65534), "belongs to user 65534"},
		{place(0o777, 0), "can be written to by others"},
		{place(0o770, 0), "can be written to by others"},
		{place(0o777|os.ModeSticky, 0), "can be written to by others"},
		{below(place(0o755, 65534)), "belongs to user 65534"},
		{below(place(0o777, 0)), "can be written to by others"},
		{lies(place(0o700, 0), 65534), "belongs to user 65534"},
		{lies(place(0o700, 65534), 0), "belongs to user 65534"},
		{full, "holds other things"},
	} {
		dir := RunDir(c.dir)
		err := dir.make()
		if c.why == "" {
			if st, e := os.Stat(c.dir); err != nil || e != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("%s: %v, %v", c.dir, err, e)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), "choose ") {
			t.Errorf("%s: %v; want %q", c.dir, err, c.why)
		}
		if c.dir == full {
			continue
		}
		if f, err := dir.lock(); control.CodeOf(err) != control.Denied && control.CodeOf(err) != control.NotFound {
			t.Errorf("locked %s: %v", c.dir, err)
			f.Close()
		}
	}

	// What was put there before it was closed.
	dir := RunDir(below(place(0o755, 0)))
	if err := dir.make(); err != nil {
		t.Fatal(err)
	}
	outside := place(0o700, 0)
	if err := errors.Join(os.Symlink(outside, dir.path(stateName)), os.Symlink(outside, dir.path(udevName))); err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]func(path string) error{
		"a symbolic link": func(path string) error { return os.Symlink(precious, path) },
		"another name":    func(path string) error { return os.Link(precious, path) },
		"a pipe":          func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		for _, at := range []string{lockName, logName, "plain"} {
			if err := put(dir.path(at)); err != nil {
				t.Fatal(err)
			}
			var f *os.File
			var err error
			switch at {
			case lockName:
				f, err = dir.lock()
			case logName:
				f, err = dir.openLog()
			default:
				err = dir.write(at, []byte("x"), 0o600)
			}
			if err == nil || f != nil {
				t.Errorf("%s: %s is used", at, name)
			}
			if err := os.Remove(dir.path(at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, err := range []error{dir.subdir(stateName, 0o700), dir.subdir(udevName, 0o755), dir.write(udevName+"/ublkb0", nil, 0o600)} {
		if err == nil {
			t.Error("a directory behind a link is used")
		}
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "precious" {
		t.Errorf("precious holds %q, %v", b, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}

// TestDefaultSocket: who asks the daemon of the machine finds it.
func TestDefaultSocket(t *testing.T) {
	if got := RunDir(DefaultRunDir).Socket(); got != control.DefaultSocket {
		t.Errorf("the daemon listens on %s, its clients look at %s", got, control.DefaultSocket)
	}
}
