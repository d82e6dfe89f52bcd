package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// DefaultRunDir is the run directory of the daemon of a machine.
const DefaultRunDir = "/run/ublk-blksnap"

// RunDir is a daemon's run directory; see the package comment.
type RunDir string

// Socket is where the daemon listens.
func (d RunDir) Socket() string { return d.path("control.sock") }

// Log is where a daemon that was started by a command writes.
func (d RunDir) Log() string { return d.path(logName) }

// State is the directory of what outlives the daemon.
func (d RunDir) State() string { return d.path(stateName) }

func (d RunDir) udev() string { return d.path(udevName) }

func (d RunDir) path(name string) string { return filepath.Join(string(d), name) }

const (
	lockName   = "daemon.lock"
	logName    = "daemon.log"
	stateName  = "state"
	recordName = stateName + "/record.json"
	udevName   = "udev"
)

// make makes the directory, closed to others.
func (d RunDir) make() error {
	if err := d.makeDir(); err != nil {
		return fail(err, "make the run directory")
	}
	dir, err := d.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	st, err := dir.Stat()
	if err != nil || st.Mode().Perm() == closedMode || st.Mode().Perm() == passedMode {
		return err
	}
	// The directory was there, with another mode. If it holds other things it stays as
	// it is.
	names, err := dir.Readdirnames(-1)
	if err == nil && len(names) > 0 && !slices.Contains(names, lockName) {
		e := invalid("run directory %s: holds other things than a daemon's files", d)
		e.Fix = "choose a directory of its own"
		return e
	}
	if err := dir.Chmod(closedMode); err != nil {
		return fail(err, "close the run directory to others")
	}
	return nil
}

func (d RunDir) makeDir() error {
	// The check comes first, so that nothing is made at a place that belongs to
	// somebody else.
	if err := checkTrusted(string(d)); err != nil {
		return err
	}
	return os.MkdirAll(string(d), 0o700)
}

// open opens the directory. Root works in it, so nobody else may be able to write to
// it, or to put another directory in its place.
func (d RunDir) open() (*os.File, error) {
	path, err := filepath.EvalSymlinks(string(d))
	// Both the links on the way and the directories that they lead to are checked.
	if err == nil {
		err = checkTrusted(string(d))
	}
	if err == nil {
		err = checkTrusted(path)
	}
	var dir *os.File
	if err == nil {
		dir, err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	}
	if err == nil {
		if err = checkOwn(dir, unix.S_IFDIR); err != nil {
			dir.Close()
		}
	}
	if err != nil {
		return nil, fail(err, "open the run directory %s", d)
	}
	return dir, nil
}

// checkTrusted refuses a path if somebody other than root and this process's user
// can decide where it leads. It checks as much of path as exists.
func checkTrusted(path string) error {
	for at := path; ; at = filepath.Dir(at) {
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err == unix.ENOENT {
			continue
		} else if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		// In a sticky directory nobody can replace what is not his own.
		if st.Mode&unix.S_IFMT == unix.S_IFLNK || at != path && st.Mode&unix.S_ISVTX != 0 {
			st.Mode &^= 0o022
		}
		if err := checkClosed(at, &st); err != nil {
			return err
		}
		if at == "/" || at == "." {
			return nil
		}
	}
}

func checkClosed(path string, st *unix.Stat_t) error {
	e := &control.Error{Code: control.Denied, Errno: unix.EPERM, Fix: "choose a directory that nobody else can change, for example in /run"}
	switch {
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		e.Message = fmt.Sprintf("%s belongs to user %d", path, st.Uid)
	case st.Mode&0o022 != 0:
		e.Message = fmt.Sprintf("%s can be written to by others", path)
	default:
		return nil
	}
	return e
}

// checkOwn makes sure that f is of that kind, and has no other owner or name.
func checkOwn(f *os.File, kind uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind || kind == unix.S_IFREG && st.Nlink != 1 {
		return &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: f.Name() + " is not a file or directory that the daemon made", Fix: "remove it"}
	}
	return checkClosed(f.Name(), &st)
}

// file opens a file in the directory. It follows no link.
func (d RunDir) file(name string, flags int, mode uint64) (*os.File, error) {
	f, err := d.openAt(name, flags, mode)
	if err == nil {
		if err = checkOwn(f, unix.S_IFREG); err == nil {
			return f, nil
		}
		f.Close()
	}
	return nil, err
}

func (d RunDir) openAt(name string, flags int, mode uint64) (*os.File, error) {
	dir, err := d.open()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC | unix.O_NONBLOCK, Mode: mode,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), name, &how)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), d.path(name)), nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: something was renamed meanwhile
			continue
		case unix.ELOOP:
			return nil, &control.Error{Code: control.Denied, Errno: unix.ELOOP, Message: d.path(name) + " is a symbolic link", Fix: "remove it"}
		}
		return nil, &os.PathError{Op: "open", Path: d.path(name), Err: err}
	}
}

