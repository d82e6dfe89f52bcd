package guest

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

const cgroups = "/sys/fs/cgroup"

// Cgroup is the directory of a new control group for processes that together have so
// many bytes of memory, 0 for no limit, and all of the swap space.
func Cgroup(t testing.TB, name string, limit int64) string {
	t.Helper()
	Need(t)
	dir := filepath.Join(cgroups, name)
	Write(t, filepath.Join(cgroups, "cgroup.subtree_control"), "+memory")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		WaitFor(t, "the end of the processes in "+dir, func() bool { return unix.Rmdir(dir) == nil })
	})
	if limit > 0 {
		Write(t, filepath.Join(dir, "memory.max"), strconv.FormatInt(limit, 10))
	}
	return dir
}

// Enter moves this process into a control group, until the test ends. What it starts is
// in there too.
func Enter(t testing.TB, dir string) {
	t.Helper()
	pid := strconv.Itoa(os.Getpid())
	Write(t, filepath.Join(dir, "cgroup.procs"), pid)
	t.Cleanup(func() { Write(t, filepath.Join(cgroups, "cgroup.procs"), pid) })
}

// Reclaim has the kernel take so many bytes of memory from the processes of a control
// group, or as much as it can.
func Reclaim(t testing.TB, dir string, bytes int64) {
	t.Helper()
	// Package os would wait for the day when what the kernel answers by EAGAIN, that this
	// was not all, is over.
	fd, err := unix.Open(filepath.Join(dir, "memory.reclaim"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, strconv.AppendInt(nil, bytes, 10)); err != nil && err != unix.EAGAIN && err != unix.EINTR {
		t.Fatal(err)
	}
}

// Write writes a value to a file of the kernel.
func Write(t testing.TB, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// Swap makes a disk or a file swap space, until the test ends or swapoff is called.
func Swap(t testing.TB, path string, bytes int64) (swapoff func()) {
	t.Helper()
	Run(t, "mkswap", path, strconv.FormatInt(bytes>>10, 10))
	Run(t, "swapon", "--priority", "1", path)
	on := true
	swapoff = func() {
		if on {
			on = false
			Run(t, "swapoff", path)
		}
	}
	t.Cleanup(swapoff)
	return swapoff
}

// StayInMemory locks the memory of this process, for the test.
func StayInMemory(t testing.TB) {
	t.Helper()
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munlockall() })
}
