package cbtmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"
)

var (
	// ErrForeign means: this is not a change map, or one of an unknown version.
	ErrForeign = errors.New("not a change map of this version")
	// ErrTorn means: this was a change map, but it is incomplete or damaged.
	ErrTorn = errors.New("change map is damaged")
)

const (
	magic   = 0x74624375 // "uCbt"
	version = 1

	// maxNumber is the highest number of a take: marks after it write 255.
	maxNumber = 254
)

// header is what the maps mean. In memory and in a saved file it is seven words:
//
//	0  magic (low half), CRC-32C of words 1..6 (high half); 0 while being written
//	1  sequence: the header with the higher one is newer
//	2  device size in bytes
//	3  bytes from the low end: version, minimum shift, maximum shift, number, 0 0 0 0
//	4  maximum count
//	5  generation, first half, big endian
//	6  generation, second half
type header struct {
	sequence   uint64
	size       int64
	params     Params
	number     uint8 // of the last take
	generation uuid.UUID
}

const headerWords = 7

type rawHeader [headerWords]uint64

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (h header) encode() rawHeader {
	w := rawHeader{
		1: h.sequence,
		2: uint64(h.size),
		3: version | uint64(h.params.MinimumShift)<<8 | uint64(h.params.MaximumShift)<<16 | uint64(h.number)<<24,
		4: uint64(h.params.MaximumCount),
		5: binary.BigEndian.Uint64(h.generation[:8]),
		6: binary.BigEndian.Uint64(h.generation[8:]),
	}
	b := w.bytes()
	w[0] = magic | uint64(crc32.Checksum(b[8:], castagnoli))<<32
	return w
}

// bytes is w as a file holds it: little endian.
func (w rawHeader) bytes() (b [8 * headerWords]byte) {
	for i, v := range w {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return b
}

// decode returns the header and the geometry that follows from it, ErrForeign or
// ErrTorn.
func (w rawHeader) decode() (header, geometry, error) {
	if uint32(w[0]) != magic {
		return header{}, geometry{}, ErrForeign
	}
	if v := uint8(w[3]); v != version {
		return header{}, geometry{}, fmt.Errorf("%w: version %d", ErrForeign, v)
	}
	h := header{
		sequence: w[1],
		size:     int64(w[2]),
		params:   Params{MinimumShift: uint8(w[3] >> 8), MaximumShift: uint8(w[3] >> 16), MaximumCount: int64(w[4])},
		number:   uint8(w[3] >> 24),
	}
	binary.BigEndian.PutUint64(h.generation[:8], w[5])
	binary.BigEndian.PutUint64(h.generation[8:], w[6])
	if h.encode() != w { // the checksum, and every bit that means nothing
		return header{}, geometry{}, fmt.Errorf("%w: header checksum", ErrTorn)
	}
	if h.number > maxNumber {
		return header{}, geometry{}, fmt.Errorf("%w: number %d", ErrTorn, h.number)
	}
	g, err := h.params.geometry(h.size)
	if err != nil {
		return header{}, geometry{}, fmt.Errorf("%w: %w", ErrTorn, err)
	}
	return h, g, nil
}
