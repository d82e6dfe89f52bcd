package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenPlace(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(elem ...string) string { return filepath.Join(append([]string{dir}, elem...)...) }
	must(os.MkdirAll(path("a", "b"), 0o700))
	must(os.WriteFile(path("a", "b", "file"), nil, 0o600))
	must(os.Symlink("/a/b", path("absolute")))
	must(os.Symlink("b/../b/file", path("a", "relative")))
	must(os.Symlink("/../../a/./b/", path("a", "out")))
	must(os.Symlink("loop", path("loop")))
	must(os.Symlink("/nowhere/new", path("dangling")))
	root := filepath.Join(t.TempDir(), "root") // as /proc/1/root is one
	must(os.Symlink(dir, root))
	h := &Host{Root: root, Proc: "/proc"}
	for _, c := range []struct {
		path, where string
		kind        uint32
	}{
		{"/", "/", unix.S_IFDIR},
		{"/a//b/", "/a/b", unix.S_IFDIR},
		{"/a/b/file", "/a/b/file", unix.S_IFREG},
		{"/a/b/new", "/a/b/new", 0},
		{"/a/b/new/", "/a/b/new", 0},
		{"/../a/b/../../new", "/new", 0},
		{"/absolute", "/a/b", unix.S_IFDIR},
		{"/absolute/file", "/a/b/file", unix.S_IFREG},
		{"/absolute/new", "/a/b/new", 0},
		{"/a/relative", "/a/b/file", unix.S_IFREG},
		{"/a/out/file", "/a/b/file", unix.S_IFREG},
	} {
		p, err := h.OpenPlace(c.path)
		if err != nil {
			t.Errorf("%s: %v", c.path, err)
			continue
		}
		if where := h.RealPath(p); where != filepath.Join(root, dir, c.where) || p.Kind() != c.kind {
			t.Errorf("%s is %s, kind %o; want %s, %o", c.path, where, p.Kind(), c.where, c.kind)
		}
		p.Close()
	}
	for path, want := range map[string]error{
		"/a/nowhere/new": unix.ENOENT, "/a/b/file/new": unix.ENOTDIR, "/loop": unix.ELOOP, "/dangling": unix.ENOENT,
	} {
		var e *Error
		if _, err := h.OpenPlace(path); !errors.Is(err, want) || !errors.As(err, &e) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}

	// What was opened stays, whatever becomes of the names.
	p, err := h.OpenPlace("/a/b/new")
	must(err)
	defer p.Close()
	must(os.Rename(path("a"), path("moved")))
	must(os.Symlink("/", path("a")))
	if where := h.RealPath(p); where != filepath.Join(root, path("moved", "b", "new")) {
		t.Errorf("after a rename it is %s", where)
	}

	if os.Geteuid() != 0 {
		t.Skip("needs root: links of somebody else")
	}
	must(os.Lchown(path("absolute"), 12345, 12345))
	if _, err := h.OpenPlace("/absolute/file"); !errors.Is(err, ErrForeign) {
		t.Errorf("through a link of somebody else: %v", err)
	}
}

// TestOpenPlaceClosed counts descriptors.
func TestOpenPlaceClosed(t *testing.T) {
	before := len(dirNames("/proc/self/fd"))
	for _, path := range []string{"/proc/self/fd/../../self/status", "/etc/passwd/new", "/no/such/place", "/proc/self/new", "/"} {
		if p, err := Machine().OpenPlace(path); err == nil {
			p.Close()
		}
	}
	if after := len(dirNames("/proc/self/fd")); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// TestServedPlace has a filesystem that a user serves, by the list of mounts.
func TestServedPlace(t *testing.T) {
	dir := t.TempDir()
	p, err := Machine().OpenPlace(dir)
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.status()
	p.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		fstype, super string
		refused       bool
	}{
		{"fuse.sshfs", "rw,user_id=1000,group_id=1000,allow_other", true},
		{"fuseblk", "rw,user_id=0,group_id=0,allow_other,blksize=4096", false},
		{"ext4", "rw,user_id=1000", false},
	} {
		m := newMachine(t)
		m.Root = "/"
		m.mount(1, st.mount, "0:50", "/", c.fstype, "server", c.super)
		p, err := m.OpenPlace(dir)
		if errors.Is(err, ErrForeign) != c.refused || err != nil && !c.refused {
			t.Errorf("%+v: %v", c, err)
		}
		if err == nil {
			p.Close()
		}
	}
}
