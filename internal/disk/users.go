package disk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// CheckUsable refuses a disk that nothing can be put over: empty, read-only or
// in use. The error is an *Error.
func (h *Host) CheckUsable(d *Disk) error {
	if d.Size == 0 {
		return &Error{ErrEmpty, d.Path, "has zero size", "put a medium in or set the device up first"}
	}
	if d.ReadOnly {
		return &Error{ErrReadOnly, d.Path, "read-only", "make it writable first: blockdev --setrw " + d.DisplayPath()}
	}
	return h.CheckFree(d)
}

// CheckFree refuses a disk that somebody uses, naming the user: a mount, a swap
// area, a device stacked on it (device-mapper, md, bcache, loop, btrfs). Its
// partitions count too. The error is an *Error with ErrInUse.
func (h *Host) CheckFree(d *Disk) error {
	mounts := h.Mounts()
	for _, dev := range append([]*Disk{d}, h.Partitions(d)...) {
		what, fix := h.findUser(dev, mounts)
		if what == "" {
			continue
		}
		if dev != d {
			what = "its partition " + dev.DisplayPath() + " is " + what
		}
		return &Error{ErrInUse, d.Path, what, fix}
	}
	return nil
}

// findUser names the first user found of the disk itself, and how to end the use;
// empty when there is none.
func (h *Host) findUser(d *Disk, mounts []Mount) (what, fix string) {
	if ms := h.mountsOf(d, mounts); len(ms) > 0 {
		return "mounted on " + ms[0].Point, "unmount it first"
	}
	for _, name := range dirNames(filepath.Join(d.sys, "holders")) {
		return h.describeHolder(name)
	}
	if h.isSwap(d) {
		return "used as swap space", "swapoff " + d.DisplayPath() + " first"
	}
	if fs, _ := filepath.Glob(filepath.Join(h.Sys, "fs/btrfs/*/devices", d.Name)); len(fs) > 0 {
		return "part of a mounted btrfs filesystem", "unmount it first"
	}
	if loop := h.loopOver(d); loop != "" {
		return "the backing device of /dev/" + loop, "losetup -d /dev/" + loop + " first"
	}
	return "", ""
}

func (h *Host) describeHolder(name string) (what, fix string) {
	dir := filepath.Join(h.Sys, "class/block", name)
	if dm := readText(filepath.Join(dir, "dm/name")); dm != "" {
		uuid := readText(filepath.Join(dir, "dm/uuid"))
		if public, ok := publicUUID(uuid); ok {
			dm, uuid = h.publicName(dm), public
		}
		kind, _, _ := strings.Cut(uuid, "-")
		switch kind {
		case "LVM":
			return "held by the logical volume " + dm, "name the logical volume /dev/mapper/" + dm + " instead, or deactivate its group"
		case "CRYPT":
			return "held by the encrypted volume " + dm, "close it first: cryptsetup close " + dm
		case "mpath":
			return "a path of the multipath device " + dm, "name /dev/mapper/" + dm + " instead"
		}
		return "held by the device-mapper device " + dm, "name /dev/mapper/" + dm + " instead, or remove it first"
	}
	if exists(filepath.Join(dir, "md")) {
		return "a member of the array /dev/" + name, "name the array instead, or stop it first"
	}
	return "held by " + name, "release it there first"
}

func (h *Host) isSwap(d *Disk) bool {
	f, err := os.Open(filepath.Join(h.Proc, "swaps"))
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 || fields[1] != "partition" {
			continue
		}
		path := Unescape(fields[0])
		if path == d.Node {
			return true
		}
		if n, err := h.number(path); err == nil && n == d.Num {
			return true
		}
	}
	return false
}

