package disk

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Mount is one mount in one mount namespace.
type Mount struct {
	ID     uint64
	Num    Num    // of the mounted device; major 0 for filesystems without one
	Point  string // where, as the namespace's processes see it
	FSType string
	Source string // what mount(8) was given: /dev/vdb, tmpfs, host:/export
	// Super are the options of the filesystem itself.
	Super string
	// PID is a process that sees the mount: Point can be reached through
	// /proc/PID/root.
	PID int
}

// Mounts are the mounts of all mount namespaces that have a process in them,
// those of process 1 first.
func (h *Host) Mounts() []Mount {
	var out []Mount
	seen := map[string]bool{}
	pids := []int{1}
	for _, name := range dirNames(h.Proc) {
		if pid, err := strconv.Atoi(name); err == nil && pid != 1 {
			pids = append(pids, pid)
		}
	}
	for _, pid := range pids {
		dir := filepath.Join(h.Proc, strconv.Itoa(pid))
		ns, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || seen[ns] {
			continue
		}
		f, err := os.Open(filepath.Join(dir, "mountinfo"))
		if err != nil {
			continue
		}
		seen[ns] = true
		for s := bufio.NewScanner(f); s.Scan(); {
			if m, ok := parseMount(s.Text()); ok {
				m.PID = pid
				out = append(out, m)
			}
		}
		f.Close()
	}
	return out
}

// rootOf is the directory from which the mount's point can be reached.
func (h *Host) rootOf(m Mount) string {
	if m.PID == 1 && h.Root == "/" {
		return h.Root
	}
	return filepath.Join(h.Proc, strconv.Itoa(m.PID), "root")
}

// OpenMount opens the root of a mounted filesystem for reading. It fails if another
// mount hides it, because the path leads to something else then.
func (h *Host) OpenMount(m Mount) (*os.File, error) {
	at := *h
	at.Root = h.rootOf(m)
	f, err := at.Open(m.Point, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	st, err := statFile(int(f.Fd()), "")
	if err == nil && st.mount != m.ID && st.dev != m.Num {
		err = &Error{ErrUnknown, m.Point, "another filesystem is mounted over it", "unmount that first"}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// capacity tells filesystems apart that have no other mark.
type capacity struct{ block, blocks uint64 }

// capacityAt is that of the filesystem that path lies on.
func (h *Host) capacityAt(path string) (capacity, error) {
	if h.capacity != nil {
		return h.capacity(path)
	}
	f, err := h.Open(path, unix.O_PATH, 0)
	if err != nil {
		return capacity{}, err
	}
	return capacityOf(f, h.deadline())
}

func (h *Host) capacityOn(m Mount) (capacity, error) {
	if h.capacity != nil {
		return h.capacity(m.Point)
	}
	f, err := h.OpenMount(m)
	if err != nil {
		return capacity{}, err
	}
	return capacityOf(f, h.deadline())
}

// capacityOf closes the file.
func capacityOf(f *os.File, end time.Time) (capacity, error) {
	type answer struct {
		c   capacity
		err error
	}
	a, err := ask(end, "capacity at "+f.Name(), func() answer {
		defer f.Close()
		var st unix.Statfs_t
		err := unix.Fstatfs(int(f.Fd()), &st)
		return answer{capacity{uint64(st.Bsize), st.Blocks}, err}
	}, func(answer) {})
	if err != nil {
		return capacity{}, err
	}
	return a.c, a.err
}

// parseMount reads a line of mountinfo (proc_pid_mountinfo(5)):
//
//	36 35 98:0 /root /point opts tag:1 - type source super
func parseMount(line string) (Mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	// At blanks alone: the kernel escapes no other spaces that Unicode knows.
	l, r := strings.Split(left, " "), strings.Split(right, " ")
	if !ok || len(l) < 6 || len(r) < 2 || l[4] == "" || r[0] == "" {
		return Mount{}, false
	}
	id, err1 := strconv.ParseUint(l[0], 10, 64)
	num, err2 := ParseNum(l[2])
	if err1 != nil || err2 != nil {
		return Mount{}, false
	}
	m := Mount{ID: id, Num: num, Point: Unescape(l[4]), FSType: r[0], Source: Unescape(r[1])}
	if len(r) > 2 {
		m.Super = r[2]
	}
	return m, true
}

// MountPoint is the mount point in a line of mountinfo.
func MountPoint(line string) (string, bool) {
	m, ok := parseMount(line)
	return m.Point, ok
}

// Unescape undoes the kernel's octal escapes for blanks and backslashes in a table of /proc.
func Unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountsOf are those of all mounts that are of the disk itself, not of its
// partitions.
func (h *Host) mountsOf(d *Disk, all []Mount) []Mount {
	var out []Mount
	for _, m := range all {
		if m.Num == d.Num || m.Num.Major == 0 && h.sourceIs(m, d) {
			out = append(out, m)
		}
	}
	return out
}

// sourceIs says whether a filesystem with an anonymous device number (btrfs,
// bcachefs) names the disk as its source.
func (h *Host) sourceIs(m Mount, d *Disk) bool {
	for _, src := range sources(m) {
		if src == d.Node {
			return true
		}
		if n, err := h.number(src); err == nil && n == d.Num {
			return true
		}
	}
	return false
}

// sources are the device paths in a mount's source.
func sources(m Mount) []string {
	var out []string
	for _, s := range strings.Split(m.Source, ":") {
		if strings.HasPrefix(s, "/dev/") {
			out = append(out, s)
		}
	}
	return out
}

// ReadsMounts says whether the mounts of process 1 can be read.
func (h *Host) ReadsMounts() bool {
	ms := h.Mounts()
	return len(ms) > 0 && ms[0].PID == 1
}
