package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// QueueLimit is what sysfs says of a disk's queue under a name.
func QueueLimit(t testing.TB, disk, name string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/queue/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// IoctlRange is BLKDISCARD and its like.
func IoctlRange(fd int, req uint, from, n int64) error {
	r := [2]uint64{uint64(from), uint64(n)}
	return ioctlPointer(fd, req, &r)
}

// modprobe loads a module with parameters, anew if it is loaded.
func modprobe(t testing.TB, module string, params ...string) {
	t.Helper()
	Need(t)
	Unload(t, module)
	Run(t, "modprobe", append([]string{module}, params...)...)
	t.Cleanup(func() { Unload(t, module) })
}

// Unload unloads a module once nobody uses it.
func Unload(t testing.TB, module string) {
	t.Helper()
	WaitFor(t, "the last user of "+module, func() bool {
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			return true
		}
		// Whoever has just looked at a disk may still be at it.
		_, err := Try("modprobe", "-r", module)
		return err == nil
	})
}

// RAMDisks are n RAM disks of size bytes each, a multiple of 1 KiB, full of
// zeroes.
func RAMDisks(t testing.TB, n int, size int64) []string {
	t.Helper()
	modprobe(t, "brd", fmt.Sprintf("rd_nr=%d", n), fmt.Sprintf("rd_size=%d", size>>10))
	var disks []string
	for i := range n {
		disks = append(disks, fmt.Sprintf("/dev/ram%d", i))
	}
	return disks
}

// LoopDisk is a loop device over a sparse file in memory: any multiple of the
// logical block size, with discard.
func LoopDisk(t testing.TB, size int64, block int) string {
	t.Helper()
	Need(t)
	return LoopOver(t, SparseFile(t, "/dev/shm", size), block)
}

// SparseFile is a new file of size bytes in dir.
func SparseFile(t testing.TB, dir string, size int64) string {
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

// LoopOver is a loop device over a file, with logical blocks of block bytes.
func LoopOver(t testing.TB, file string, block int) string {
	t.Helper()
	Run(t, "modprobe", "loop")
	dev := strings.TrimSpace(Run(t, "losetup", "-f", "--show", "-b", fmt.Sprint(block), file))
	t.Cleanup(func() {
		Run(t, "losetup", "-d", dev)
		// Detached when the last user is gone: that is to be now.
		WaitFor(t, "the last user of "+dev, func() bool {
			_, err := os.Stat("/sys/block/" + filepath.Base(dev) + "/loop")
			return err != nil
		})
	})
	return dev
}

// SCSIDisk is a scsi_debug disk with unmap, of whole MiB.
func SCSIDisk(t testing.TB, mib, block int) string {
	t.Helper()
	Run(t, "modprobe", "sd_mod")
	modprobe(t, "scsi_debug", fmt.Sprintf("dev_size_mb=%d", mib), fmt.Sprintf("sector_size=%d", block),
		"delay=0", "lbpu=1", "lbpws=1", "physblk_exp=0")
	var disk string
	WaitFor(t, "the disk of scsi_debug", func() bool {
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

// DMDisk is a device-mapper device. Its table may name disks.
func DMDisk(t testing.TB, name string, table ...string) string {
	t.Helper()
	Need(t)
	Run(t, "dmsetup", "create", name, "--table", strings.Join(table, "\n"))
	t.Cleanup(func() { Run(t, "dmsetup", "remove", "--retry", name) })
	return "/dev/mapper/" + name
}

// ReloadDM gives a device of DMDisk another table. What is under way on the old one ends
// first.
func ReloadDM(t testing.TB, name string, table ...string) {
	t.Helper()
	Run(t, "dmsetup", "load", name, "--table", strings.Join(table, "\n"))
	Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", name)
	Run(t, "dmsetup", "resume", name)
}

// LinearTable is a table that maps all of a disk, or what is left of it after some
// sectors.
func LinearTable(t testing.TB, disk string) string {
	t.Helper()
	return fmt.Sprintf("0 %d linear %s 0", SizeOf(t, disk)>>9, disk)
}

// SizeOf is the size of a block device in bytes.
func SizeOf(t testing.TB, disk string) int64 {
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

// ioctlPointer is an ioctl that takes two numbers in memory.
func ioctlPointer(fd int, req uint, r *[2]uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(r)))
	if errno != 0 {
		return errno
	}
	return nil
}