// loopOver is the loop device whose backing file is the disk. A loop device does not
// claim the disk, so an exclusive open would not notice it. If a loop device does not
// answer, its file lies on a dead file server, so it is not over a disk. Only if it was
// set up by the disk's own name it counts all the same.
func (h *Host) loopOver(d *Disk) string {
	files, _ := filepath.Glob(filepath.Join(h.Sys, "class/block/loop*/loop/backing_file"))
	end := h.deadline() // of all
	for _, f := range files {
		name := filepath.Base(filepath.Dir(filepath.Dir(f)))
		file := backingName(readText(f))
		st, err := h.backingStatus(name, file, end)
		if err == nil && st.mode == unix.S_IFBLK && st.rdev == d.Num || err != nil && file == d.Node {
			return name
		}
	}
	return ""
}

// OpenExclusive opens the disk for direct reading and writing, and claims it: nobody
// can mount it or put another device on it until the file is closed. If somebody has
// claimed the disk, the error is an *Error with ErrInUse.
func (h *Host) OpenExclusive(d *Disk) (*blockdev.OSFile, error) {
	f, err := blockdev.OpenExclusive(d.Node, d.DisplayPath(), unix.O_RDWR|unix.O_DIRECT)
	if err == nil {
		var st unix.Stat_t
		if err := unix.Fstat(f.Fd(), &st); err != nil || blockdev.NumOf(st.Rdev) != d.Num {
			f.Close()
			return nil, &Error{ErrNotFound, d.Path, fmt.Sprintf("%s is not device %s any more", d.Node, d.Num), ""}
		}
		return f, nil
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, h.explainBusy(d)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES):
		return nil, &Error{ErrReadOnly, d.Path, "cannot be opened for writing", ""}
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT):
		return nil, &Error{ErrNotFound, d.Path, "no such device", ""}
	}
	return nil, &Error{err, d.Path, "open " + d.Node + ": " + err.Error(), ""}
}

// explainBusy explains EBUSY as well as it can.
func (h *Host) explainBusy(d *Disk) error {
	if err := h.CheckFree(d); err != nil {
		return err
	}
	if d.Parent != "" {
		if n, err := ParseNum(h.sysText("class/block", d.Parent, "dev")); err == nil {
			if whole, err := h.byNumber(n); err == nil {
				if what, fix := h.findUser(whole, h.Mounts()); what != "" {
					return &Error{ErrInUse, d.Path, "its disk " + whole.DisplayPath() + " is " + what, fix}
				}
			}
		}
	}
	if ps := h.Openers(d.Num); len(ps) > 0 {
		return &Error{ErrInUse, d.Path, "opened exclusively by " + ps[0].String(), "end that process first"}
	}
	return &Error{ErrInUse, d.Path, unseen, "find the user first: lsblk, fuser -v " + d.DisplayPath()}
}

const unseen = "claimed by the kernel or another program"

// Unseen says whether a disk is in use and nobody is found who uses it. It may be I/O that
// a process has left under way.
func Unseen(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.What == unseen
}

// Process is a process that has something open.
type Process struct {
	PID  int
	Name string
}

func (p Process) String() string { return fmt.Sprintf("%s (process %d)", p.Name, p.PID) }

// Openers are the processes, other than this one and those named by number, that have the
// disk or one of its partitions open or mapped; none if there is no such disk. Openers does
// not see what only the kernel holds (mounts, stacked devices). Nor does it see what a
// process has that hangs in the middle of a change of its memory, because nobody can look
// at such a process.
func (h *Host) Openers(n Num, but ...int) []Process {
	d, err := h.byNumber(n)
	if err != nil {
		return nil
	}
	wanted := map[Num]string{d.Num: d.Name} // and the kernel's names
	for _, p := range h.Partitions(d) {
		wanted[p.Num] = p.Name
	}
	but = append(but, os.Getpid())
	if out := h.processes(but, "files", func(dir string) bool { return h.hasOpen(dir, wanted) }); len(out) > 0 {
		return out
	}
	return h.processes(but, "memory", func(dir string) bool { return h.hasMapped(dir, wanted) })
}

// processWait is how long processes that hang are waited for, all together.
const processWait = 5 * time.Second

