package snapshots

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pins keep storage for the next daemon. A file without a name is gone when the
// last process has closed it, and a name may lead to something else by tomorrow. So
// each storage is bound by a mount onto an empty file in the snapshot's directory,
// which keeps exactly this file or device node, whatever happens to its names. A
// power failure leaves nothing of it.
//
// The daemon may have a mount namespace of its own, which ends with it. So pins are
// mounted in the one that everybody sees. The next daemon's namespace has copies of
// them, which have to go too when a storage is given back.
type pins struct {
	dir  string // the snapshot's directory, by a path without symbolic links
	root string // the root directory that everybody sees: Config.Root
}

const pinPrefix = "storage-"

func (p pins) point(n int) string { return filepath.Join(p.dir, pinPrefix+strconv.Itoa(n)) }

// own says whether the namespace that everybody sees is this process's.
func (p pins) own() bool { return p.root == "" || p.root == "/" }

// hold pins the open file fd as storage n. It was opened in the namespace that
// everybody sees.
func (p pins) hold(n, fd int) error {
	f, err := os.OpenFile(p.point(n), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	err = p.outside(func() error {
		tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		if err != nil {
			return err
		}
		defer unix.Close(tree)
		return unix.MoveMount(tree, "", unix.AT_FDCWD, p.point(n), unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		os.Remove(p.point(n))
		return fmt.Errorf("keep it by a mount on %s: %w: choose a place on another filesystem", p.point(n), err)
	}
	return nil
}

// place opens storage n as a place only. It fails with errGone if nothing is pinned.
func (p pins) place(n int) (*os.File, error) {
	path := filepath.Join(p.root, p.point(n))
	at, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(at), path)
	var st unix.Statx_t
	err = unix.Statx(at, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	if err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return f, nil
	}
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	return nil, errGone // the file below the mount that is not there
}

// source is the path in its filesystem by which what is pinned as storage n was
// known, as far as the kernel tells.
func (p pins) source(n int) string {
	proc := "/proc/self"
	if !p.own() {
		proc = filepath.Dir(p.root)
	}
	mounts, _ := os.ReadFile(filepath.Join(proc, "mountinfo"))
	for _, line := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && f[4] == p.point(n) {
			return f[3]
		}
	}
	return "an unknown place"
}

// release lets go of storage n, if it is pinned.
func (p pins) release(n int) error {
	unmount := func() error {
		for {
			// Whoever has it open keeps the file, not the mount.
			err := unix.Unmount(p.point(n), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	err := p.outside(unmount)
	if !p.own() {
		err = errors.Join(err, unmount())
	}
	// With the file go the copies that other namespaces may have.
	if e := os.Remove(p.point(n)); !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", p.point(n), err)
	}
	return nil
}

// forget lets go of the copies in this process's own namespace, which would keep
// the files when everybody else has let them go.
func (p pins) forget() {
	if p.own() {
		return
	}
	for _, n := range p.all() {
		_ = unix.Unmount(p.point(n), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
}

// all are the numbers of the storages that have a mount point.
func (p pins) all() (numbers []int) {
	entries, _ := os.ReadDir(p.dir)
	for _, e := range entries {
		if s, ok := strings.CutPrefix(e.Name(), pinPrefix); ok {
			if n, err := strconv.Atoi(s); err == nil && n >= 0 && s == strconv.Itoa(n) {
				numbers = append(numbers, n)
			}
		}
	}
	return numbers
}

// outside runs f in the mount namespace that everybody sees. A thread that has been
// there cannot come back, and so ends with f.
func (p pins) outside(f func() error) error {
	if p.own() {
		return f()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// What this thread is in, /proc/self tells everybody: another one does
			// it, while this one is kept.
			err := p.outside(f)
			runtime.UnlockOSThread()
			result <- err
			return
		}
		result <- func() error {
			ns, err := unix.Open(filepath.Join(filepath.Dir(p.root), "ns/mnt"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open the mount namespace of process 1: %w", err)
			}
			defer unix.Close(ns)
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("leave the process's directory: %w", err)
			}
			if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the mount namespace of process 1: %w", err)
			}
			return f()
		}()
	}()
	return <-result
}
