package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// walking is a Host of a directory, and the same with a Walker.
func walking(t *testing.T) (dir string, own, by *Host) {
	t.Helper()
	dir = t.TempDir()
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	own = &Host{Root: dir, Proc: "/proc", Sys: "/sys", Timeout: time.Minute}
	with := *own
	with.Walker = p
	return dir, own, &with
}

// TestWalker: whoever goes along a path, what is found is the same.
func TestWalker(t *testing.T) {
	dir, own, by := walking(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.MkdirAll(at("d/e"), 0o755), os.WriteFile(at("d/file"), []byte("text"), 0o600), os.WriteFile(at("large"), make([]byte, largestText+1), 0o600),
		os.Symlink("/d", at("link")), os.Symlink("nothing", at("dangling")), os.Symlink("d", at("theirs")), os.Lchown(at("theirs"), 1, 1), os.Symlink("loop", at("loop")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	describe := func(f *os.File) string {
		var st unix.Stat_t
		if f == nil || unix.Fstat(int(f.Fd()), &st) != nil {
			return "none"
		}
		flags, _ := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		closed, _ := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		return fmt.Sprintf("%d %o %#x %d", st.Ino, st.Mode, flags, closed)
	}
	text := func(err error) string {
		var no *Error
		var p *os.PathError
		return fmt.Sprint(err, errors.As(err, &no), errors.As(err, &p), errors.Is(err, fs.ErrNotExist), errors.Is(err, ErrForeign), errors.Is(err, unix.ELOOP))
	}
	for _, path := range []string{"/", "/d", "/d/file", "/link/file", "/link/none", "/dangling", "/theirs/file", "/d/file/x", "/none/x", "/loop", "/../d", "/d/e/../file"} {
		for _, flags := range []int{unix.O_PATH, unix.O_RDONLY, unix.O_WRONLY, unix.O_DIRECTORY} {
			said := func(h *Host) string {
				f, err := h.Open(path, flags, 0)
				if err == nil {
					defer f.Close()
				}
				return describe(f) + text(err)
			}
			if a, b := said(own), said(by); a != b {
				t.Errorf("open %s, %#x: %s, by the walker %s", path, flags, a, b)
			}
		}
		said := func(h *Host) string {
			p, err := h.OpenPlace(path)
			if err != nil {
				return text(err)
			}
			defer p.Close()
			return fmt.Sprintf("%s %s %o %s %s", describe(p.File), describe(p.Dir), p.Mode, p.Base, h.RealPath(p))
		}
		if a, b := said(own), said(by); a != b {
			t.Errorf("place %s: %s, by the walker %s", path, a, b)
		}
		if a, b := own.Exists(path), by.Exists(path); a != b {
			t.Errorf("%s exists: %v, by the walker %v", path, a, b)
		}
	}
	for _, path := range []string{"/d/file", "/link/file", "/large", "/d", "/none"} {
		said := func(h *Host) string {
			content, err := h.ReadFile(path)
			names, err2 := h.ReadNames(path)
			return content + strings.Join(names, " ") + text(err) + text(err2)
		}
		if a, b := said(own), said(by); a != b {
			t.Errorf("content of %s: %.200s, by the walker %.200s", path, a, b)
		}
	}
	if content, err := by.ReadFile("/link/file"); content != "text" || err != nil {
		t.Errorf("%q, %v", content, err)
	}
	if content, err := by.ReadFile("/large"); content != "" || !errors.Is(err, unix.EFBIG) {
		t.Errorf("of a large file %d bytes, %v", len(content), err)
	}
	to := filepath.Join(t.TempDir(), "copy")
	copied := func(want string) {
		t.Helper()
		st, err := os.Stat(to)
		if content, e := os.ReadFile(to); err != nil || e != nil || string(content) != want || st.Mode() != 0o750 {
			t.Errorf("the copy has %q, %v, %v %v", content, st, err, e)
		}
	}
	if err := by.CopyFile("/link/file", to, 0o750); err != nil {
		t.Error(err)
	}
	copied("text")
	if err := by.CopyFile("/none", to, 0o700); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	copied("text")
	first, err := by.Stamp("/d")
	again, err2 := by.Stamp("/d")
	err3 := os.WriteFile(at("d/file"), []byte("other text"), 0o600)
	if now, err4 := by.Stamp("/d"); first != again || now == first || errors.Join(err, err2, err3, err4) != nil {
		t.Errorf("stamps %q, %q, and after a change %q, %v", first, again, now, errors.Join(err, err2, err3, err4))
	}
	if one, err := by.Stamp("/d/file"); one == "" || err != nil {
		t.Errorf("stamp %q, %v", one, err)
	}
	if f, err := by.Open("/d/new", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o640); err != nil {
		t.Error(err)
	} else {
		_, err := f.WriteString("new")
		if content, e := os.ReadFile(at("d/new")); err != nil || e != nil || string(content) != "new" || f.Name() != "/d/new" {
			t.Errorf("%s has %q, %v, %v", f.Name(), content, err, e)
		}
		f.Close()
	}
}

// TestWalkerHangs: a path that does not answer holds up nobody else, and no thread of this
// process.
func TestWalkerHangs(t *testing.T) {
	dir, _, by := walking(t)
	if err := errors.Join(unix.Mkfifo(filepath.Join(dir, "hangs"), 0o600), os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	hurried := *by
	hurried.Timeout = time.Nanosecond
	if _, err := hurried.Open("/hangs", unix.O_WRONLY, 0); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("a path that hangs: %v", err)
	}
	for _, task := range threads(t) {
		if where, _ := os.ReadFile(filepath.Join(task, "wchan")); strings.Contains(string(where), "fifo") || strings.Contains(string(where), "wait_for_partner") {
			t.Errorf("%s of this process waits in %s", task, where)
		}
	}
	if f, err := by.Open("/file", unix.O_PATH, 0); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
}

func threads(t *testing.T) []string {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil || len(tasks) == 0 {
		t.Fatal(err)
	}
	return tasks
}

// TestWalkerGone: without the other process this one goes.
func TestWalkerGone(t *testing.T) {
	dir, _, by := walking(t)
	by.Walker.Close()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if content, err := by.ReadFile("/file"); content != "text" || err != nil {
		t.Errorf("%q, %v", content, err)
	}
	if p, err := by.OpenPlace("/file"); err != nil {
		t.Error(err)
	} else {
		p.Close()
	}
	if _, err := by.Open("/none", unix.O_PATH, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	by.WalkerOnly = true
	_, opens := by.Open("/file", unix.O_PATH, 0)
	_, finds := by.OpenPlace("/file")
	_, reads := by.ReadFile("/file")
	for _, err := range []error{opens, finds, reads} {
		if !errors.Is(err, ErrGone) {
			t.Errorf("it goes itself: %v", err)
		}
	}
	by.Root = "/"
	if f, err := by.Open("/dev/null", unix.O_PATH, 0); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
}
