package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DefaultRunDir is the run directory of the daemon of a machine.
const DefaultRunDir = "/run/ublk-blksnap"

// RunDir is a daemon's run directory; see the package comment.
type RunDir string

// Socket is where the daemon listens.
func (d RunDir) Socket() string { return d.path("control.sock") }

// Log is where a daemon that was started by a command writes.
func (d RunDir) Log() string { return d.path("daemon.log") }

// State is the directory of what outlives the daemon.
func (d RunDir) State() string { return d.path("state") }

func (d RunDir) lockFile() string { return d.path("daemon.lock") }
func (d RunDir) udev() string     { return d.path("udev") }

func (d RunDir) path(name string) string { return filepath.Join(string(d), name) }

// make makes the directory, closed to others.
func (d RunDir) make() error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fail(err, "make the run directory")
	}
	// It may be there with another mode.
	if err := os.Chmod(string(d), 0o700); err != nil {
		return fail(err, "close the run directory to others")
	}
	return nil
}

// lock takes the daemon's lock for the life of the returned file.
func (d RunDir) lock() (*os.File, error) {
	f, err := os.OpenFile(d.lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fail(err, "lock the run directory")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if err != unix.EWOULDBLOCK {
			return nil, fail(err, "lock %s", f.Name())
		}
		who := "another daemon"
		if b, err := os.ReadFile(f.Name()); err == nil && len(b) > 0 {
			who += " (process " + strings.TrimSpace(string(b)) + ")"
		}
		return nil, &Error{Code: Exists, Errno: unix.EALREADY, Message: "start the daemon: " + who + " runs on " + string(d)}
	}
	pid := strconv.Itoa(os.Getpid()) + "\n"
	if err := errors.Join(f.Truncate(0), writeAt(f, pid)); err != nil {
		f.Close()
		return nil, fail(err, "write %s", f.Name())
	}
	return f, nil
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// mountState mounts the tmpfs for the state, unless one is there: it holds what
// a daemon left behind, and gets the size that is configured now. Never in swap
// where the kernel can promise that: paging it in could need the very devices it
// describes.
func (d RunDir) mountState(bytes int64) error {
	dir := d.State()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err, "make the state directory")
	}
	mounted, err := isMountPoint(dir)
	if err != nil {
		return fail(err, "look at the state directory")
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if mounted {
		err := unix.Mount("tmpfs", dir, "tmpfs", flags|unix.MS_REMOUNT, fmt.Sprintf("size=%d", bytes))
		// EINVAL: it holds more than that already.
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fail(err, "give the tmpfs on %s its size", dir)
		}
		return nil
	}
	options := fmt.Sprintf("mode=0700,size=%d", bytes)
	// Large pages where a file asks for them: the pools of snapshots do.
	for _, more := range []string{",noswap,huge=advise", ",noswap", ",huge=advise", ""} {
		err = unix.Mount("tmpfs", dir, "tmpfs", flags, options+more)
		if !errors.Is(err, unix.EINVAL) {
			break
		}
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
