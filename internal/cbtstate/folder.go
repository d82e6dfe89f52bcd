package cbtstate

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
)

// directory is a folder of the machine. All is done through its descriptor.
type directory struct{ dir *os.File }

// openFolder goes down a path name by name. Whoever may write to a directory on the
// way, or made a link there, decides where it leads.
func openFolder(root, path string, create bool) (folder, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, refuse(NoPlace, "open %s: %v", root, err)
	}
	at := os.NewFile(uintptr(fd), root)
	defer func() { at.Close() }()
	names := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	where := ""
	for i, name := range names {
		where += "/" + name
		fd, err := unix.Openat(int(at.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) && create {
			if fd, err = makeDir(at, name); err != nil {
				return nil, refuse(NoPlace, "make %s: %v", where, err)
			}
		}
		if errors.Is(err, unix.ENOENT) {
			return nil, refuse(NoState, "nothing was kept: there is no %s", where)
		}
		if err != nil {
			return nil, refuse(NoPlace, "open %s: %v", where, err)
		}
		at.Close()
		at = os.NewFile(uintptr(fd), where)
		if err := checkTrusted(at, unix.S_IFDIR, i < len(names)-1); err != nil {
			return nil, err
		}
	}
	fd, err = unix.Openat(int(at.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, refuse(NoPlace, "open %s: %v", where, err)
	}
	return directory{os.NewFile(uintptr(fd), where)}, nil
}

// makeDir makes a directory durably and opens it as a place.
func makeDir(at *os.File, name string) (fd int, err error) {
	if err := unix.Mkdirat(int(at.Fd()), name, 0o700); err != nil && err != unix.EEXIST {
		return -1, err
	}
	above, err := unix.Openat(int(at.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Fsync(above)
		unix.Close(above)
	}
	if err != nil {
		return -1, err
	}
	return unix.Openat(int(at.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// checkTrusted refuses what is not of that kind, or what somebody else than root, or
// the user that we are, may change. In a sticky directory on the way everybody has
// only what is his own.
func checkTrusted(f *os.File, kind uint32, onTheWay bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return refuse(NoPlace, "status of %s: %v", f.Name(), err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return refuse(Untrusted, "%s is a symbolic link", f.Name())
	case st.Mode&unix.S_IFMT != kind && kind == unix.S_IFDIR:
		return refuse(Untrusted, "%s is not a directory", f.Name())
	case st.Mode&unix.S_IFMT != kind || kind == unix.S_IFREG && st.Nlink != 1:
		return refuse(Untrusted, "%s is not a file that the daemon made", f.Name())
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return refuse(Untrusted, "%s belongs to user %d", f.Name(), st.Uid)
	case st.Mode&0o022 != 0 && !(onTheWay && st.Mode&unix.S_ISVTX != 0):
		return refuse(Untrusted, "%s can be written to by others", f.Name())
	}
	return nil
}

func (d directory) at() int { return int(d.dir.Fd()) }

func (d directory) create(name string) (file, error) {
	if err := d.remove(name); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(d.at(), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &fs.PathError{Op: "create", Path: d.dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (d directory) read(name string, limit int64) ([]byte, error) {
	// As a place first: opening what is not a file may have effects, or hang.
	fd, err := unix.Openat(d.at(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	place := os.NewFile(uintptr(fd), d.dir.Name()+"/"+name)
	defer place.Close()
	if err := checkTrusted(place, unix.S_IFREG, false); err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		return nil, refuse(Damaged, "%s is longer than %d bytes", place.Name(), limit)
	}
	return b, err
}

func (d directory) names() ([]string, error) {
	if _, err := d.dir.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return d.dir.Readdirnames(-1)
}

func (d directory) rename(from, to string) error {
	deathpoint.Point()
	return unix.Renameat(d.at(), from, d.at(), to)
}

func (d directory) remove(name string) error {
	if err := unix.Unlinkat(d.at(), name, 0); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

func (d directory) sync() error {
	deathpoint.Point()
	err := d.dir.Sync()
	deathpoint.Point()
	return err
}

func (d directory) close() { d.dir.Close() }
