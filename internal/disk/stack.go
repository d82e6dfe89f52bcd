package disk

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// liesOn is LiesOn for a path of which the status is known.
func (h *Host) liesOn(path string, st status, target Num, lower func(Num) []Num) (bool, error) {
	w := h.walkTo(target, lower)
	w.weighDoubts = true
	if w.file(path, st) {
		return true, nil
	}
	return w.likely, w.doubt
}

func (h *Host) walkTo(target Num, lower func(Num) []Num) *walk {
	w := &walk{Host: h, target: target, targetWhole: target, lower: lower, seen: map[Num]bool{}}
	if d, err := h.byNumber(target); err == nil {
		w.targetWhole = h.wholeOf(d)
	}
	return w
}

// MountsOver are the mounts of filesystems that lie on the device target, one
// mount for each filesystem; see LiesOn for lower. Filesystems that cannot be
// followed to a disk are left out. The last one mounted comes first, so that a
// filesystem in a file comes before the one that the file is on: frozen in this
// order, none has to write to another that stands still.
func (h *Host) MountsOver(target Num, lower func(Num) []Num) []Mount {
	var out []Mount
	mounts := h.Mounts()
	seen := map[Num]bool{}
	for _, m := range mounts {
		if seen[m.Num] || noLocalDisk[m.FSType] || m.FSType == "overlay" {
			continue
		}
		w := h.walkTo(target, lower)
		w.mounts = mounts
		if m.Num.Major != 0 && w.device(m.Num) || m.Num.Major == 0 && w.onSources(&m) {
			seen[m.Num] = true
			out = append(out, m)
		}
	}
	slices.Reverse(out)
	return out
}

// walk is one search downwards. Its methods say whether they came upon the target. If
// they could not look somewhere, they leave a doubt.
type walk struct {
	*Host
	target      Num
	targetWhole Num // the whole disk, when target is a partition; else target
	lower       func(Num) []Num
	seen        map[Num]bool
	mounts      []Mount
	weighDoubts bool  // doubts are weighed
	doubt       error // the first, or one with ErrNoAnswer
	likely      bool  // the doubt is whether it lies on the target, and it may well
}

// recordDoubt notes that a place could not be looked at.
func (w *walk) recordDoubt(path string, err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{ErrUnknown, path, err.Error(), ""}
	}
	if w.doubt == nil || errors.Is(e, ErrNoAnswer) {
		w.doubt = e
	}
	return false
}

func (h *Host) wholeOf(d *Disk) Num {
	if d.Parent != "" {
		if n, err := ParseNum(h.sysText("class/block", d.Parent, "dev")); err == nil {
			return n
		}
	}
	return d.Num
}

func (w *walk) path(path string) bool {
	st, err := w.statPath(path)
	if err != nil {
		return w.recordDoubt(path, err)
	}
	return w.file(path, st)
}

func (w *walk) file(path string, st status) bool {
	if st.mode == unix.S_IFBLK {
		return w.device(st.rdev)
	}
	return w.filesystem(path, st)
}

// noLocalDisk are filesystems without a disk of this machine below them.
var noLocalDisk = map[string]bool{
	"tmpfs": true, "ramfs": true, "devtmpfs": true, "hugetlbfs": true, "proc": true, "sysfs": true,
	"nfs": true, "nfs4": true, "cifs": true, "smb3": true, "9p": true, "virtiofs": true,
	"ceph": true, "glusterfs": true, "lustre": true, "afs": true, "vboxsf": true, "rootfs": true,
}

func (w *walk) filesystem(path string, st status) bool {
	if st.dev.Major != 0 {
		return w.device(st.dev)
	}
	// An anonymous number says nothing (btrfs gives every subvolume one of its
	// own): the mount tells the filesystem and its source.
	m := w.mountOf(path, st)
	switch {
	case m == nil:
		return w.unknownFilesystem(nil, &Error{ErrUnknown, path, "lies on a filesystem that no mount shows", "choose another place"})
	case noLocalDisk[m.FSType]:
		return false
	case m.FSType == "overlay":
		return w.overlay(m)
	case len(sources(*m)) == 0:
		return w.recordDoubt(path, &Error{ErrUnknown, path, "lies on " + m.FSType + " (" + m.Source + "), whose disks are not known", "choose another place"})
	}
	return w.onSources(m)
}

// onSources follows the disks of a filesystem with an anonymous number.
func (w *walk) onSources(m *Mount) bool {
	for _, src := range sources(*m) {
		if w.path(src) {
			return true
		}
	}
	// Over several devices, it names one of them as its source.
	return m.FSType == "btrfs" && w.btrfs(m)
}

func (w *walk) btrfs(m *Mount) bool {
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
			if slices.ContainsFunc(dirNames(filepath.Dir(dir)), w.byName) {
				return true
			}
		}
	}
	return false
}

