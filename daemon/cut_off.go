package daemon

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// Who is cut off by force is found out before it is done, from what the kernel tells of users. No
// disk is asked, because force is for disks that do not answer too, and no process is waited for
// that does not answer either.

// namingLimit is how long whoever uses force waits for the names of the users.
const namingLimit = time.Second

// usedDevice is a filter or an image that is about to be broken.
type usedDevice struct {
	num disk.Num
	as  string // which image it is: stands before each user of it
}

// usersOf names the users of devices, as far as that is known at once.
func (d *Daemon) usersOf(devices ...usedDevice) []string {
	if len(devices) == 0 {
		return nil
	}
	var (
		mu    sync.Mutex
		users []string
	)
	ctx, cancel := context.WithTimeout(context.Background(), namingLimit)
	defer cancel()
	_, late := bounded.Call(ctx, func() (end struct{}) {
		for _, dev := range devices {
			if ctx.Err() != nil {
				break
			}
			d.eachUser(dev.num, func(who string) {
				mu.Lock()
				users = append(users, dev.as+who)
				mu.Unlock()
			})
		}
		return
	}, func(struct{}) {})
	mu.Lock()
	defer mu.Unlock()
	if late != nil {
		return append(slices.Clone(users), "whoever else uses it, which could not be found out within a second")
	}
	return users
}

// eachUser names one because of which a device is not free, and all that have it open.
func (d *Daemon) eachUser(n disk.Num, name func(who string)) {
	bdev, err := d.host.ByNumber(n)
	if err != nil {
		return // there is no disk any more
	}
	var in *disk.Error
	if errors.As(d.host.CheckFree(bdev), &in) {
		name(in.What)
	}
	for _, p := range d.openers(n) {
		name("opened by " + p.String())
	}
}

// usersOfLeft names the users of a device that a daemon that died has left. Those of a volume
// that it came under go on without it.
func (d *Daemon) usersOfLeft(id int) []string {
	bdev, err := d.host.Lookup("/dev/" + diskName(id))
	if err != nil {
		return nil
	}
	if over, _ := d.attachmentOver(id); over != nil {
		return nil
	}
	return d.usersOf(usedDevice{num: bdev.Num})
}

// usedImages are the images of a snapshot; needs opLock.
func usedImages(s *snapshot) (all []usedDevice) {
	for _, im := range s.images {
		if im.ublk != nil {
			all = append(all, usedDevice{im.ublk.Num, "the image of " + im.device.Name + ": "})
		}
	}
	return all
}

// usersAndHolders are what the removal of a device by force breaks; needs opLock.
func (d *Daemon) usersAndHolders(dev *device) (c control.CutOff) {
	var used []usedDevice
	if dev.attached == nil { // else they go on without the filter
		used = append(used, usedDevice{num: dev.ublk.Num})
	}
	for _, s := range d.sortedSnapshots() {
		if d.holds(s, dev) {
			used = append(used, usedImages(s)...)
			c.Snapshots = append(c.Snapshots, cmp.Or(s.note.Name, s.id))
		}
	}
	c.Users = d.usersOf(used...)
	return c
}

// cutOff logs what is about to be broken by force, also for those who did not ask for it.
func (d *Daemon) cutOff(what string, c control.CutOff) control.CutOff {
	if !c.Empty() {
		d.opts.Log.Warn("it is done by force, under its users", "what", what, "users", c.Users, "snapshots", c.Snapshots)
	}
	return c
}
