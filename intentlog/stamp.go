package intentlog

import "math/bits"

const (
	// MinZoneShift and MaxZoneShift limit log2 of the size of a zone in bytes.
	MinZoneShift = 12
	MaxZoneShift = 40

	// By default a zone is a MiB or more, so that a disk has no more than so many.
	defaultMinShift = 20
	defaultMaxZones = 16 << 10

	maxNumber = 254     // of a take; see package cbtmap
	maxEpoch  = 1 << 55 // far more than there ever are
)

// stamp is an epoch, and in its lowest byte a mark of the change map.
type stamp uint64

func makeStamp(epoch uint64, mark uint8) stamp { return stamp(epoch<<8 | uint64(mark)) }

func (s stamp) epoch() uint64 { return uint64(s >> 8) }
func (s stamp) mark() uint8   { return uint8(s) }

// DefaultZoneShift is log2 of the size of a zone, in bytes, for a disk of size bytes:
// the smallest from 1 MiB on that makes no more than 16 Ki zones of it.
func DefaultZoneShift(size int64) uint8 {
	return uint8(min(max(defaultMinShift, bits.Len64(uint64((size-1)/defaultMaxZones))), MaxZoneShift))
}

func zones(size int64, zoneShift uint8) int64 { return (size-1)>>zoneShift + 1 }

// FileSize is the size of a log's file in bytes.
func FileSize(size int64, zoneShift uint8) int64 {
	return (entryAt(zones(size, zoneShift)-1) + blockSize) &^ (blockSize - 1)
}
