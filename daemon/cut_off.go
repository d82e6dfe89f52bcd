package daemon

import (
	"cmp"
	"errors"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// Who is cut off by force is found out before it is done, from what the kernel tells of users. No
// disk is asked, because force is for disks that do not answer too.

// usersOf names the users of a filter or an image.
func (d *Daemon) usersOf(n disk.Num) (users []string) {
	bdev, err := d.host.ByNumber(n)
	if err != nil {
		return nil // there is no disk any more
	}
	var in *disk.Error
	if errors.As(d.host.CheckFree(bdev), &in) {
		users = append(users, in.What)
	}
	if who := d.openedBy(n); who != "" {
		users = append(users, "opened by "+who)
	}
	return users
}

// usersOfLeft names the users of a device that a daemon that died has left.
func (d *Daemon) usersOfLeft(id int) []string {
	bdev, err := d.host.Lookup("/dev/" + diskName(id))
	if err != nil {
		return nil
	}
	return d.usersOf(bdev.Num)
}

// imageUsers names the users of the images of a snapshot; needs opLock.
func (d *Daemon) imageUsers(s *snapshot) (users []string) {
	for _, im := range s.images {
		if im.ublk == nil {
			continue
		}
		for _, who := range d.usersOf(im.ublk.Num) {
			users = append(users, "the image of "+im.device.Name+": "+who)
		}
	}
	return users
}

// usersAndHolders are what the removal of a device by force breaks; needs opLock.
func (d *Daemon) usersAndHolders(dev *device) (c control.CutOff) {
	if dev.attached == nil { // else they go on without the filter
		c.Users = d.usersOf(dev.ublk.Num)
	}
	for _, s := range d.sortedSnapshots() {
		if d.holds(s, dev) {
			c.Users = append(c.Users, d.imageUsers(s)...)
			c.Snapshots = append(c.Snapshots, cmp.Or(s.note.Name, s.id))
		}
	}
	return c
}

// cutOff logs what is about to be broken by force, also for those who did not ask for it.
func (d *Daemon) cutOff(what string, c control.CutOff) control.CutOff {
	if len(c.Users)+len(c.Snapshots) > 0 {
		d.opts.Log.Warn("it is done by force, under its users", "what", what, "users", c.Users, "snapshots", c.Snapshots)
	}
	return c
}
