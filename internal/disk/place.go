package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Place is what a path led to at one moment. Everything is done through its descriptors,
// so that it does not matter where the names lead later.
type Place struct {
	Path string   // as it was given
	File *os.File // what is there, opened as a place only (O_PATH); nil if nothing is
	Mode uint32   // of File
	Dir  *os.File // the directory that Base is a name in, opened in the same way
	Base string
}

// Close closes the descriptors. It may be called again.
func (p *Place) Close() {
	for _, f := range []*os.File{p.File, p.Dir} {
		if f != nil {
			f.Close()
		}
	}
}

// Kind is the type of what is there (unix.S_IFREG and so on), 0 if nothing is.
func (p *Place) Kind() uint32 { return p.Mode & unix.S_IFMT }

// Number is that of the block device that is there.
func (p *Place) Number() Num {
	var st unix.Stat_t
	if p.File == nil || unix.Fstat(int(p.File.Fd()), &st) != nil {
		return Num{}
	}
	return blockdev.NumOf(st.Rdev)
}

// maxLinks is how many symbolic links the kernel follows in one path.
const maxLinks = 40

// OpenPlace follows an absolute path, whose last name need not exist. It follows
// symbolic links, below Root, if they belong to the superuser or to this process's
// user. It refuses another user's link, because that user decides where it leads. It
// also refuses a filesystem that an ordinary user serves, because the server reads
// whatever is stored there. The error is an *Error with ErrForeign, ErrNoAnswer or the
// errno.
func (h *Host) OpenPlace(path string) (*Place, error) {
	type opened struct {
		p   *Place
		err error
	}
	o, err := askPath(h, "place", path, func() (o opened) {
		o.p, o.err = h.openPlaceWalking(path)
		return o
	}, func(o opened) {
		if o.err == nil {
			o.p.Close()
		}
	})
	if err != nil {
		return nil, err
	}
	if o.err != nil {
		return nil, o.err
	}
	p := o.p
	st, err := p.status()
	if err != nil {
		p.Close()
		return nil, &Error{err, path, err.Error(), ""}
	}
	for _, m := range h.Mounts() {
		if uid := m.server(); uid != 0 && m.ID == st.mount {
			p.Close()
			return nil, &Error{ErrForeign, path, fmt.Sprintf("the filesystem there is served by user %d, who could read what is stored", uid), "choose another place"}
		}
	}
	return p, nil
}

// status is the status of what is there, if it is a directory or a block device,
// or else of the directory.
func (p *Place) status() (status, error) {
	f := p.Dir
	if f == nil || p.Kind() == unix.S_IFBLK || p.Kind() == unix.S_IFDIR {
		f = p.File
	}
	return statFile(int(f.Fd()), "")
}

// server is the user whose process serves the filesystem, 0 for the superuser and
// the kernel.
func (m *Mount) server() (uid int) {
	if !strings.HasPrefix(m.FSType, "fuse") {
		return 0
	}
	for _, o := range strings.Split(m.Super, ",") {
		if id, ok := strings.CutPrefix(o, "user_id="); ok {
			uid, _ = strconv.Atoi(id)
		}
	}
	return uid
}

// openPlaceWalking is openPlace by the Walker, if there is one.
func (h *Host) openPlaceWalking(path string) (*Place, error) {
	p, err := goAlong(h, path, func(by *Prober) (*Place, error) { return h.openPlaceBy(by, path) },
		func() (*Place, error) { return h.openPlace(path) })
	if errors.Is(err, ErrGone) {
		err = &Error{ErrGone, path, ErrGone.Error(), ""}
	}
	return p, err
}

func (h *Host) openPlace(path string) (*Place, error) {
	fail := func(what string, err error) (*Place, error) {
		return nil, &Error{err, path, what + ": " + err.Error(), ""}
	}
	fd, err := unix.Open(h.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(h.Root, err)
	}
	stack := []*os.File{os.NewFile(uintptr(fd), h.Root)} // from the root to where the path has led so far
	p := &Place{Path: path}
	defer func() {
		for _, f := range stack {
			if f != p.File && f != p.Dir {
				f.Close()
			}
		}
	}()
	links := 0
	todo := strings.Split(path, "/")
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		dir := stack[len(stack)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
				dir.Close()
			}
			continue
		}
		next, err := openAt(int(dir.Fd()), name)
		if errors.Is(err, unix.ENOENT) && !slices.ContainsFunc(todo, func(s string) bool { return s != "" }) {
			p.Dir, p.Base, p.Mode = dir, name, 0
			return p, nil
		}
		if err != nil {
			return fail(name, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(next.Fd()), &st); err != nil {
			next.Close()
			return fail(name, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			stack = append(stack, next)
			p.Mode, p.Base = st.Mode, name
			continue
		}
		to := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(next.Fd()), "", to)
		next.Close()
		if links++; err == nil && links > maxLinks {
			err = unix.ELOOP
		}
		if err != nil {
			return fail(name, err)
		}
		if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			return nil, &Error{ErrForeign, path, fmt.Sprintf("the link %s belongs to user %d, who may make it lead anywhere", name, st.Uid), "name the place itself, without that link"}
		}
		target := string(to[:n])
		if filepath.IsAbs(target) {
			for _, f := range stack[1:] {
				f.Close()
			}
			stack = stack[:1]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	p.File = stack[len(stack)-1]
	if len(stack) == 1 {
		p.Mode = unix.S_IFDIR
		return p, nil
	}
	p.Dir = stack[len(stack)-2]
	return p, nil
}

// openAt opens one name as a place, without following it. A directory is asked
// for first, which mounts it where the kernel does that on demand.
func openAt(dir int, name string) (*os.File, error) {
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) {
		fd, err = unix.Openat(dir, name, flags, 0)
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// RealPath is a path of the place for this process, free of symbolic links, as
// things are now.
func (h *Host) RealPath(p *Place) string {
	f, base := p.Dir, p.Base
	if f == nil {
		f, base = p.File, ""
	}
	// The kernel names a file by the mounts it was reached through, from the
	// root of their namespace.
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return filepath.Join(h.Root, p.Path)
	}
	return filepath.Join(h.Root, strings.TrimPrefix(real, h.Root), base)
}

// LiesOn says whether the bytes of a place (a block device, or else the filesystem
// on which a file is, or would come to be) finally lie on the device target:
// through partitions, device-mapper, md, bcache, loop devices and the filesystems
// that their files are on. A partition and its whole disk count as the same.
//
// lower tells what lies under a device that sysfs cannot look through (our own
// filters and images); it may be nil.
//
// Where the stack cannot be followed to its end the error is an *Error with
// ErrUnknown. The answer then is the more likely one: true if the target holds a
// filesystem that may be the one in question. A loop device in the stack that does
// not answer gives an *Error with ErrNoAnswer.
func (h *Host) LiesOn(p *Place, target Num, lower func(Num) []Num) (bool, error) {
	st, err := p.status()
	if err != nil {
		return false, &Error{ErrUnknown, p.Path, err.Error(), ""}
	}
	return h.liesOn(p.Path, st, target, lower)
}
