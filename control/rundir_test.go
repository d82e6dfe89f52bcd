package control

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
		d := &Daemon{o: Options{Dir: dir, Config: DefaultConfig()}}
		if err := os.MkdirAll(d.cbtDir(), 0o700); err != nil {
			t.Error(err)
			return
		}
		v := &device{geo: ublk.Geometry{Size: 64 << 30}} // a map of 2 MiB
		if err := d.makeMap(v, "a"); err != nil {
			t.Errorf("with room: %v", err)
			return
		}
		v.closeCBT()
		// A table of which nothing has been used yet.
		table := filepath.Join(dir.State(), "words")
		if err := os.WriteFile(table, nil, 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Truncate(table, 15<<20); err != nil {
			t.Error(err)
		}
		if err := d.makeMap(v, "b"); err == nil || !strings.Contains(err.Error(), "state_size") {
			t.Errorf("a map was made of memory that a table was promised: %v", err)
		}
	})
}

// TestClearLinks: a link whose device is gone goes, even if there is a device of
// that number again; one to a device that is left alone stays.
func TestClearLinks(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "links/images"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ublkb0", "ublkb1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"waits": "../ublkb0", "foreign": "../ublkb1", "images/nowhere": "../../ublkb2"} {
		if err := os.Symlink(to, filepath.Join(dir, "links", name)); err != nil {
			t.Fatal(err)
		}
	}
	clearLinks(filepath.Join(dir, "links"), func(to string) bool { return filepath.Base(to) != "ublkb0" })
	for name, want := range map[string]bool{"waits": true, "foreign": false, "images/nowhere": false} {
		if _, err := os.Lstat(filepath.Join(dir, "links", name)); (err == nil) != want {
			t.Errorf("link %s: %v, want it there: %v", name, err, want)
		}
	}
}
