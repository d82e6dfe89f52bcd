package disk

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// LiesOn says whether the bytes of path (a block device, a file or a directory)
// finally lie on the device target: through partitions, device-mapper, md,
// bcache, loop devices and the filesystems that their files are on. A partition
// and its whole disk count as the same.
//
// below tells what lies under a device that sysfs cannot look through (our own
// filters and images); it may be nil. Where the stack cannot be followed to its
// end, the error is an *Error with ErrUnknown.
func (h *Host) LiesOn(path string, target Num, below func(Num) []Num) (bool, error) {
	return h.walkTo(target, below).path(path)
}

func (h *Host) walkTo(target Num, below func(Num) []Num) *walk {
	w := &walk{Host: h, target: target, targetWhole: target, below: below, seen: map[Num]bool{}}
	if d, err := h.byNumber(target); err == nil {
		w.targetWhole = h.wholeOf(d)
	}
	return w
}

// MountsOver are the mounts of filesystems that lie on the device target, one
// mount for each filesystem; see LiesOn for below. Filesystems that cannot be
// followed to a disk are left out. The last one mounted comes first, so that a
// filesystem in a file comes before the one that the file is on: frozen in this
// order, none has to write to another that stands still.
func (h *Host) MountsOver(target Num, below func(Num) []Num) []Mount {
	var out []Mount
	mounts := h.Mounts()
	seen := map[Num]bool{}
	for _, m := range mounts {
		if seen[m.Num] || local[m.FSType] || m.FSType == "overlay" {
			continue
		}
		w := h.walkTo(target, below)
		w.mounts = mounts
		on, err := false, error(nil)
		if m.Num.Major != 0 {
			on, err = w.device(m.Num)
		} else {
			on, err = w.onSources(&m)
		}
		if on && err == nil {
			seen[m.Num] = true
			out = append(out, m)
		}
	}
	slices.Reverse(out)
	return out
}

type walk struct {
	*Host
	target      Num
	targetWhole Num // the whole disk, when target is a partition; else target
	below       func(Num) []Num
	seen        map[Num]bool
	mounts      []Mount
}

func (h *Host) wholeOf(d *Disk) Num {
	if d.Parent != "" {
		if n, err := ParseNum(h.sysText("class/block", d.Parent, "dev")); err == nil {
			return n
		}
	}
	return d.Num
}

func (w *walk) path(path string) (bool, error) {
	st, err := w.statPath(path)
	if errors.Is(err, unix.ENOENT) {
		// A backing file that was unlinked: its directory is on the same
		// filesystem.
		path = filepath.Dir(path)
		st, err = w.statPath(path)
	}
	if err != nil {
		return false, &Error{ErrUnknown, path, err.Error(), ""}
	}
	return w.status(path, st)
}

// status is path for what has been looked at.
func (w *walk) status(path string, st status) (bool, error) {
	if st.mode == unix.S_IFBLK {
		return w.device(st.rdev)
	}
	return w.filesystem(path, st)
}

// local are filesystems without a disk of this machine below them.
var local = map[string]bool{
	"tmpfs": true, "ramfs": true, "devtmpfs": true, "hugetlbfs": true, "proc": true, "sysfs": true,
	"nfs": true, "nfs4": true, "cifs": true, "smb3": true, "9p": true, "virtiofs": true,
	"ceph": true, "glusterfs": true, "lustre": true, "afs": true, "vboxsf": true, "rootfs": true,
}

func (w *walk) filesystem(path string, st status) (bool, error) {
	if st.dev.Major != 0 {
		return w.device(st.dev)
	}
	// An anonymous number says nothing (btrfs gives every subvolume one of its
	// own): the mount tells the filesystem and its source.
	m := w.mount(st.mount)
	switch {
	case m == nil:
		return false, &Error{ErrUnknown, path, "lies on a filesystem that no mount shows", ""}
	case local[m.FSType]:
		return false, nil
	case m.FSType == "overlay":
		for _, o := range strings.Split(m.Super, ",") {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok && dir != path {
				return w.path(unescape(dir))
			}
		}
		return false, &Error{ErrUnknown, path, "lies on an overlay without an upper directory", ""}
	}
	if len(sources(*m)) == 0 {
		return false, &Error{ErrUnknown, path, "lies on " + m.FSType + " (" + m.Source + "), whose disks are not known", "choose another place"}
	}
	return w.onSources(m)
}

// onSources follows the disks of a filesystem with an anonymous number.
func (w *walk) onSources(m *Mount) (bool, error) {
	for _, src := range sources(*m) {
		if on, err := w.path(src); on || err != nil {
			return on, err
		}
	}
	if m.FSType == "btrfs" {
		// Over several devices, it names one of them as its source.
		return w.btrfs(m)
	}
	return false, nil
}

func (w *walk) btrfs(m *Mount) (bool, error) {
	for _, src := range sources(*m) {
		n, err := w.number(src)
		if err != nil {
			continue
		}
		d, err := w.byNumber(n)
		if err != nil {
			continue
		}
		dirs, _ := filepath.Glob(filepath.Join(w.Sys, "fs/btrfs/*/devices", d.Name))
		for _, dir := range dirs {
			for _, name := range names(filepath.Dir(dir)) {
				if on, err := w.byName(name); on || err != nil {
					return on, err
				}
			}
		}
	}
	return false, nil
}

func (w *walk) mount(id uint64) *Mount {
	if w.mounts == nil {
		w.mounts = w.Mounts()
	}
	for i := range w.mounts {
		if w.mounts[i].ID == id {
			return &w.mounts[i]
		}
	}
	return nil
}

// byName follows one device by its name in sysfs.
func (w *walk) byName(name string) (bool, error) {
	n, err := ParseNum(w.sysText("class/block", name, "dev"))
	if err != nil {
		return false, &Error{ErrUnknown, name, "no such device in sysfs", ""}
	}
	return w.device(n)
}

func (w *walk) device(n Num) (bool, error) {
	if n == w.target || n == w.targetWhole {
		return true, nil
	}
	if w.seen[n] {
		return false, nil
	}
	w.seen[n] = true
	d, err := w.byNumber(n)
	if err != nil {
		return false, &Error{ErrUnknown, n.String(), "no such device in sysfs", ""}
	}
	if w.below != nil {
		for _, b := range w.below(n) {
			if on, err := w.device(b); on || err != nil {
				return on, err
			}
		}
	}
	if d.Parent != "" {
		// Two partitions of one disk do not overlap, so that the whole disk
		// matters only as the target itself and for what lies below it.
		whole := w.wholeOf(d)
		if whole == w.target {
			return true, nil
		}
		if whole != w.targetWhole {
			return w.device(whole)
		}
		return false, nil
	}
	for _, s := range names(filepath.Join(d.sys, "slaves")) {
		if on, err := w.byName(s); on || err != nil {
			return on, err
		}
	}
	if file := text(filepath.Join(d.sys, "loop/backing_file")); file != "" {
		return w.path(strings.TrimSuffix(unescape(file), " (deleted)"))
	}
	return false, nil
}
