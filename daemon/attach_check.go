package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
)

// What a filter cannot come under while it is in use.

// attaches says whether a disk is to be attached, rather than to have a filter in its place.
// usable is what disk.Host.CheckUsable says of it. The error is why it can be neither.
func (d *Daemon) attaches(ctx context.Context, bdev *disk.Disk, mode control.AttachMode, usable error) (bool, error) {
	if usable != nil && !errors.Is(usable, disk.ErrInUse) {
		return false, usable
	}
	if bdev.DMName == "" {
		if mode == control.AttachAlways && usable == nil {
			return false, invalid("it is no device of device-mapper, so that a filter can only come in its place: leave out --attach")
		}
		return false, d.mountedError(bdev, usable)
	}
	switch {
	case mode == control.AttachNever, mode == control.AttachInUse && usable == nil:
		return false, usable
	}
	err := d.checkAttach(ctx, bdev)
	if err != nil && mode == control.AttachPossible && usable == nil {
		return false, nil
	}
	return err == nil, err
}

// mountedError says which two ways there are for a mounted disk that is not under
// device-mapper.
func (d *Daemon) mountedError(bdev *disk.Disk, err error) error {
	var in *disk.Error
	if !errors.As(err, &in) || !strings.Contains(in.What, "mounted on ") {
		return err
	}
	e := *in
	e.Fix = "unmount it, add it with --boot, and mount it again: from then on it has its filter at every boot before it is mounted; " +
		"or put it under LVM once, because a logical volume can be added while it is mounted"
	return &e
}

// attachable are the targets that two devices may have at the same time: they keep nothing on
// the disk, and nothing in memory that the other would have to know.
var attachable = []string{"linear", "striped", "crypt", "delay"}

// checkAttach refuses what cannot be attached, with the reason.
func (d *Daemon) checkAttach(ctx context.Context, bdev *disk.Disk) error {
	refuse := func(fix, format string, args ...any) error {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "cannot have a filter while it is in use: " + fmt.Sprintf(format, args...), Fix: fix}
	}
	uuid := d.host.DMUUID(bdev)
	if disk.IsPrivate(d.dmOwner(), uuid) || strings.HasPrefix(uuid, "LVM-") && len(uuid) > len("LVM-")+64 {
		return refuse("name the volume that lies on it", "it is a part of another volume")
	}
	if len(disk.PrivateUUID(0, uuid, bdev.Num)) >= 129 {
		return refuse("unmount it first", "its UUID is too long: %s", uuid)
	}
	if err := d.checkTargets(bdev, refuse); err != nil {
		return err
	}
	resident, elsewhere := d.checkResident(), errors.New("a daemon that takes over could not read it")
	for _, p := range []struct {
		path, what string
		refused    error
		fix        string
	}{
		{"/", "the root filesystem lies on it", resident, d.residentFix()},
		{"/usr", "the system's programs lie on it", resident, d.residentFix()},
		{"/etc", "the system's configuration lies on it", resident, d.residentFix()},
		{d.opts.Program, "the program lies on it", resident, d.residentFix()},
		{d.opts.ConfigPath, "the configuration lies on it", resident, d.residentFix()},
		{d.opts.Config.StateDir, "state_dir lies on it", elsewhere, "have state_dir on another disk, or none (state_dir = \"\"), then: ublk-blksnap daemon reload"},
		{string(d.opts.Dir), "the run directory lies on it", elsewhere, "have it on a tmpfs"},
	} {
		if lies, err := d.liesOn(p.path, bdev); err != nil || lies && p.refused != nil {
			return errors.Join(refuse(p.fix, "%s: %v", p.what, p.refused), err)
		}
	}
	if path := d.swapOn(bdev); path != "" {
		return refuse("swapoff "+path+" first", "the swap space %s lies on it", path)
	}
	for _, s := range d.sortedSnapshots() {
		for _, st := range d.describeSnapshot(s).Storage {
			if lies, _ := d.liesOn(st.Path, bdev); lies {
				return refuse("destroy that first: ublk-blksnap snapshot destroy "+s.id, "the storage of snapshot %s lies on it", s.id)
			}
		}
	}
	return d.checkMember(ctx, bdev, refuse)
}

