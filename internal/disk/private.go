package disk

import (
	"fmt"
	"path/filepath"
	"strings"
)

// A filter that is put under a device-mapper device in use lies on a private device, which
// has the table that the public one had:
//
//	public ──linear──> filter (/dev/ublkbN) ··> private ──the table of before──> disks
//
// The private one's UUID has that of the public one in it. So it has the public one's
// identity, and whoever looks at the disks below is told of the public one.

const privatePrefix = "UBLKBLKSNAP-"

// PrivateName is the name of the private device of a device, for people.
func PrivateName(public Num) string {
	return fmt.Sprintf("ublk-blksnap-%d-%d", public.Major, public.Minor)
}

// PrivateUUID is its UUID. owner tells those of one program from those of another. If the
// public device has no UUID, its number stands for it.
func PrivateUUID(owner uint32, public string, n Num) string {
	if public == "" {
		public = noUUID + n.String()
	}
	return ownedBy(owner) + public
}

const noUUID = "-"

func ownedBy(owner uint32) string { return fmt.Sprintf("%s%08x-", privatePrefix, owner) }

// IsPrivate says whether a UUID is that of a private device, of this owner.
func IsPrivate(owner uint32, uuid string) bool { return strings.HasPrefix(uuid, ownedBy(owner)) }

// publicUUID is the UUID of the public device whose private one has this UUID.
func publicUUID(uuid string) (public string, ok bool) {
	if !strings.HasPrefix(uuid, privatePrefix) || len(uuid) < len(ownedBy(0)) {
		return "", false
	}
	if public = uuid[len(ownedBy(0)):]; strings.HasPrefix(public, noUUID) {
		public = ""
	}
	return public, true
}

// Holders are the devices that are put together from a disk.
func (h *Host) Holders(d *Disk) []*Disk {
	return h.disksNamed(dirNames(filepath.Join(d.sys, "holders")))
}

// Slaves are the disks that a device is put together from.
func (h *Host) Slaves(d *Disk) []*Disk { return h.disksNamed(dirNames(filepath.Join(d.sys, "slaves"))) }

func (h *Host) disksNamed(names []string) (out []*Disk) {
	for _, name := range names {
		if d, err := h.diskNamed(name); err == nil {
			out = append(out, d)
		}
	}
	return out
}

// DMUUID is the UUID of a device-mapper device.
func (h *Host) DMUUID(d *Disk) string { return readText(filepath.Join(d.sys, "dm/uuid")) }

// Attached is a volume under which somebody has put a filter, as sysfs tells of it.
type Attached struct {
	Private   *Disk
	Public    *Disk // nil: it is gone
	Filter    *Disk // that the public device's requests come to; nil: they come to none
	Suspended bool  // the public device is: its users wait
}

// Attached are all of this machine, whoever attached them.
func (h *Host) Attached() (all []Attached) {
	dms, _ := filepath.Glob(filepath.Join(h.Sys, "class/block/dm-*"))
	for i := range dms {
		dms[i] = filepath.Base(dms[i])
	}
	disks := h.disksNamed(dms)
	for _, private := range disks {
		uuid, ok := publicUUID(h.DMUUID(private))
		if !ok {
			continue
		}
		a := Attached{Private: private}
		for _, d := range disks {
			if own := h.DMUUID(d); own == uuid && (own != "" || PrivateName(d.Num) == private.DMName) {
				a.Public = d
			}
		}
		if a.Public != nil {
			a.Suspended = readText(filepath.Join(a.Public.sys, "dm/suspended")) == "1"
			if below := h.Slaves(a.Public); len(below) == 1 && strings.HasPrefix(below[0].Name, "ublkb") {
				a.Filter = below[0]
			}
		}
		all = append(all, a)
	}
	return all
}

// publicName is the name of the public device whose private one has this name; the same name
// if it is gone.
func (h *Host) publicName(private string) string {
	var n Num
	if _, err := fmt.Sscanf(private, "ublk-blksnap-%d-%d", &n.Major, &n.Minor); err == nil {
		if name := h.sysText("dev/block", n.String(), "dm/name"); name != "" {
			return name
		}
	}
	return private
}