// overlay follows an overlay to the directory that is written to. It was named when
// the overlay was mounted, perhaps before the root was what it is now: something
// else may have that name, or nothing.
func (w *walk) overlay(m *Mount) bool {
	if w.seen[m.Num] {
		return false
	}
	w.seen[m.Num] = true
	size, err := w.capacityOn(*m)
	for _, o := range strings.Split(m.Super, ",") {
		dir, ok := strings.CutPrefix(o, "upperdir=")
		if !ok {
			continue
		}
		dir = Unescape(dir)
		for _, root := range []string{w.Root, w.rootOf(*m)} {
			h := *w.Host
			h.Root = root
			st, e := h.statPath(dir)
			if e != nil || st.dev == m.Num {
				continue
			}
			if its, e := h.capacityAt(dir); e == nil && err == nil && its == size {
				return w.filesystem(dir, st)
			}
		}
		known := &size
		if err != nil {
			known = nil
		}
		return w.unknownFilesystem(known, &Error{ErrUnknown, m.Point, "lies on an overlay whose upper directory " + dir + " cannot be seen", "choose another place"})
	}
	return w.recordDoubt(m.Point, &Error{ErrUnknown, m.Point, "lies on an overlay without an upper directory", "choose another place"})
}

// unknownFilesystem is for what lies on a filesystem that is not to be found. It may
// yet be one on the target. That is likely if such a one is mounted, and size, where
// it is known, does not tell them apart.
func (w *walk) unknownFilesystem(size *capacity, err *Error) bool {
	w.recordDoubt(err.Path, err)
	if !w.weighDoubts {
		return false
	}
	onTarget := func(name string) bool {
		sub := w.walkTo(w.target, w.lower)
		sub.mounts = w.mounts
		return sub.byName(name)
	}
	disks := w.mountedDisks()
	for _, m := range w.mounts {
		if d, err := w.byNumber(m.Num); err == nil && m.Num.Major != 0 {
			disks = append(disks, d.Name)
		}
	}
	slices.Sort(disks)
	for _, name := range slices.Compact(disks) {
		if onTarget(name) && !w.differs(name, size) {
			w.likely = true
			w.doubt = &Error{err.Kind, err.Path, err.What + ", and that may be the filesystem on /dev/" + name, err.Fix}
		}
	}
	return false
}

// differs says whether the filesystem on a disk is known to have another size.
func (w *walk) differs(name string, size *capacity) bool {
	n, err := ParseNum(w.sysText("class/block", name, "dev"))
	if err != nil || size == nil {
		return false
	}
	d, err := w.byNumber(n)
	if err != nil {
		return false
	}
	for _, m := range w.mountsOf(d, w.mounts) {
		if c, err := w.capacityOn(m); err == nil {
			return c != *size
		}
	}
	return false
}

// mountOf is the mount of a file with an anonymous number: the one that the path
// leads through, or any of a filesystem with that number. For one without a number
// that mounts show, path is its name in one of the namespaces.
func (w *walk) mountOf(path string, st status) *Mount {
	if w.mounts == nil {
		w.mounts = w.Mounts()
	}
	find := func(f func(m Mount) bool) *Mount {
		if i := slices.IndexFunc(w.mounts, f); i >= 0 {
			return &w.mounts[i]
		}
		return nil
	}
	if st.mount != 0 {
		return find(func(m Mount) bool { return m.ID == st.mount })
	}
	if m := find(func(m Mount) bool { return m.Num == st.dev }); m != nil {
		return m
	}
	roots := []string{w.Root}
	for _, m := range w.mounts {
		if root := w.rootOf(m); !slices.Contains(roots, root) {
			roots = append(roots, root)
		}
	}
	for _, root := range roots {
		h := *w.Host
		h.Root = root
		if seen, err := h.statPath(path); err == nil && seen.dev == st.dev && seen.ino == st.ino {
			return find(func(m Mount) bool { return m.ID == seen.mount })
		}
	}
	return nil
}

// byName follows one device by its name in sysfs.
func (w *walk) byName(name string) bool {
	n, err := ParseNum(w.sysText("class/block", name, "dev"))
	if err != nil {
		return w.recordDoubt(name, &Error{ErrUnknown, name, "no such device in sysfs", ""})
	}
	return w.device(n)
}

func (w *walk) device(n Num) bool {
	if n == w.target || n == w.targetWhole {
		return true
	}
	if w.seen[n] {
		return false
	}
	w.seen[n] = true
	d, err := w.byNumber(n)
	if err != nil {
		return w.recordDoubt(n.String(), &Error{ErrUnknown, n.String(), "no such device in sysfs", ""})
	}
	if w.lower != nil && slices.ContainsFunc(w.lower(n), w.device) {
		return true
	}
	if d.Parent != "" {
		// Two partitions of one disk do not overlap, so that the whole disk
		// matters only as the target itself and for what lies below it.
		whole := w.wholeOf(d)
		return whole == w.target || whole != w.targetWhole && w.device(whole)
	}
	if slices.ContainsFunc(dirNames(filepath.Join(d.sys, "slaves")), w.byName) {
		return true
	}
	if file := backingName(readText(filepath.Join(d.sys, "loop/backing_file"))); file != "" {
		st, err := w.backingStatus(d.Name, file, w.deadline())
		if err != nil {
			return w.recordDoubt(file, err)
		}
		return w.file(file, st)
	}
	return false
}
