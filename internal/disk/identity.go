package disk

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Identity is what the kernel knows of a disk by which to know it again after a
// restart of the machine, as NAME=VALUE. The content has no part in it: a clone of
// the disk is another one. Only where the kernel knows nothing of the disk itself
// is it the place where the disk is plugged in.
type Identity []string

func (id Identity) String() string { return strings.Join(id, ", ") }

// Identify says what a disk can be known by: what it says of itself (serial number,
// WWN), for a partition also its number, place and UUID, for a volume or an array its
// UUID and the disks below. It asks no disk. The error is an *Error with ErrUnknown
// if there is nothing, or if another disk looks the same. In that case there is an
// identity as well: what was kept under it may be of this disk.
func (h *Host) Identify(d *Disk) (Identity, error) { return h.identify(d, nil, 0) }

// identify is Identify. The siblings may look the same: they are paths to one disk.
func (h *Host) identify(d *Disk, siblings []string, depth int) (Identity, error) {
	unknown := func(format string, args ...any) (Identity, error) {
		return nil, &Error{ErrUnknown, d.Path, fmt.Sprintf(format, args...), ""}
	}
	if depth > 16 {
		return unknown("lies on too many layers")
	}
	switch {
	case d.Parent != "":
		whole, err := h.diskNamed(d.Parent)
		if err != nil {
			return unknown("%v", err)
		}
		id, err := h.identify(whole, siblings, depth+1)
		if id == nil {
			return nil, err
		}
		for _, f := range []string{"partition", "start", "size"} {
			id = append(id, f+"="+readText(filepath.Join(d.sys, f)))
		}
		for _, line := range strings.Split(readText(filepath.Join(d.sys, "uevent")), "\n") {
			if uuid, ok := strings.CutPrefix(line, "PARTUUID="); ok {
				id = append(id, "partuuid="+uuid)
			}
		}
		return id, err
	case exists(filepath.Join(d.sys, "dm")):
		uuid := readText(filepath.Join(d.sys, "dm/uuid"))
		if public, ok := publicUUID(uuid); ok {
			uuid = public
		}
		if uuid == "" {
			return unknown("a device-mapper device without a UUID is not known again")
		}
		return h.identifyStack(d, "dm="+uuid, depth)
	case exists(filepath.Join(d.sys, "md")):
		return h.identifyStack(d, "md="+readText(filepath.Join(d.sys, "md/uuid")), depth)
	case exists(filepath.Join(d.sys, "loop")):
		file := readText(filepath.Join(d.sys, "loop/backing_file"))
		st, err := h.backingStatus(d.Name, file, h.deadline())
		if err != nil || st.ino == 0 || strings.HasSuffix(file, " (deleted)") {
			return unknown("the file of the loop device is not known: %s", file)
		}
		return Identity{"loop=" + file, "inode=" + strconv.FormatUint(st.ino, 10),
			"offset=" + readText(filepath.Join(d.sys, "loop/offset")), "limit=" + readText(filepath.Join(d.sys, "loop/sizelimit"))}, nil
	}
	id := h.facts(d)
	if len(id) == 0 {
		return unknown("nothing is known of the disk by which to know it again")
	}
	for _, name := range dirNames(filepath.Join(h.Sys, "class/block")) {
		if name == d.Name || slices.Contains(siblings, name) {
			continue
		}
		if other, err := h.diskNamed(name); err == nil && other.Parent == "" && slices.Equal(h.facts(other), id) {
			_, err := unknown("%s says the same of itself: %s", other.Node, id)
			return id, err
		}
	}
	return id, nil
}

// identifyStack is for a device that lies on others.
func (h *Host) identifyStack(d *Disk, own string, depth int) (Identity, error) {
	slaves := dirNames(filepath.Join(d.sys, "slaves"))
	var below []string
	var same error // another disk looks the same
	for _, name := range slaves {
		s, err := h.diskNamed(name)
		if err != nil {
			return nil, &Error{ErrUnknown, d.Path, err.Error(), ""}
		}
		id, err := h.identify(s, slaves, depth+1)
		if id == nil {
			return nil, err
		}
		if err != nil {
			same = err
		}
		below = append(below, "on="+strings.Join(id, ";"))
	}
	if len(below) == 0 {
		return nil, &Error{ErrUnknown, d.Path, "lies on no disk", ""}
	}
	slices.Sort(below)
	return append(Identity{own}, slices.Compact(below)...), same
}

// busNumber are names in sysfs that depend on the order in which things were found.
var busNumber = regexp.MustCompile(`^(virtio\d+|host\d+|target[\d:]+|\d+:\d+:\d+:\d+|nvme\d+|block|ata\d+|scsi_host|nvme|usb\d+|mmc\d+)$`)

// facts are what a whole disk says of itself, in a fixed order; else where it is
// plugged in; nothing for a disk that the kernel has made up.
func (h *Host) facts(d *Disk) Identity {
	var id Identity
	add := func(name, value string) {
		if value = strings.Join(strings.Fields(strings.Map(printable, value)), " "); value != "" {
			id = append(id, name+"="+value)
		}
	}
	for _, f := range []string{"wwid", "device/wwid", "serial", "device/serial", "device/cid", "uuid"} {
		add(filepath.Base(f), readText(filepath.Join(d.sys, f)))
	}
	for _, f := range []string{"device/vpd_pg80", "device/vpd_pg83"} {
		if b, err := os.ReadFile(filepath.Join(d.sys, f)); err == nil && len(b) > 4 {
			add(strings.TrimPrefix(filepath.Base(f), "vpd_"), hex.EncodeToString(b[4:]))
		}
	}
	if len(id) > 0 {
		add("model", readText(filepath.Join(d.sys, "device/model")))
		return id
	}
	rel, err := filepath.Rel(filepath.Join(h.Sys, "devices"), d.sys)
	if err != nil || strings.HasPrefix(rel, "virtual/") || strings.HasPrefix(rel, "..") {
		return nil
	}
	parts := slices.DeleteFunc(strings.Split(filepath.Dir(rel), "/"), busNumber.MatchString)
	add("path", strings.Join(parts, "/"))
	return id
}

func printable(r rune) rune {
	if r < ' ' || r > '~' {
		return ' '
	}
	return r
}

func (h *Host) diskNamed(name string) (*Disk, error) {
	n, err := ParseNum(h.sysText("class/block", name, "dev"))
	if err != nil {
		return nil, err
	}
	return h.byNumber(n)
}

// Find is the disk of that identity, at whatever path; nil if it is not there.
func (h *Host) Find(id Identity) *Disk {
	for _, name := range dirNames(filepath.Join(h.Sys, "class/block")) {
		d, err := h.diskNamed(name)
		if err != nil {
			continue
		}
		if now, err := h.Identify(d); err == nil && slices.Equal(now, id) {
			return d
		}
	}
	return nil
}
