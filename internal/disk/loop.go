package disk

import (
	"errors"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// backingName is the name of a loop device's file in sysfs, as the file was
// called when the device was set up or as it has been renamed since. Something
// else may have that name: in another mount namespace, behind another mount.
func backingName(attr string) string { return strings.TrimSuffix(attr, " (deleted)") }

// backingStatus is the status of the file below a loop device, according to the device
// itself. The file's filesystem may have to ask a server for it. If the device cannot be
// asked, backingStatus uses the name that sysfs has for the file.
func (h *Host) backingStatus(name, file string, end time.Time) (status, error) {
	node := "/dev/" + name
	get := h.loop
	if get == nil {
		get = loopStatus
	}
	type answer struct {
		st  status
		err error
	}
	a, err := ask(end, "file of "+node, func() answer {
		st, err := get(node)
		return answer{st, err}
	}, func(answer) {})
	switch {
	case err != nil:
		return status{}, &Error{ErrNoAnswer, node, "the disk or file server of its backing file " + file + " does not answer", ""}
	case a.err == nil:
		return a.st, nil
	}
	st, err := h.statPath(file)
	if errors.Is(err, unix.ENOENT) {
		// Unlinked: its directory is on the same filesystem.
		st, err = h.statPath(filepath.Dir(file))
	}
	return st, err
}

// loopStatus asks a loop device (LOOP_GET_STATUS64 in linux/loop.h).
func loopStatus(node string) (status, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return status{}, err
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return status{}, err
	}
	st := status{mode: unix.S_IFREG, dev: blockdev.NumOf(info.Device), ino: info.Inode, rdev: blockdev.NumOf(info.Rdevice)}
	if info.Rdevice != 0 {
		st.mode = unix.S_IFBLK
	}
	return st, nil
}

// mountedDisks are the names of the disks with a filesystem that is mounted, and may be
// where nobody sees it: the filesystems say so in sysfs.
func (h *Host) mountedDisks() []string {
	var out []string
	for _, pattern := range []string{"fs/ext4/*", "fs/xfs/*", "fs/f2fs/*", "fs/btrfs/*/devices/*"} {
		files, _ := filepath.Glob(filepath.Join(h.Sys, pattern))
		for _, f := range files {
			if name := filepath.Base(f); exists(filepath.Join(h.Sys, "class/block", name)) {
				out = append(out, name)
			}
		}
	}
	return out
}

// ToBeDetached says whether a disk is a loop device that is detached when nobody has it open
// any more: because it was set up so, or because somebody wanted it detached while it was open.
// Then a daemon that is killed loses it.
func (h *Host) ToBeDetached(d *Disk) bool {
	whole := d.sys
	if d.Parent != "" {
		whole = filepath.Dir(whole)
	}
	return readText(filepath.Join(whole, "loop/autoclear")) == "1"
}
