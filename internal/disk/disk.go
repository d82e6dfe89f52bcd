// Package disk says what a path on this machine is, and who uses it. It knows
// which block device a path leads to, how large that is, where it is mounted and
// which other device holds it. It also finds the devices that a file finally lies
// on.
//
//	"/data/diff"          Lookup, OpenPlace: what is it?
//	      │
//	 file ─> filesystem ─> /dev/dm-0 ─> /dev/vdb1 ─> /dev/vdb
//	      │                                             ^
//	      └──────────────── LiesOn: does it end there? ─┘
//
//	 who has /dev/vdb?    CheckFree: mounts, swap, devices stacked on it
//	                      Openers: processes
//	                      OpenExclusive: nobody, from now on
//
// The package reads /proc and /sys, and does no I/O on the disks, so that a look
// at a disk never disturbs it. What it finds is true at the moment of looking. Only
// OpenExclusive says for certain that a disk is free, because it claims the disk.
//
// A path may lead to a dead file server. The file below a loop device may lie on
// one too, and then the loop device does not answer a question about its file. The
// package waits for both within limits. A question that hangs holds up nobody who
// asks about something else.
//
// Only what a disk holds (a filesystem, a partition table) has to be read from the
// disk. A Prober does that, in a process of its own.
//
// A Host may be used from several goroutines at once, and so may a Prober.
//
// # Errors
//
// An *Error names the path, the finding and the way out. errors.Is finds its kind:
// ErrNotFound, ErrNotBlock, ErrEmpty, ErrReadOnly, ErrInUse or ErrForeign;
// ErrUnknown if the package cannot tell; ErrNoAnswer if something hangs. A Prober
// fails with ErrNoTool on a machine without blkid.
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// What is wrong with a disk. They arrive wrapped in an *Error.
var (
	ErrNotFound = errors.New("no such device")
	ErrNotBlock = errors.New("not a block device")
	ErrEmpty    = errors.New("zero size")
	ErrReadOnly = errors.New("read-only")
	ErrInUse    = errors.New("in use")
	ErrUnknown  = errors.New("cannot tell")
	ErrForeign  = errors.New("somebody else's") // a path that another user leads anywhere
)

// Error says what is wrong with which path and what a person can do about it.
type Error struct {
	Kind error  // one of the sentinels above
	Path string // as the caller named it
	What string // the finding: "mounted on /mnt"
	Fix  string // the way out: "unmount it first"; may be empty
}

func (e *Error) Error() string { return e.Path + ": " + e.What }

func (e *Error) Unwrap() error { return e.Kind }

// Num is a block device's number.
type Num = blockdev.Num

// ParseNum reads "8:16".
func ParseNum(s string) (Num, error) {
	major, minor, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return Num{}, fmt.Errorf("parse device number %q", s)
	}
	return Num{Major: uint32(a), Minor: uint32(b)}, nil
}

// Disk is a block device: a whole disk or a partition.
type Disk struct {
	Path     string // as the caller named it
	Name     string // the kernel's name: sdb, vdb1, dm-0, ublkb3
	Node     string // /dev/Name
	Num      Num
	Size     int64 // bytes
	ReadOnly bool
	// Parent is the kernel's name of the whole disk when this is a partition,
	// else empty.
	Parent string
	// Sequence tells a disk from every other that has or had its number in this boot;
	// a partition has that of its disk. 0: the kernel does not tell (before Linux 5.15).
	Sequence uint64
	// DMName is the device-mapper name, for a device-mapper device.
	DMName string

	sys string // its directory in sysfs
}

// DisplayName is the name a person knows the disk by: its device-mapper name, or the
// kernel's name.
func (d *Disk) DisplayName() string {
	if d.DMName != "" {
		return d.DMName
	}
	return d.Name
}

// DisplayPath is the path that a person knows the disk by. For a device-mapper device
// it has the device's name, because its number changes.
func (d *Disk) DisplayPath() string {
	if d.DMName != "" {
		return "/dev/mapper/" + d.DMName
	}
	return d.Node
}

