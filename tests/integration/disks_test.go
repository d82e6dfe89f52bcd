package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Disks to destroy. Each goes away with its test; that fails if somebody still
// holds it.

// modprobe loads a module with parameters, anew if it is loaded.
func modprobe(t testing.TB, module string, params ...string) {
	t.Helper()
	needVM(t)
	unload(t, module)
	run(t, "modprobe", append([]string{module}, params...)...)
	t.Cleanup(func() { unload(t, module) })
}

func unload(t testing.TB, module string) {
	t.Helper()
	waitFor(t, "the last user of "+module, func() bool {
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			return true
		}
		// Whoever has just looked at a disk may still be at it.
		_, err := try("modprobe", "-r", module)
		return err == nil
	})
}

// ramDisks are n RAM disks of size bytes each, a multiple of 1 KiB, full of
// zeroes.
func ramDisks(t testing.TB, n int, size int64) []string {
	t.Helper()
	modprobe(t, "brd", fmt.Sprintf("rd_nr=%d", n), fmt.Sprintf("rd_size=%d", size>>10))
	var disks []string
	for i := range n {
		disks = append(disks, fmt.Sprintf("/dev/ram%d", i))
	}
	return disks
}

// loopDisk is a loop device over a sparse file in memory: any multiple of the
// logical block size, with discard.
func loopDisk(t testing.TB, size int64, block int) string {
	t.Helper()
	needVM(t)
	return loopOver(t, sparseFile(t, "/dev/shm", size), block)
}

func sparseFile(t testing.TB, dir string, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(dir, "disk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(f.Name()) })
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func loopOver(t testing.TB, file string, block int) string {
	t.Helper()
	run(t, "modprobe", "loop")
	dev := strings.TrimSpace(run(t, "losetup", "-f", "--show", "-b", fmt.Sprint(block), file))
	t.Cleanup(func() {
		run(t, "losetup", "-d", dev)
		// Detached when the last user is gone: that is to be now.
		waitFor(t, "the last user of "+dev, func() bool {
			_, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/loop")
			return err != nil
		})
	})
	return dev
}

// scsiDisk is a scsi_debug disk with unmap, of whole MiB.
func scsiDisk(t testing.TB, mib, block int) string {
	t.Helper()
	run(t, "modprobe", "sd_mod")
	modprobe(t, "scsi_debug", fmt.Sprintf("dev_size_mb=%d", mib), fmt.Sprintf("sector_size=%d", block),
		"delay=0", "lbpu=1", "lbpws=1", "physblk_exp=0")
	var disk string
	waitFor(t, "the disk of scsi_debug", func() bool {
		disks, _ := filepath.Glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/*")
		if len(disks) == 0 {
			return false
		}
		disk = "/dev/" + filepath.Base(disks[0])
		_, err := os.Stat(disk) // which comes later
		return err == nil
	})
	return disk
}

// dmDisk is a device-mapper device. Its table may name disks.
func dmDisk(t testing.TB, name string, table ...string) string {
	t.Helper()
	needVM(t)
	run(t, "dmsetup", "create", name, "--table", strings.Join(table, "\n"))
	t.Cleanup(func() { run(t, "dmsetup", "remove", "--retry", name) })
	return "/dev/mapper/" + name
}

// reload gives a dmDisk another table. What is under way on the old one ends
// first.
func reload(t testing.TB, name string, table ...string) {
	t.Helper()
	run(t, "dmsetup", "load", name, "--table", strings.Join(table, "\n"))
	run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", name)
	run(t, "dmsetup", "resume", name)
}

// linear is a table that maps all of a disk, or what is left of it after some
// sectors.
func linear(t testing.TB, disk string) string {
	t.Helper()
	return fmt.Sprintf("0 %d linear %s 0", sizeOf(t, disk)>>9, disk)
}

// sizeOf is the size of a block device in bytes.
func sizeOf(t testing.TB, disk string) int64 {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// mount mounts a disk on a new directory and returns it.
func mount(t testing.TB, disk string, options ...string) string {
	t.Helper()
	dir, err := tryMount(t, disk, options...)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func tryMount(t testing.TB, disk string, options ...string) (string, error) {
	t.Helper()
	needVM(t)
	dir := t.TempDir()
	args := []string{disk, dir}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	if _, err := try("mount", args...); err != nil {
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

func umount(t testing.TB, dir string) {
	t.Helper()
	run(t, "umount", dir)
}

// smallFS is a tmpfs of size bytes.
func smallFS(t testing.TB, size int64) string {
	t.Helper()
	needVM(t)
	dir := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", size), "small", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// Filesystems under test: how to make, check and mount a second one of the same
// content.
type fsKind struct {
	name    string
	mkfs    []string
	check   []string
	beside  []string // mount options for an image beside its original
	minimum int64    // bytes
}

var (
	// All of it at once: the kernel does not write inode tables when it finds time, into the storage of a snapshot.
	ext4FS  = fsKind{name: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"}, check: []string{"e2fsck", "-f", "-n"}, minimum: 64 << 20}
	xfsFS   = fsKind{name: "xfs", mkfs: []string{"mkfs.xfs", "-q", "-f"}, check: []string{"xfs_repair", "-n"}, beside: []string{"nouuid"}, minimum: 304 << 20}
	btrfsFS = fsKind{name: "btrfs", mkfs: []string{"mkfs.btrfs", "-q", "-f"}, check: []string{"btrfs", "check"}, minimum: 128 << 20}
)

func (k fsKind) make(t testing.TB, disk string) {
	t.Helper()
	run(t, k.mkfs[0], append(append([]string{}, k.mkfs[1:]...), disk)...)
}

// clean fails the test unless the filesystem on disk, not mounted, is sound and
// needs no repair.
func (k fsKind) clean(t testing.TB, disk string) {
	t.Helper()
	if _, err := try(k.check[0], append(append([]string{}, k.check[1:]...), disk)...); err != nil {
		t.Errorf("%s on %s is not clean: %v", k.name, disk, err)
	}
}

// ioctlPointer is an ioctl that takes two numbers in memory.
func ioctlPointer(fd int, req uint, r *[2]uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(r)))
	if errno != 0 {
		return errno
	}
	return nil
}
