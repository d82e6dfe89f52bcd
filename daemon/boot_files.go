package daemon

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// What a disk named for the boot has on the root filesystem: its table, in the drop-in
// directory if "add --boot" wrote it, and a line in udev's rules, by which the disk is
// not used while it has no filter. The rules hold without the program, so that they
// hold if no daemon starts. A table without a line is mended by the next daemon. A
// line is removed before its table, because a disk that only waits for a filter could
// not be used at all.

// RulesPath is the file of the rules. Its name decides when udev reads it.
const RulesPath = "/etc/udev/rules.d/63-ublk-blksnap-disks.rules"

//go:embed boot.rules
var bootRules string

// rulesText are the rules for these disks; empty if there is none.
func rulesText(all []BootDevice) string {
	if len(all) == 0 {
		return ""
	}
	var lines strings.Builder
	for _, b := range all {
		fmt.Fprintf(&lines, "SYMLINK==%q, ENV{UBLK_BLKSNAP_DISK}=%q\n", strings.TrimPrefix(b.Path, "/dev/"), b.Name)
	}
	// A backslash is a letter like any other there.
	return strings.Replace(bootRules, "@disks@\n", strings.ReplaceAll(lines.String(), `\\`, `\`), 1)
}

// UpdateRules makes the rules of udev those of the configuration.
func UpdateRules(config string) error {
	return changeBoot(config, func(all []BootDevice) error { return writeRules(config, all) })
}

// changeBoot calls change with the disks that a configuration names. Nobody else changes
// tables and rules meanwhile.
func changeBoot(config string, change func(all []BootDevice) error) error {
	unlock, err := lockBoot(config)
	if err != nil {
		return err
	}
	defer unlock()
	all, err := ReadBootDevices(config)
	if err != nil {
		return err
	}
	return change(all)
}

// PrepareBoot is UpdateRules for a daemon that is about to start, so that a table that
// somebody has written counts at the next boot at the latest. Once the daemon has
// started itself anew it does not see the root filesystem as others do.
func PrepareBoot(dir RunDir, config string) error {
	if dir != DefaultRunDir || os.Getenv(namespaceEnv) != "" {
		return nil
	}
	return UpdateRules(config)
}

// lockBoot keeps others, as a daemon that starts, from tables and rules while they are
// changed. The lock is where nobody but root can hold it up.
func lockBoot(config string) (unlock func(), err error) {
	if config != DefaultConfigPath {
		return func() {}, nil
	}
	dir := RunDir(DefaultRunDir)
	if err := dir.make(); err != nil {
		return nil, err
	}
	f, err := dir.file("boot.lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fail(err, "lock the disks of the boot")
	}
	for end := time.Now().Add(bootLockLimit); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(end) {
			f.Close()
			return nil, fail(err, "lock %s", f.Name())
		}
	}
}

// bootLockLimit is how long others may take to change tables and rules.
const bootLockLimit = 30 * time.Second

// writeRules makes the rules of udev those for these disks. Only the default configuration
// has any.
func writeRules(config string, all []BootDevice) error {
	if config != DefaultConfigPath {
		return nil
	}
	text := rulesText(all)
	have, err := os.ReadFile(RulesPath)
	if err == nil && string(have) == text || errors.Is(err, fs.ErrNotExist) && text == "" {
		return nil
	}
	if text == "" {
		err = removeDurably(RulesPath)
	} else {
		err = writeDurably(RulesPath, text)
	}
	if err != nil {
		return fail(err, "write the rules of udev")
	}
	// udev looks for new rules by itself, but not at once.
	_ = exec.Command("udevadm", "control", "--reload").Run()
	return nil
}

// AddBootDevice writes the table of a disk, and its rule.
func AddBootDevice(config string, b BootDevice) error {
	b = b.in(config)
	err := changeBoot(config, func(all []BootDevice) error {
		if err := b.fits(all); err != nil {
			return err
		}
		if err := writeDurably(b.File, b.text()); err != nil {
			return fail(err, "write %s", b.File)
		}
		// As whoever reads the tables later finds them, in their order.
		all, err := ReadBootDevices(config)
		if err != nil {
			return err
		}
		return writeRules(config, all)
	})
	if err == nil {
		lookAgain(b.Path)
	}
	return err
}

// CheckBootDevice says which file AddBootDevice would write, or why it would not.
func CheckBootDevice(config string, b BootDevice) (file string, err error) {
	b = b.in(config)
	all, err := ReadBootDevices(config)
	if err == nil {
		err = b.fits(all)
	}
	return b.File, err
}

// in is the disk with its table where AddBootDevice writes it.
func (b BootDevice) in(config string) BootDevice {
	b.File, b.Line = filepath.Join(DropInDir(config), b.Name+".conf"), 1
	return b
}

// fits refuses a disk that cannot be named beside these. Again is no error: the options may
// be others.
func (b BootDevice) fits(all []BootDevice) error {
	for _, other := range all {
		if other.Name == b.Name && other.Path == b.Path && other.File != b.File {
			return &control.Error{Code: control.Exists, Errno: unix.EEXIST, Message: fmt.Sprintf("%s names the disk already", other.where()), Fix: "change it there"}
		}
	}
	return checkBootDevices(append(notIn(b.File, all), b))
}

// notIn are the disks whose tables are in other files.
func notIn(file string, all []BootDevice) []BootDevice {
	return slices.DeleteFunc(slices.Clone(all), func(b BootDevice) bool { return b.File == file })
}

// FindBootDevice is the disk of that name, or at that path, that is named for the
// boot; ok is false if none is.
func FindBootDevice(config, ref string) (b BootDevice, ok bool, err error) {
	all, err := ReadBootDevices(config)
	if err != nil {
		return b, false, err
	}
	num := func(path string) (disk.Num, bool) {
		d, err := disk.Machine().Lookup(path)
		if err != nil {
			return disk.Num{}, false
		}
		return d.Num, true
	}
	want, known := num(ref)
	for _, b := range all {
		if b.Name == ref || b.Path == ref || filepath.Join(linkDir, b.Name) == ref {
			return b, true, nil
		}
		if n, there := num(b.Path); known && there && n == want {
			return b, true, nil
		}
	}
	return b, false, nil
}

// RemoveBootDevice takes a disk out of the configuration and of the rules.
func RemoveBootDevice(config string, b BootDevice) error {
	if filepath.Dir(b.File) != DropInDir(config) {
		return &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: b.where() + " has the table of " + b.Name + ", which somebody has written by hand", Fix: "take it out there"}
	}
	err := changeBoot(config, func(all []BootDevice) error {
		others := notIn(b.File, all)
		if len(all)-len(others) > 1 {
			return &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: b.File + " has several tables, which somebody has written by hand", Fix: "take it out there"}
		}
		if err := writeRules(config, others); err != nil {
			return err
		}
		if err := removeDurably(b.File); err != nil {
			return fail(err, "remove %s", b.File)
		}
		return nil
	})
	if err == nil {
		lookAgain(b.Path)
	}
	return err
}

// lookAgain has udev look again at the disk that a path leads to.
func lookAgain(path string) {
	d, err := disk.Machine().Lookup(path)
	if err != nil {
		return
	}
	rescan(d.Name)
	for _, part := range disk.Machine().Partitions(d) {
		rescan(part.Name)
	}
}

// StableLink is the path by which a disk is found after every boot: the one that was
// given, if it is such a path, or else the link that says most of what the disk is.
func StableLink(path string) (string, error) {
	d, err := disk.Machine().Lookup(path)
	if err != nil {
		return "", fail(err, "add %s", path)
	}
	if stable, err := stablePath(path); err == nil {
		return stable, nil
	}
	if d.DMName != "" {
		return stablePath(d.DisplayPath())
	}
	best, rank := "", 0
	for _, dir := range []string{"by-id", "by-partuuid", "by-path"} {
		links, _ := filepath.Glob(filepath.Join("/dev/disk", dir, "*"))
		for _, link := range links {
			to, err := disk.Machine().Lookup(link)
			if err != nil || to.Num != d.Num {
				continue
			}
			if _, err := stablePath(link); err != nil {
				continue
			}
			if r := rankLink(link, d.Parent != ""); best == "" || r < rank || r == rank && len(link) < len(best) {
				best, rank = link, r
			}
		}
	}
	if best == "" {
		return "", &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: "add " + path + ": it has no name that stays: no link of /dev/disk/by-id, by-partuuid or by-path leads to it",
			Fix: "give it a serial number or a partition, or add it without --boot"}
	}
	return best, nil
}

// rankLink orders the links of a disk: the lower the better it tells the disk from all
// others.
func rankLink(link string, partition bool) int {
	name := filepath.Base(link)
	switch filepath.Base(filepath.Dir(link)) {
	case "by-partuuid":
		if partition {
			return 0
		}
		return 9
	case "by-id":
		if strings.HasPrefix(name, "wwn-") || strings.HasPrefix(name, "nvme-eui.") || strings.HasPrefix(name, "nvme-uuid.") {
			return 1
		}
		return 2
	}
	return 3
}

// BootWarnings are what would keep the disks from having their filters at the boot, or
// the filters from going on with their change maps, or what is to be mounted from waiting.
func BootWarnings(ctx context.Context, c Config, all ...BootDevice) (out []string) {
	if state := examineState(c.StateDir); state.Result != OK {
		out = append(out, state.Text)
	} else if point := mountOf("/etc/fstab", c.StateDir); point != "" {
		out = append(out, fmt.Sprintf("%s lies on %s, which is mounted after the filters are made: change tracking would begin anew at every boot: choose a state_dir on the root filesystem", c.StateDir, point))
	}
	if runs, rules := udev(host(0)); !runs || !rules {
		out = append(out, "udev does not run with our rules, so that the disk itself may be mounted: install the package, or make install")
	}
	if _, err := os.Stat(systemdRuns); err != nil {
		out = append(out, "systemd does not run: nothing starts the daemon at the boot, unless a script does")
	} else if said, err := exec.CommandContext(ctx, "systemctl", "is-enabled", unitName).Output(); err != nil {
		out = append(out, fmt.Sprintf("the unit is not started at the boot (%s): systemctl enable %s", cmp.Or(strings.TrimSpace(string(said)), "not installed"), unitName))
	}
	return append(out, fstabNotes(all)...)
}

// CheckBoot are the disks that a configuration names, and what is to be said of them.
func CheckBoot(ctx context.Context, config string, c Config) (all []BootDevice, notes []string, err error) {
	if all, err = ReadBootDevices(config); err != nil || len(all) == 0 {
		return all, nil, err
	}
	for _, b := range all {
		if _, err := disk.Machine().Lookup(b.Path); err != nil {
			notes = append(notes, fmt.Sprintf("%s: %s is not there now", b.where(), b.Path))
		}
	}
	if config != DefaultConfigPath {
		return all, append(notes, "udev keeps nobody from these disks: that is for the disks of "+DefaultConfigPath), nil
	}
	if have, err := os.ReadFile(RulesPath); err != nil || string(have) != rulesText(all) {
		notes = append(notes, RulesPath+" is not from this configuration: ublk-blksnap config apply")
	}
	return all, append(notes, BootWarnings(ctx, c, all...)...), nil
}

// mountOf is the mount point of a file like fstab below which path lies, if it is
// neither the root filesystem's nor mounted by the initramfs.
func mountOf(fstab, path string) string {
	table, err := os.ReadFile(fstab)
	if err != nil || path == "" {
		return ""
	}
	// As if nothing but that were mounted.
	early := "1 1 0:1 / / rw - x x rw\n1 1 0:1 / /usr rw - x x rw\n"
	return notMounted(path, string(table), early)
}

// writeDurably replaces a file, whole or not at all, also by a power failure.
func writeDurably(path, text string) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A name that neither udev nor this program reads.
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	// The directory may be new.
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
}

func removeDurably(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
