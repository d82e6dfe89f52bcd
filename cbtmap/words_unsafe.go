package cbtmap

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"unsafe"
)

var errMisaligned = errors.New("memory is not aligned to 8 bytes")

// wordsOf views b, which must start at a multiple of 8, as 64-bit words: the
// smallest unit Go has atomic operations for that is worth having here.
func wordsOf(b []byte) ([]uint64, error) {
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%8 != 0 {
		return nil, errMisaligned
	}
	return unsafe.Slice((*uint64)(p), len(b)/8), nil
}

var bigEndian = binary.NativeEndian.Uint16([]byte{0, 1}) == 1

// maskFrom selects the bytes i..7 of a word in memory order, maskTo the bytes 0..i.
func maskFrom(i int) uint64 { return inMemoryOrder(^uint64(0) << (8 * i)) }
func maskTo(i int) uint64   { return inMemoryOrder(^uint64(0) >> (56 - 8*i)) }

func inMemoryOrder(mask uint64) uint64 {
	if bigEndian {
		return bits.ReverseBytes64(mask)
	}
	return mask
}
