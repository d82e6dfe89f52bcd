package sim

import (
	"encoding/binary"
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

const sectorSize = sector.Size

// Version names the content of a sector. Every write has one of its own, so a
// sector tells who wrote it last, and whether it is where it belongs.
type Version uint64

const (
	// zeroes is a sector of zeroes.
	zeroes Version = 0
	// junk is what a discard may leave behind.
	junk Version = 1<<64 - 1
	// wrong is a sector that nobody ever wrote: torn, misplaced or invented.
	wrong Version = 1<<64 - 2
	// initial is the first version of a disk's sectors, before any write.
	initial Version = 1
)

func (v Version) String() string {
	switch v {
	case zeroes:
		return "zeroes"
	case junk:
		return "junk"
	case wrong:
		return "wrong"
	case initial:
		return "initial"
	}
	return fmt.Sprintf("v%d", uint64(v))
}

// place is where a sector belongs: a device and a sector number.
func place(dev int, sector int64) uint64 { return uint64(dev+1)<<48 | uint64(sector) }

// fill writes the sectors of p with version v, for sector number sector on dev
// and those after it.
func fill(p []byte, v Version, dev int, sector int64) {
	if v == zeroes {
		clear(p)
		return
	}
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		s := p[:sectorSize]
		binary.LittleEndian.PutUint64(s, uint64(v))
		at := place(dev, sector)
		binary.LittleEndian.PutUint64(s[8:], at)
		x := uint64(v)*0x9e3779b97f4a7c15 ^ at
		for i := 16; i < sectorSize; i += 8 {
			x += 0x9e3779b97f4a7c15
			binary.LittleEndian.PutUint64(s[i:], x)
		}
	}
}

// versionOf is the version of one sector's content, found at sector number
// sector of dev.
func versionOf(s []byte, dev int, sector int64) Version {
	v := Version(binary.LittleEndian.Uint64(s))
	if v == zeroes {
		for i := 8; i < sectorSize; i += 8 {
			if binary.LittleEndian.Uint64(s[i:]) != 0 {
				return wrong
			}
		}
		return zeroes
	}
	at := place(dev, sector)
	if binary.LittleEndian.Uint64(s[8:]) != at {
		for _, b := range s[:sectorSize] {
			if b != blockdevtest.JunkByte {
				return wrong
			}
		}
		return junk
	}
	x := uint64(v)*0x9e3779b97f4a7c15 ^ at
	for i := 16; i < sectorSize; i += 8 {
		x += 0x9e3779b97f4a7c15
		if binary.LittleEndian.Uint64(s[i:]) != x {
			return wrong
		}
	}
	return v
}

// tell says in words what a wrong sector holds.
func tell(s []byte) string {
	v, at := binary.LittleEndian.Uint64(s), binary.LittleEndian.Uint64(s[8:])
	return fmt.Sprintf("%v of device %d, sector %d, torn or misplaced", Version(v), int(at>>48)-1, at&(1<<48-1))
}
