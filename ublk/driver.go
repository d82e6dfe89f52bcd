package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// MinKernel is the oldest kernel whose ublk driver this package can use.
const MinKernel = "6.5"

// Reasons why this machine cannot have a device. The message of the error says what
// to do.
var (
	// ErrNoDriver: the kernel has no ublk driver, or it could not be loaded.
	ErrNoDriver = errors.New("no ublk driver")
	// ErrTooOld: the driver lacks what this package needs.
	ErrTooOld = errors.New("ublk driver too old")
	// ErrPermission: not root.
	ErrPermission = errors.New("not permitted")
	// ErrClosed: the Control has been closed.
	ErrClosed = errors.New("ublk control closed")
)

const controlPath = "/dev/ublk-control"

func openControlDevice() (int, error) {
	open := func() (int, error) { return unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0) }
	absent := func(err error) bool {
		return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
	}
	fd, err := open()
	if absent(err) {
		why := loadDriver()
		// devtmpfs makes the node with the module; udev may be a little late.
		for end := time.Now().Add(nodeTimeout); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if fd, err = open(); err == nil || why != nil {
				break
			}
		}
		if err != nil && why != nil {
			return -1, why
		}
	}
	switch {
	case err == nil:
		return fd, nil
	case absent(err):
		return -1, fmt.Errorf("%w: ublk_drv is loaded but %s did not appear: is devtmpfs mounted on /dev?", ErrNoDriver, controlPath)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("open %s: %w: run as root", controlPath, ErrPermission)
	}
	return -1, fmt.Errorf("open %s: %w", controlPath, err)
}

// loadDriver loads ublk_drv; the error says why there is none.
func loadDriver() error {
	release := KernelRelease()
	name, err := exec.LookPath("modprobe")
	if err != nil {
		name = "/sbin/modprobe"
	}
	out, err := exec.Command(name, "ublk_drv").CombinedOutput()
	if err == nil {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("load ublk_drv: %w: run as root", ErrPermission)
	}
	return noDriver(release, moduleExists("/lib/modules", release), bytes.TrimSpace(out), err)
}

// noDriver says what keeps ublk_drv from being loaded.
func noDriver(release string, exists bool, out []byte, err error) error {
	switch {
	case exists && len(out) > 0:
		return fmt.Errorf("%w: modprobe ublk_drv: %s", ErrNoDriver, out)
	case exists:
		return fmt.Errorf("%w: modprobe ublk_drv: %w", ErrNoDriver, err)
	case OlderThan(release, MinKernel):
		return fmt.Errorf("%w: kernel %s is too old: Linux %s or newer is needed", ErrNoDriver, release, MinKernel)
	}
	return fmt.Errorf("%w: kernel %s has no module ublk_drv: install a kernel built with CONFIG_BLK_DEV_UBLK (Linux %s or newer), or the package with its extra modules", ErrNoDriver, release, MinKernel)
}

func moduleExists(dir, release string) bool {
	found, _ := filepath.Glob(filepath.Join(dir, release, "kernel/drivers/block/ublk_drv.ko*"))
	return len(found) > 0
}

// KernelRelease is the release of the running kernel, "6.12.9-amd64".
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// OlderThan compares the first two numbers of kernel releases. A release without
// numbers is not older.
func OlderThan(release, min string) bool {
	var a, b, x, y int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	if n, _ := fmt.Sscanf(min, "%d.%d", &x, &y); n != 2 {
		return false
	}
	return a < x || a == x && b < y
}
