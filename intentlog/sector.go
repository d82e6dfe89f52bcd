package intentlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

var (
	// ErrDamaged means: a base or a log is not whole, or of an unknown version.
	ErrDamaged = errors.New("write-intent log is damaged")
	// ErrForeign means: a base and a log do not belong together.
	ErrForeign = errors.New("write-intent log of another base")
)

const (
	blockSize = 4096 // what is written at a time, at least

	idAt     = 480
	indexAt  = 496
	zeroAt   = 504
	sumAt    = 508
	perEntry = 8
	entries  = idAt / perEntry // in a sector

	logMagic  = 0x31_676f4c_746e4955 // "UIntLog1"
	baseMagic = 0x31_657361_42746e49 // "IntBase1"
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	order      = binary.LittleEndian
)

// seal makes the end of a sector, after which it is not changed any more.
func seal(s []byte, id uuid.UUID, index uint64) {
	copy(s[idAt:], id[:])
	order.PutUint64(s[indexAt:], index)
	order.PutUint32(s[zeroAt:], 0)
	order.PutUint32(s[sumAt:], crc32.Checksum(s[:sumAt], castagnoli))
}

// unseal says whether a sector is whole and the one with this index, and whose it is.
func unseal(s []byte, index uint64) (id uuid.UUID, err error) {
	copy(id[:], s[idAt:])
	switch {
	case crc32.Checksum(s[:sumAt], castagnoli) != order.Uint32(s[sumAt:]):
		return id, fmt.Errorf("%w: checksum of sector %d", ErrDamaged, index)
	case order.Uint64(s[indexAt:]) != index:
		return id, fmt.Errorf("%w: sector %d where sector %d should be", ErrDamaged, order.Uint64(s[indexAt:]), index)
	case order.Uint32(s[zeroAt:]) != 0:
		return id, fmt.Errorf("%w: end of sector %d", ErrDamaged, index)
	}
	return id, nil
}

// header is sector 0 of a log.
type header struct {
	size       int64
	zoneShift  uint8
	generation uuid.UUID
	number     uint8 // of the last take of the generation that is durable
}

func (h header) put(s []byte) {
	order.PutUint64(s, logMagic)
	order.PutUint64(s[8:], uint64(h.size))
	order.PutUint64(s[16:], uint64(h.zoneShift))
	copy(s[24:], h.generation[:])
	order.PutUint64(s[40:], uint64(h.number))
}

func getHeader(s []byte) (h header, err error) {
	zoneShift, number := order.Uint64(s[16:]), order.Uint64(s[40:])
	h.size, h.zoneShift, h.number = int64(order.Uint64(s[8:])), uint8(zoneShift), uint8(number)
	copy(h.generation[:], s[24:])
	switch {
	case order.Uint64(s) != logMagic:
		return h, fmt.Errorf("%w: unknown version", ErrDamaged)
	case h.size <= 0 || zoneShift < MinZoneShift || zoneShift > MaxZoneShift || number > maxNumber:
		return h, fmt.Errorf("%w: header", ErrDamaged)
	}
	return h, nil
}

// decoded is a whole log.
type decoded struct {
	header
	id      uuid.UUID
	content []byte
}

// decode checks every sector of a log.
func decode(content []byte) (d decoded, err error) {
	if len(content) < blockSize || len(content)%blockSize != 0 {
		return d, fmt.Errorf("%w: %d bytes", ErrDamaged, len(content))
	}
	for at := 0; at < len(content); at += sector.Size {
		id, err := unseal(content[at:at+sector.Size], uint64(at/sector.Size))
		switch {
		case err != nil:
			return d, err
		case at > 0 && id != d.id:
			return d, fmt.Errorf("%w: sector %d is of another log", ErrDamaged, at/sector.Size)
		}
		d.id = id
	}
	if d.header, err = getHeader(content); err != nil {
		return d, err
	}
	if int64(len(content)) != FileSize(d.size, d.zoneShift) {
		return d, fmt.Errorf("%w: %d bytes for a disk of %d", ErrDamaged, len(content), d.size)
	}
	d.content = content
	return d, nil
}

// entryAt is where the entry of a zone lies in a log, in bytes.
func entryAt(zone int64) int64 {
	return (1+zone/entries)*sector.Size + zone%entries*perEntry
}

func entry(content []byte, zone int64) stamp { return stamp(order.Uint64(content[entryAt(zone):])) }