// Host is the machine that is looked at.
type Host struct {
	// Root is the directory from which paths given by people are resolved,
	// symbolic links included. A process in a mount namespace of its own sets
	// it to /proc/1/root to see what everybody else sees.
	Root string
	// Proc and Sys are where procfs and sysfs are mounted.
	Proc, Sys string
	// Timeout is how long a path is looked up, and a loop device is asked, before
	// that fails with ErrNoAnswer; 0: some seconds.
	Timeout time.Duration
	// Walker goes along paths in place of this process: see walk.go. If it is nil, or has
	// ended, this process does, unless it is to be the Walker only: then paths that may lead
	// to a disk fail with ErrGone.
	Walker     *Prober
	WalkerOnly bool

	// nil: the real ones
	stat     func(path string) (status, error)
	loop     func(node string) (status, error)
	capacity func(path string) (capacity, error)
}

// status is what of a file's status matters here. None of it changes in the life
// of a file.
type status struct {
	mode  uint16 // S_IFMT bits
	rdev  Num    // of a device node
	dev   Num    // of the filesystem
	ino   uint64
	mount uint64 // the mount's number in mountinfo; 0 if it was not reached by one
}

// Machine is this machine, seen from this process.
func Machine() *Host { return &Host{Root: "/", Proc: "/proc", Sys: "/sys"} }

// Open opens path below Root, with symbolic links resolved there too. The
// errors are those of open(2), as *os.PathError, or an *Error with ErrNoAnswer.
func (h *Host) Open(path string, flags int, mode os.FileMode) (*os.File, error) {
	type opened struct {
		f   *os.File
		err error
	}
	o, err := askPath(h, "open", path, func() (o opened) {
		o.f, o.err = h.openWalking(path, flags, mode)
		return o
	}, func(o opened) {
		if o.err == nil {
			o.f.Close()
		}
	})
	if err != nil {
		return nil, err
	}
	return o.f, o.err
}

// openWalking is open by the Walker, if there is one.
func (h *Host) openWalking(path string, flags int, mode os.FileMode) (*os.File, error) {
	f, err := goAlong(h, path, func(by *Prober) (*os.File, error) { return h.openBy(by, path, flags, mode) },
		func() (*os.File, error) { return h.open(path, flags, mode) })
	if errors.Is(err, ErrGone) {
		err = &os.PathError{Op: "open", Path: path, Err: ErrGone}
	}
	return f, err
}