// write writes a file in the directory.
func (d RunDir) write(name string, text []byte, mode uint64) error {
	f, err := d.file(name, os.O_WRONLY|os.O_CREATE, mode)
	if err != nil {
		return err
	}
	err = f.Truncate(0) // only now, when it is known to be the daemon's own file
	if err == nil {
		_, err = f.Write(text)
	}
	return errors.Join(err, f.Close())
}

// subdir makes a directory in the directory.
func (d RunDir) subdir(name string, mode os.FileMode) error {
	dir, err := d.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Mkdirat(int(dir.Fd()), name, uint32(mode)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("make %s: %w", d.path(name), err)
	}
	sub, err := d.openAt(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	return errors.Join(checkOwn(sub, unix.S_IFDIR), sub.Chmod(mode))
}

// openLog opens the log for a daemon that is started by a command.
func (d RunDir) openLog() (*os.File, error) {
	return d.file(logName, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
}

// lock takes the daemon's lock for the life of the returned file.
func (d RunDir) lock() (*os.File, error) {
	f, err := d.file(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fail(err, "lock the run directory")
	}
	if err := tryLock(f); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fail(err, "lock %s", f.Name())
		}
		who := "another daemon"
		if b, err := os.ReadFile(f.Name()); err == nil && len(b) > 0 {
			who += " (process " + strings.TrimSpace(string(b)) + ")"
		}
		return nil, &control.Error{Code: control.Exists, Errno: unix.EALREADY, Message: "start the daemon: " + who + " runs on " + string(d)}
	}
	// What is in the file goes first. It may be in swap, on a disk of the dead daemon,
	// from where a write into it would read it.
	if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid())+"\n")); err != nil {
		f.Close()
		return nil, fail(err, "write %s", f.Name())
	}
	return f, nil
}

// tryLock locks the file if no daemon has. A guard that has just seen the death of a
// daemon holds it for an instant.
func tryLock(f *os.File) (err error) {
	for range 20 {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// lockEnv names the file descriptor of the daemon's lock to a program that this
// process execs: it is still the daemon, and nobody may come in between.
const lockEnv = "UBLK_BLKSNAP_LOCK"

// handLock prepares the lock for an exec; add goes to the environment.
func handLock(lock *os.File) (add string, err error) {
	if _, err := unix.FcntlInt(lock.Fd(), unix.F_SETFD, 0); err != nil {
		return "", fail(err, "hand the lock on")
	}
	return lockEnv + "=" + strconv.Itoa(int(lock.Fd())), nil
}

// takeLock is lock, or the lock that the program before this one had in the same
// process.
func (d RunDir) takeLock() (*os.File, error) {
	fd, err := strconv.Atoi(os.Getenv(lockEnv))
	if err != nil {
		return d.lock()
	}
	_ = os.Unsetenv(lockEnv)
	var own, st unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &own), unix.Stat(d.path(lockName), &st)); err != nil || own.Dev != st.Dev || own.Ino != st.Ino {
		return d.lock() // it is that of another directory
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), d.path(lockName)), nil
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// mountState mounts the tmpfs for the state. If one is there already it holds what a
// daemon left behind, and only gets the size that is configured now. The tmpfs never
// goes to swap (Linux 6.4), because it holds keys, and because reading it back could
// need the very devices that it describes.
func (d RunDir) mountState(bytes int64) error {
	dir := d.State()
	if err := d.subdir(stateName, 0o700); err != nil {
		return fail(err, "make the state directory")
	}
	mounted, err := isMountPoint(dir)
	if err != nil {
		return fail(err, "look at the state directory")
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV) // a resident daemon's program is there
	if mounted {
		err := unix.Mount("tmpfs", dir, "tmpfs", flags|unix.MS_REMOUNT, fmt.Sprintf("size=%d", bytes))
		// EINVAL: it holds more than that already.
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fail(err, "give the tmpfs on %s its size", dir)
		}
		return nil
	}
	options := fmt.Sprintf("mode=0700,size=%d,noswap", bytes)
	// Large pages where a file asks for them, as the pools of snapshots do, and where the
	// kernel has them.
	if err = unix.Mount("tmpfs", dir, "tmpfs", flags, options+",huge=advise"); errors.Is(err, unix.EINVAL) {
		err = unix.Mount("tmpfs", dir, "tmpfs", flags, options)
	}
	if err != nil {
		return fail(err, "mount a tmpfs on %s", dir)
	}
	return nil
}

func isMountPoint(dir string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, 0, &st); err != nil {
		return false, err
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, errors.New("the kernel does not tell mount points")
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}
