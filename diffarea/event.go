package diffarea

import (
	"golang.org/x/sys/unix"
)

// EventKind is what a snapshot tells its owner.
type EventKind uint8

const (
	// LowFreeSpace: four fifths are used of all the storage there will be, which
	// may not suffice; Sectors more are asked for, a portion at most.
	LowFreeSpace EventKind = iota + 1
	// NoSpace: a copy found no storage. Corrupted follows.
	NoSpace
	// Corrupted: the snapshot is broken, its images give errors. Device is the
	// one on whose behalf it broke, Errno says why.
	Corrupted
)

func (k EventKind) String() string {
	switch k {
	case LowFreeSpace:
		return "low_free_space"
	case NoSpace:
		return "no_space"
	case Corrupted:
		return "corrupted"
	}
	return "unknown"
}

// Event is something that happened to a snapshot.
type Event struct {
	Kind    EventKind
	Sectors int64      // LowFreeSpace: how much more is asked for, in 512-byte sectors
	Used    int64      // LowFreeSpace: of Limit bytes
	Limit   int64      // LowFreeSpace: all the storage there will be, bytes
	Device  uint64     // Corrupted: the device number given to NewArea, 0 if none
	Errno   unix.Errno // Corrupted
}
