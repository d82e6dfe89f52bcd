package daemon

import (
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// namespaceEnv tells a daemon that it has been started anew, and in which mount
// namespace.
const namespaceEnv = "UBLK_BLKSNAP_NAMESPACE"

// programEnv is the path of the program, as whoever started the daemon sees it.
const programEnv = "UBLK_BLKSNAP_PROGRAM"

const (
	ownNamespace    = "own"
	sharedNamespace = "shared"
)

// Reexec starts the program anew in the same process, so that it returns only in
// the second life, or with an error. Before that it mounts the state directory where
// everybody sees it. The second life is without the mounts of the first, and without
// what the daemon shall not inherit from its starter. warn is told what of this
// could not be done.
//
// The second life has a mount namespace of its own, because a mount on a device that
// the process itself serves can keep the process from exiting. If the process's
// namespace is the last to hold such a mount, the kernel unmounts it at the exit,
// writes to the device, and waits for ever for the process that is exiting. For the
// same reason the process lets go of the inherited mounts. Only what the daemon needs
// stays: the root, /dev, /proc, /sys and the run directory. The daemon reaches
// everything else through the root directory of process 1.
//
// If process 1 does not see the mounts that this process sees, the namespace stays.
//
// A daemon that shall be resident goes on as the copy of its program. config is the path of
// its configuration.
func Reexec(dir RunDir, c Config, config string, reportFD int, warn func(error)) error {
	if os.Geteuid() != 0 {
		return &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: "start the daemon: not root", Fix: "run this as root"}
	}
	self, resident := ownProgram, c.Resident && !dir.Resident()
	if os.Getenv(namespaceEnv) != "" {
		if resident { // a program that a reload has begun
			copied, err := dir.makeResident(host(c.DiskTimeout).CopyFile, self, config)
			if err == nil {
				beResident()
				err = unix.Exec(copied, os.Args, os.Environ())
			}
			warn(fail(err, "be resident"))
		}
		// What the program before this one has handed on is for no other process: the
		// lock of a daemon would be held beyond its death.
		if err := closeOnExec(reportFD); err != nil {
			return fail(err, "close inherited files")
		}
	}
	switch os.Getenv(namespaceEnv) {
	case ownNamespace:
		return detachMounts(string(dir))
	case sharedNamespace:
		return leaveDirectory()
	}
	// The thread that execs becomes the process, with all that is its own.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	program, err := dir.installed()
	if err != nil {
		return fail(err, "find the program")
	}
	for _, err := range dropInherited(reportFD) {
		warn(err)
	}
	if err := dir.make(); err != nil {
		return err
	}
	// A second daemon ends here, before it changes anything.
	lock, err := dir.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := dir.checkFormat(); err != nil {
		return err
	}
	// The driver is loaded now, because its module may be on a mount that the process
	// is about to let go of. And a machine without the driver shall be left unchanged.
	ctl, err := ublk.OpenControl()
	if err != nil {
		return driverError(err, "start the daemon")
	}
	ctl.Close()
	if err := dir.mountState(c.StateSize); err != nil {
		return err
	}
	if resident {
		if copied, err := dir.makeResident(copyFile, self, config); err == nil {
			self = copied
			beResident()
		} else {
			warn(fail(err, "be resident"))
		}
	}
	namespace := sharedNamespace
	if sharesMountsWithInit() {
		namespace = ownNamespace
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fail(err, "make a mount namespace")
		}
		if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fail(err, "make the mount namespace private")
		}
	}
	held, err := handLock(lock)
	if err != nil {
		return err
	}
	env := append(os.Environ(), namespaceEnv+"="+namespace, programEnv+"="+program, held)
	return fail(unix.Exec(self, os.Args, env), "start anew")
}

// installed is the path of the program, of which a resident one is a copy.
func (d RunDir) installed() (string, error) {
	if d.Resident() {
		if r, err := d.startRecord(); err == nil && r.Installed != "" {
			return r.Installed, nil
		}
	}
	return os.Executable()
}

// Program is the path of the program, as whoever started the daemon sees it.
func Program() string { return os.Getenv(programEnv) }

// leaveDirectory lets go of the directory that the daemon was started in, and so
// of the filesystem.
func leaveDirectory() error {
	if err := os.Chdir("/"); err != nil {
		return fail(err, "go to the root directory")
	}
	return nil
}

// initRoot is the root directory of process 1.
const initRoot = "/proc/1/root"

// host is the machine as everybody sees it.
func host(patience time.Duration) *disk.Host {
	h := disk.Machine()
	h.Timeout = patience
	if os.Getenv(namespaceEnv) == ownNamespace {
		h.Root = initRoot
	}
	return h
}

// host is the machine as a daemon sees it, which goes along no path itself.
func (o *Options) host() *disk.Host {
	h := host(o.Config.DiskTimeout)
	h.Walker, h.WalkerOnly = o.Prober, o.Dir.Resident()
	return h
}

// sharesMountsWithInit says whether process 1 sees the same mounts.
func sharesMountsWithInit() bool {
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	init, err2 := os.Readlink("/proc/1/ns/mnt")
	return err1 == nil && err2 == nil && own == init
}

func detachMounts(dir string) error {
	if err := leaveDirectory(); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fail(err, "read the mounts")
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	// The last mounted goes first, because it may be mounted inside another mount.
	for i := len(lines) - 1; i >= 0; i-- {
		point, ok := disk.MountPoint(lines[i])
		if ok && !keepsMount(point, dir) {
			// It is detached even if it is in use. A mount that is gone already went with
			// another one.
			_ = unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	return nil
}

// keepsMount says whether the daemon keeps the mount at point.
func keepsMount(point, dir string) bool {
	for _, keep := range []string{"/dev", "/proc", "/sys", dir} {
		if point == keep || strings.HasPrefix(point, keep+"/") || strings.HasPrefix(keep, point+"/") {
			return true
		}
	}
	return point == "/"
}
