package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// The stable names of devices are the machine's: several daemons, with a run
// directory each, share them. A name belongs to the device that its link leads to,
// as long as that device is one of this program's and is served, or waits for a
// server. Nobody else replaces or removes the link then.
//
// A daemon looks at a link and changes it under a lock. The lock is on the driver's
// control device. The links' directory cannot have it, because udev removes that
// directory when it is empty. A file that anybody can open cannot have it either,
// because anybody could keep it locked.

// linkDir is where the stable names of devices are.
const linkDir = "/dev/ublk-blksnap"

// imageDir is the folder of images in it, and therefore no device's name.
const imageDir = "images"

// udevTimeout is how long udev may take to look at a device.
const udevTimeout = 5 * time.Second

// link gives a ublk device its stable name. If udev runs with our rules, udev makes
// the link and this function waits for it, because systemd knows only the links
// that udev made. Without udev, or if udev is late, the link is made here.
func (d *Daemon) link(ctx context.Context, name string, dev *ublk.Device) (string, error) {
	path := filepath.Join(linkDir, name)
	if d.udevLinks() {
		d.step("wait for udev to make %s", path)
		if !d.udevMade(ctx, path, dev.Num) {
			d.opts.Log.Warn("udev did not make the link in time: the daemon makes it", "link", path, "waited", udevTimeout)
		}
	}
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	unlock, err := lockLinks(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	to := strings.Repeat("../", strings.Count(path, "/")-2) + filepath.Base(dev.Path)
	if there, err := os.Readlink(path); err == nil && there == to {
		return path, nil // udev's, or of a device that had the same number
	}
	if err := d.checkFreeName(ctx, name); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	_ = os.Remove(path)
	if err := os.Symlink(to, path); err != nil {
		return "", err
	}
	return path, nil
}

// udevLinks says whether udev makes the links of this daemon's devices. The rules
// know the usual run directory alone.
func (d *Daemon) udevLinks() bool {
	runs, rules := udev(d.host)
	return runs && rules && d.opts.Dir == DefaultRunDir
}

// udev says whether udev runs, and whether it has our rules.
func udev(h *disk.Host) (runs, rules bool) {
	return h.Exists("/run/udev/control"), slices.ContainsFunc(ruleDirs, func(dir string) bool {
		return h.Exists(filepath.Join(dir, "59-ublk-blksnap.rules"))
	})
}

// ruleDirs are where udev looks for rules (udev(7)).
var ruleDirs = []string{"/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"}

// udevMade waits until udev has recorded that the link belongs to the device, and is
// done with an earlier owner of the link.
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

// owner is the device that the name at path belongs to, if it belongs to one.
func (d *Daemon) owner(ctx context.Context, path string) (info ublk.Info, ok bool) {
	to, err := os.Readlink(path)
	if err != nil {
		return info, false
	}
	id, ok := diskNumber(filepath.Base(to))
	if !ok {
		return info, false
	}
	if info, err = d.ctl.Info(ctx, id); err != nil {
		// A device that does not answer has not given its name up.
		return info, !errors.Is(err, unix.ENODEV)
	}
	_, ours := ublk.IsOurs(info.Tag)
	return info, ours && info.State != ublk.Dead
}

// checkFreeName refuses a name that belongs to a device.
func (d *Daemon) checkFreeName(ctx context.Context, name string) error {
	info, taken := d.owner(ctx, filepath.Join(linkDir, name))
	switch {
	case !taken:
		return nil
	case info.Served():
		return &control.Error{Code: control.Exists, Errno: unix.EEXIST, Fix: "choose another with --name",
			Message: fmt.Sprintf("the name %s is taken by /dev/ublkb%d, which another daemon serves (process %d)", name, info.ID, info.PID)}
	}
	return &control.Error{Code: control.Exists, Errno: unix.EEXIST,
		Message: fmt.Sprintf("the name %s is taken by /dev/ublkb%d, left by a daemon that died", name, info.ID),
		Fix:     fmt.Sprintf("choose another with --name, or remove that one first: ublk-blksnap remove --force /dev/ublkb%d", info.ID)}
}

// unlink takes its stable name from a ublk device, if it still has it.
func (d *Daemon) unlink(path, target string) {
	if path == "" {
		return
	}
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	unlock, err := lockLinks(ctx)
	if err != nil {
		return
	}
	defer unlock()
	if to, err := os.Readlink(path); err == nil && filepath.Base(to) == filepath.Base(target) {
		removeLink(path)
	}
}

// removeLink removes a link, and the folder of a snapshot with a name when it was the last one.
func removeLink(path string) {
	_ = os.Remove(path)
	if dir := filepath.Dir(path); filepath.Dir(dir) == filepath.Join(linkDir, imageDir) {
		_ = os.Remove(dir)
	}
}

// clearLinks removes the links of devices that are gone. Another server may take the
// number of such a device, and the link must not lead to its device.
func (d *Daemon) clearLinks(ctx context.Context) {
	unlock, err := lockLinks(ctx)
	if err != nil {
		return
	}
	defer unlock()
	_ = filepath.WalkDir(linkDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Type() != fs.ModeSymlink {
			return nil //nolint:nilerr // what is not there need not be removed
		}
		if _, taken := d.owner(ctx, path); !taken {
			removeLink(path)
		}
		return nil
	})
}

// lockLinks keeps other daemons from the links.
func lockLinks(ctx context.Context) (unlock func(), err error) {
	f, err := os.Open("/dev/ublk-control")
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { f.Close() }, nil
		case err != unix.EWOULDBLOCK && err != unix.EINTR:
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), ctx.Err())
		}
	}
}

// isOpen says whether any process has the file at path open.
func isOpen(path string) bool {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == path {
			return true
		}
	}
	return false
}

// note tells the udev rules what a kernel device is, until forgetNote. It has to be
// written before the device appears.
func (d *Daemon) note(kernelName, kind, name string) error {
	if err := d.opts.Dir.write(filepath.Join(udevName, kernelName), []byte(noteText(kind, name)), 0o644); err != nil {
		d.forgetNote(kernelName) // the part of it that there was room for
		return fmt.Errorf("write the note for udev: %w", err)
	}
	return nil
}

// noteText is what a note says.
func noteText(kind, name string) string {
	return fmt.Sprintf("UBLK_BLKSNAP_KIND=%s\nUBLK_BLKSNAP_NAME=%s\n", kind, name)
}

// notedAs is the kernel's name of what is noted so; empty if there is none.
func (d *Daemon) notedAs(kind, name string) string {
	for _, e := range dirEntries(d.opts.Dir.udev()) {
		f, err := d.opts.Dir.file(filepath.Join(udevName, e.Name()), os.O_RDONLY, 0)
		if err != nil {
			continue
		}
		text, err := io.ReadAll(io.LimitReader(f, 4096))
		f.Close()
		if err == nil && string(text) == noteText(kind, name) {
			return e.Name()
		}
	}
	return ""
}

func (d *Daemon) forgetNote(kernelName string) {
	_ = os.Remove(filepath.Join(d.opts.Dir.udev(), kernelName))
}

// rescan has udev look at a device again. Without udev nothing happens.
func rescan(kernelName string) {
	_ = os.WriteFile(filepath.Join("/sys/class/block", kernelName, "uevent"), []byte("change"), 0)
}