// checkTargets looks at the table.
func (d *Daemon) checkTargets(bdev *disk.Disk, refuse func(fix, format string, args ...any) error) error {
	c, err := dm.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	i, err := c.Info(dm.Device{Num: bdev.Num})
	if err != nil {
		return err
	}
	if why := d.changing(bdev, i); why != "" {
		return tableChanging("cannot have a filter while it is in use: %s", why)
	}
	t, err := c.Live(i.Device)
	if err != nil {
		return err
	}
	defer t.Wipe()
	for _, below := range d.host.Slaves(bdev) {
		if _, ublk := diskNumber(below.Name); ublk && t.Is(dm.Linear(t.Size(), below.Num)) {
			return refuse("remove that first", "it has the filter /dev/%s of another daemon", below.Name)
		}
	}
	for _, x := range t {
		if x.Type == "multipath" {
			return refuse(d.multipathFix(bdev), "the kernel does not let a multipath device have another table than one of paths")
		}
		if !slices.Contains(attachable, x.Type) {
			return refuse("unmount it first", "its table has a target that two devices may not have at the same time (%s)", x.Type)
		}
		if x.Type != "crypt" {
			continue
		}
		if words := bytes.Fields(x.Args); len(words) > 1 && bytes.HasPrefix(words[1], []byte(":")) {
			return refuse(d.keyringFix(bdev), "its key is in the kernel's keyring, where nobody can have it for a second table")
		}
		if bytes.Contains(x.Args, []byte("integrity:")) {
			return refuse("unmount it first", "it has integrity tags")
		}
	}
	return nil
}

// unusedFix is the way for a device under which no filter can come, and which no other device
// stands in for.
const unusedFix = "unmount it and add it, without --attach; with --boot it has its filter at every boot, before it is mounted"

func (d *Daemon) multipathFix(bdev *disk.Disk) string {
	if len(d.host.Holders(bdev)) > 0 {
		return "name the volume that lies on it"
	}
	return unusedFix
}

// keyringFix is for an encrypted volume, of which a second table cannot have the key.
func (d *Daemon) keyringFix(bdev *disk.Disk) string {
	fix := "have its key in its table (it asks for the passphrase): cryptsetup refresh --disable-keyring " + bdev.DMName
	if slices.ContainsFunc(d.host.Slaves(bdev), func(below *disk.Disk) bool { return below.DMName != "" }) {
		return "name the volume below it, or " + fix
	}
	return fix + "; or " + unusedFix
}

// changing is what another program is doing with a device, which goes on from there; "" if it
// does nothing.
func (d *Daemon) changing(bdev *disk.Disk, i dm.Info) string {
	if i.Suspended || i.Inactive {
		return "another program is changing its table"
	}
	// While pvmove moves extents, the volume lies on a device that goes when that is done. A
	// volume of LVM lies on a whole other one of its group only then.
	const group, volume = len("LVM-") + 32, len("LVM-") + 64
	if uuid := d.host.DMUUID(bdev); strings.HasPrefix(uuid, "LVM-") && len(uuid) == volume {
		for _, below := range d.host.Slaves(bdev) {
			if u := d.host.DMUUID(below); len(u) == volume && u[:group] == uuid[:group] {
				return "LVM is moving its extents (" + below.DMName + ")"
			}
		}
	}
	return ""
}

// liesOn says whether a path lies on the disk, or would.
func (d *Daemon) liesOn(path string, bdev *disk.Disk) (bool, error) {
	if path == "" {
		return false, nil
	}
	place, err := d.host.OpenPlace(path)
	if err != nil {
		return false, nil //nolint:nilerr // what is not there lies nowhere
	}
	defer place.Close()
	lies, err := d.host.LiesOn(place, bdev.Num, d.lowerDisks)
	if lies || !errors.Is(err, disk.ErrNoAnswer) {
		return lies, nil
	}
	return false, err
}

// swapOn is a swap space that lies on the disk.
func (d *Daemon) swapOn(bdev *disk.Disk) string {
	text, _ := os.ReadFile(filepath.Join(d.host.Proc, "swaps"))
	for i, line := range strings.Split(string(text), "\n") {
		if words := strings.Fields(line); i > 0 && len(words) > 0 {
			path := disk.Unescape(words[0])
			if lies, _ := d.liesOn(path, bdev); lies {
				return path
			}
		}
	}
	return ""
}

// members are what programs look for on all disks, to put something together from it. They
// would find it three times.
var members = map[string]string{"LVM2_member": "LVM", "linux_raid_member": "md", "bcache": "bcache", "zfs_member": "zfs"}

// checkMember asks blkid what the disk holds.
func (d *Daemon) checkMember(ctx context.Context, bdev *disk.Disk, refuse func(fix, format string, args ...any) error) error {
	if d.opts.Prober == nil {
		return nil
	}
	f, err := d.host.Open(bdev.Node, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	holds, err := d.opts.Prober.Probe(ctx, f)
	if who := members[holds]; err == nil && who != "" {
		return refuse("name the volumes that lie on it", "it belongs to %s, which would find it several times", who)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil // blkid may not be there, or find nothing
}