// processes are those, but for some, of whose directory in /proc f, which looks at what they
// have, is true.
func (h *Host) processes(but []int, what string, f func(dir string) bool) (out []Process) {
	end := time.Now().Add(processWait)
	for _, name := range dirNames(h.Proc) {
		pid, err := strconv.Atoi(name)
		if err != nil || slices.Contains(but, pid) {
			continue
		}
		dir := filepath.Join(h.Proc, name)
		if has, err := ask(end, what+" of "+dir, func() bool { return f(dir) }, func(bool) {}); err == nil && has {
			out = append(out, Process{pid, readText(filepath.Join(dir, "comm"))})
		}
	}
	return out
}

// leadsToAny says whether the file that a link in /proc leads to is a wanted device.
func (h *Host) leadsToAny(link string, wanted map[Num]string) bool {
	st, err := h.statLink(link)
	return err == nil && st.mode == unix.S_IFBLK && wanted[st.rdev] != ""
}

// statLink is the status of what a link in /proc leads to, which need not have a
// path.
func (h *Host) statLink(link string) (status, error) {
	if h.stat != nil {
		to, err := os.Readlink(link)
		if err != nil {
			return status{}, err
		}
		return h.stat(to)
	}
	return statFile(unix.AT_FDCWD, link)
}

// hasOpen looks at the files of the process whose directory in /proc is dir.
func (h *Host) hasOpen(dir string, wanted map[Num]string) bool {
	var remote map[string]bool
	for _, fd := range dirNames(filepath.Join(dir, "fd")) {
		link := filepath.Join(dir, "fd", fd)
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, "/") {
			continue // a socket, say
		}
		if !strings.HasPrefix(to, "/dev/") {
			// A device has nodes elsewhere too: in a container, below a chroot. But asking a file of a dead server
			// for its status may hang, and what else this process has would not be seen.
			if remote == nil {
				remote = remoteMounts(dir)
			}
			if id := mountIDOf(filepath.Join(dir, "fdinfo", fd)); id == "" || remote[id] {
				continue
			}
		}
		if h.leadsToAny(link, wanted) {
			return true
		}
	}
	return false
}

// mountIDOf is the number of the mount that an open file lies on.
func mountIDOf(fdinfo string) string {
	for _, line := range strings.Split(readText(fdinfo), "\n") {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id)
		}
	}
	return ""
}

// remoteFS are the beginnings of the names of filesystems that have a server.
var remoteFS = []string{"nfs", "cifs", "smb", "ceph", "fuse", "9p", "virtiofs", "afs", "lustre", "orangefs", "coda"}

// remoteMounts are the numbers of a process's mounts that have a server.
func remoteMounts(dir string) map[string]bool {
	out := map[string]bool{}
	for _, line := range strings.Split(readText(filepath.Join(dir, "mountinfo")), "\n") {
		if m, ok := parseMount(line); ok && slices.ContainsFunc(remoteFS, func(s string) bool { return strings.HasPrefix(m.FSType, s) }) {
			out[strconv.FormatUint(m.ID, 10)] = true
		}
	}
	return out
}

// hasMapped looks for what a process has mapped and perhaps closed, by the names
// that the kernel gives the devices.
func (h *Host) hasMapped(dir string, wanted map[Num]string) bool {
	for _, line := range strings.Split(readText(filepath.Join(dir, "maps")), "\n") {
		// address perms offset dev inode /path
		at := strings.IndexByte(line, '/')
		if at < 0 {
			continue
		}
		name := filepath.Base(line[at:])
		for _, w := range wanted {
			if name != w {
				continue
			}
			var from, to uint64
			if n, _ := fmt.Sscanf(line, "%x-%x", &from, &to); n == 2 && h.leadsToAny(fmt.Sprintf("%s/map_files/%x-%x", dir, from, to), wanted) {
				return true
			}
		}
	}
	return false
}
