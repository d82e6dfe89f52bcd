package guest

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Mount mounts a disk on a new directory and returns it.
func Mount(t testing.TB, disk string, options ...string) string {
	t.Helper()
	dir, err := TryMount(t, disk, options...)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TryMount is Mount that may fail.
func TryMount(t testing.TB, disk string, options ...string) (string, error) {
	t.Helper()
	Need(t)
	dir := t.TempDir()
	args := []string{disk, dir}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	if _, err := Try("mount", args...); err != nil {
		return "", err
	}
	t.Cleanup(func() {
		if mounted(dir) {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir, nil
}

func mounted(dir string) bool {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	return bytes.Contains(b, []byte(" "+dir+" "))
}

// Unmount unmounts a directory that nobody may be using any more.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	Run(t, "umount", dir)
}

// SmallFS is a tmpfs of size bytes.
func SmallFS(t testing.TB, size int64) string {
	t.Helper()
	Need(t)
	dir := t.TempDir()
	Run(t, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", size), "small", dir)
	t.Cleanup(func() { Run(t, "umount", dir) })
	return dir
}

// Filesystem is one under test: how to make, check and mount a second one of the
// same content.
type Filesystem struct {
	Name    string
	mkfs    []string
	check   []string
	Beside  []string // mount options for an image beside its original
	Minimum int64    // bytes
}

// The filesystems under test.
var (
	// All of it at once: the kernel does not write inode tables when it finds time, into the storage of a snapshot.
	Ext4 = Filesystem{Name: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"}, check: []string{"e2fsck", "-f", "-n"}, Minimum: 64 << 20}
	// As small as it can be, which its maker does not support: its log alone would have 64 MiB.
	XFS   = Filesystem{Name: "xfs", mkfs: []string{"mkfs.xfs", "-q", "-f", "--unsupported", "-l", "size=8m"}, check: []string{"xfs_repair", "-n"}, Beside: []string{"nouuid"}, Minimum: 48 << 20}
	Btrfs = Filesystem{Name: "btrfs", mkfs: []string{"mkfs.btrfs", "-q", "-f"}, check: []string{"btrfs", "check"}, Minimum: 128 << 20}
)

// Make makes the filesystem on disk.
func (k Filesystem) Make(t testing.TB, disk string) {
	t.Helper()
	Run(t, k.mkfs[0], append(append([]string{}, k.mkfs[1:]...), disk)...)
}

// Check fails the test unless the filesystem on disk, not mounted, is sound and
// needs no repair.
func (k Filesystem) Check(t testing.TB, disk string) {
	t.Helper()
	if _, err := Try(k.check[0], append(append([]string{}, k.check[1:]...), disk)...); err != nil {
		t.Errorf("%s on %s is not clean: %v", k.Name, disk, err)
	}
}
