package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// linkDir is where the stable names of devices are.
const linkDir = "/dev/ublk-blksnap"

// imageDir is the folder of images in it, and therefore no device's name.
const imageDir = "images"

// udevTimeout is how long udev may take to look at a device.
const udevTimeout = 5 * time.Second

// link gives a ublk device its stable name. Where udev runs with our rules it
// makes the link, and this waits for it: only what udev made, systemd knows.
// Without, or if it does not come to it, the link is made here.
func (d *Daemon) link(ctx context.Context, name string, dev *ublk.Device) (string, error) {
	path := filepath.Join(linkDir, name)
	if d.udevLinks() {
		d.step("wait for udev to make %s", path)
		if !d.udevMade(ctx, path, dev.Num) {
			d.o.Log.Warn("udev does not make the link: it is made without", "link", path, "waited", udevTimeout)
		}
	}
	up := strings.Repeat("../", strings.Count(path, "/")-2)
	to := up + filepath.Base(dev.Path)
	if there, err := os.Readlink(path); err == nil && there == to {
		return path, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	// One that is there is of a daemon that died.
	_ = os.Remove(path)
	if err := os.Symlink(to, path); err != nil {
		return "", err
	}
	return path, nil
}

// unlink takes the stable name from a device.
func unlink(path string) {
	if path != "" {
		_ = os.Remove(path)
	}
}

// udevLinks says whether udev makes the links of this daemon's devices. The rules
// know the usual run directory alone.
func (d *Daemon) udevLinks() bool {
	runs, rules := udev(d.host)
	return runs && rules && d.o.Dir == DefaultRunDir
}

// udev says whether udev runs, and whether it has our rules.
func udev(h *disk.Host) (runs, rules bool) {
	there := func(path string) bool {
		_, err := os.Stat(filepath.Join(h.Root, path))
		return err == nil
	}
	return there("/run/udev/control"), slices.ContainsFunc(ruleDirs, func(dir string) bool {
		return there(filepath.Join(dir, "59-ublk-blksnap.rules"))
	})
}

// ruleDirs are where udev looks for rules (udev(7)).
var ruleDirs = []string{"/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"}

// udevMade waits until udev has it on record that the link belongs to the device,
// and whatever it had to do with an earlier owner is done.
func (d *Daemon) udevMade(ctx context.Context, path string, n disk.Num) bool {
	ctx, cancel := context.WithTimeout(ctx, udevTimeout)
	defer cancel()
	record := filepath.Join(d.host.Root, fmt.Sprintf("/run/udev/data/b%d:%d", n.Major, n.Minor))
	for {
		b, _ := os.ReadFile(record)
		if slices.Contains(strings.Split(string(b), "\n"), "S:"+strings.TrimPrefix(path, "/dev/")) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// clearLinks removes the links below dir that lead to nothing, or to what is
// gone for us.
func clearLinks(dir string, gone func(to string) bool) {
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Type() != fs.ModeSymlink {
			return nil //nolint:nilerr // what is not there need not be removed
		}
		to, err := os.Readlink(path)
		if err != nil {
			return nil //nolint:nilerr // the same
		}
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || gone(to) {
			_ = os.Remove(path)
		}
		return nil
	})
}

// note tells the udev rules what a kernel device is, until forgetNote. It has to
// be there before the device is.
func (d *Daemon) note(kernelName, kind, name string) error {
	text := fmt.Sprintf("UBLK_BLKSNAP_KIND=%s\nUBLK_BLKSNAP_NAME=%s\n", kind, name)
	if err := d.o.Dir.write(filepath.Join(udevName, kernelName), []byte(text), 0o644); err != nil {
		d.forgetNote(kernelName) // the part of it that there was room for
		return fmt.Errorf("write the note for udev: %w", err)
	}
	return nil
}

func (d *Daemon) forgetNote(kernelName string) {
	_ = os.Remove(filepath.Join(d.o.Dir.udev(), kernelName))
}

// rescan has udev look at a device again. Without udev nothing happens.
func rescan(kernelName string) {
	_ = os.WriteFile(filepath.Join("/sys/class/block", kernelName, "uevent"), []byte("change"), 0)
}