func (h *Host) open(path string, flags int, mode os.FileMode) (*os.File, error) {
	root, err := unix.Open(h.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: h.Root, Err: err}
	}
	defer unix.Close(root)
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_IN_ROOT,
	}
	if flags&unix.O_CREAT != 0 || flags&unix.O_TMPFILE == unix.O_TMPFILE {
		how.Mode = uint64(mode.Perm())
	}
	for {
		fd, err := unix.Openat2(root, path, &how)
		// EAGAIN: a rename raced with the walk.
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

func (h *Host) statPath(path string) (status, error) {
	if h.stat != nil {
		return h.stat(path)
	}
	type answer struct {
		st  status
		err error
	}
	a, err := askPath(h, "status of", path, func() answer {
		f, err := h.openWalking(path, unix.O_PATH, 0)
		if err != nil {
			var pe *os.PathError
			errors.As(err, &pe)
			return answer{err: pe.Err}
		}
		defer f.Close()
		st, err := statFile(int(f.Fd()), "")
		return answer{st, err}
	}, func(answer) {})
	if err != nil {
		return status{}, err
	}
	return a.st, a.err
}

// Exists says whether something is at path, below Root. If a path does not answer,
// nothing counts as being there.
func (h *Host) Exists(path string) bool {
	_, err := h.statPath(path)
	return err == nil
}

// statFile is the status of an open file, or of what a path leads to. It asks no
// file server for what is known here.
func statFile(fd int, path string) (status, error) {
	var st unix.Statx_t
	err := unix.Statx(fd, path, unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_MNT_ID, &st)
	if err != nil {
		return status{}, err
	}
	return status{
		mode:  st.Mode & unix.S_IFMT,
		rdev:  Num{Major: st.Rdev_major, Minor: st.Rdev_minor},
		dev:   Num{Major: st.Dev_major, Minor: st.Dev_minor},
		ino:   st.Ino,
		mount: st.Mnt_id,
	}, nil
}

// Lookup says which block device path is: a device node, a symbolic link to
// one, or the bare name of a device or of a device-mapper device ("vdb",
// "vg-data"). The error is an *Error with ErrNotFound, ErrNotBlock or ErrNoAnswer.
func (h *Host) Lookup(path string) (*Disk, error) {
	num, err := h.number(path)
	if err != nil {
		return nil, err
	}
	d, err := h.byNumber(num)
	if err != nil {
		return nil, &Error{ErrNotFound, path, "no device behind this node (" + num.String() + ")", ""}
	}
	d.Path = path
	return d, nil
}

func (h *Host) number(path string) (Num, error) {
	if path == "" {
		return Num{}, &Error{ErrNotFound, `""`, "no such device", ""}
	}
	st, err := h.statPath(path)
	if (err != nil || st.mode != unix.S_IFBLK) && !strings.Contains(path, "/") {
		if name := h.named(path); name != "" {
			return ParseNum(h.sysText("class/block", name, "dev"))
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return Num{}, &Error{ErrNotFound, path, "no such device", ""}
	case errors.Is(err, ErrNoAnswer):
		return Num{}, err
	case err != nil:
		return Num{}, &Error{ErrNotFound, path, err.Error(), ""}
	}
	var what, fix string
	switch st.mode {
	case unix.S_IFBLK:
		return st.rdev, nil
	case unix.S_IFREG:
		what, fix = "a regular file, not a block device", "put a loop device over it: losetup -f --show "+path
	case unix.S_IFDIR:
		what = "a directory, not a block device"
	case unix.S_IFCHR:
		what = "a character device, not a block device"
	default:
		what = "not a block device"
	}
	return Num{}, &Error{ErrNotBlock, path, what, fix}
}

// named is the kernel's name of the device that a person calls by a bare name.
func (h *Host) named(name string) string {
	if filepath.Base(name) != name || name == "." || name == ".." {
		return ""
	}
	if h.sysText("class/block", name, "dev") != "" {
		return name
	}
	dms, _ := filepath.Glob(filepath.Join(h.Sys, "class/block/dm-*/dm/name"))
	for _, f := range dms {
		if readText(f) == name {
			return filepath.Base(filepath.Dir(filepath.Dir(f)))
		}
	}
	return ""
}

// ByNumber is the disk with the given number.
func (h *Host) ByNumber(n Num) (*Disk, error) {
	d, err := h.byNumber(n)
	if err != nil {
		return nil, &Error{ErrNotFound, n.String(), "no such device", ""}
	}
	return d, nil
}

func (h *Host) byNumber(n Num) (*Disk, error) {
	sys, err := filepath.EvalSymlinks(filepath.Join(h.Sys, "dev/block", n.String()))
	if err != nil {
		return nil, err
	}
	name := filepath.Base(sys)
	sectors, err := strconv.ParseInt(readText(filepath.Join(sys, "size")), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("read size of %s: %w", name, err)
	}
	d := &Disk{
		// sysfs writes "!" for a "/" in the kernel's name ("cciss!c0d0").
		Name:     name,
		Node:     "/dev/" + strings.ReplaceAll(name, "!", "/"),
		Num:      n,
		Size:     sectors * sector.Size,
		ReadOnly: readText(filepath.Join(sys, "ro")) == "1",
		DMName:   readText(filepath.Join(sys, "dm/name")),
		sys:      sys,
	}
	d.Path = d.Node
	if exists(filepath.Join(sys, "partition")) {
		d.Parent = filepath.Base(filepath.Dir(sys))
		sys = filepath.Dir(sys)
	}
	d.Sequence, _ = strconv.ParseUint(readText(filepath.Join(sys, "diskseq")), 10, 64)
	return d, nil
}

func (h *Host) sysText(elem ...string) string {
	return readText(filepath.Join(append([]string{h.Sys}, elem...)...))
}

// readText is the content of a small file without its newline; empty when it
// cannot be read.
func readText(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimRight(string(b), "\n")
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func dirNames(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	out := make([]string, len(entries))
	for i, e := range entries {
		out[i] = e.Name()
	}
	return out
}
