package sim

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"unsafe"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// cipher is a cheap one, by which every mistake shows: another key or number gives
// another sector, and what is encrypted twice is not what it was.
type cipher struct {
	key uint64
	// made has the sectors that have been encrypted and not yet written, by where they
	// are in memory.
	made map[unsafe.Pointer]diffarea.Sector
	// places and numbers must say the same: each place has one number, for good.
	places  map[diffarea.Sector]sectorOf
	numbers map[sectorOf]diffarea.Sector
}

// sectorOf is a sector of a storage.
type sectorOf struct {
	file   blockdev.File
	sector int64
}

func newCipher(key uint64) *cipher {
	return &cipher{
		key: key, made: map[unsafe.Pointer]diffarea.Sector{},
		places: map[diffarea.Sector]sectorOf{}, numbers: map[sectorOf]diffarea.Sector{},
	}
}

// stream is the i-th word of what is mixed into a sector.
func (c *cipher) stream(at diffarea.Sector, i int) uint64 {
	x := (c.key ^ uint64(at)*0x9e3779b97f4a7c15) + uint64(i)*0xd1b54a32d192ed03
	x = (x ^ x>>29) * 0xbf58476d1ce4e5b9
	return x ^ x>>32
}

// Encrypt implements diffarea.Cipher.
func (c *cipher) Encrypt(dst, src []byte, at diffarea.Sector) {
	for ; len(src) > 0; dst, src, at = dst[sectorSize:], src[sectorSize:], at+1 {
		for i := 0; i < sectorSize; i += 8 {
			x := binary.LittleEndian.Uint64(src[i:]) ^ c.stream(at, i)
			binary.LittleEndian.PutUint64(dst[i:], bits.RotateLeft64(x, 23))
		}
		if c.made != nil {
			c.made[unsafe.Pointer(unsafe.SliceData(dst))] = at
		}
	}
}

// Decrypt implements diffarea.Cipher.
func (c *cipher) Decrypt(dst, src []byte, at diffarea.Sector) {
	for ; len(src) > 0; dst, src, at = dst[sectorSize:], src[sectorSize:], at+1 {
		for i := 0; i < sectorSize; i += 8 {
			x := bits.RotateLeft64(binary.LittleEndian.Uint64(src[i:]), -23)
			binary.LittleEndian.PutUint64(dst[i:], x^c.stream(at, i))
		}
	}
}

// checkWritten looks at a write to the storage of an encrypted snapshot: each of its
// sectors was encrypted, and with a number that no other place has.
func (c *cipher) checkWritten(op *blockdev.Op) error {
	p := op.Buf.Bytes(op.Len)
	for i := int64(0); i < op.Len; i += sectorSize {
		here := sectorOf{op.File, (op.Off + i) / sectorSize}
		at := unsafe.Pointer(unsafe.SliceData(p[i:]))
		n, ok := c.made[at]
		delete(c.made, at)
		if !ok {
			return fmt.Errorf("sector %d of %s is written as it is", here.sector, op.File.Name())
		}
		if was, ok := c.places[n]; ok && was != here {
			return fmt.Errorf("sector %d of %s has the number %x of sector %d of %s", here.sector, op.File.Name(), n, was.sector, was.file.Name())
		}
		if was, ok := c.numbers[here]; ok && was != n {
			return fmt.Errorf("sector %d of %s has the number %x, and had %x", here.sector, op.File.Name(), n, was)
		}
		c.places[n], c.numbers[here] = here, n
	}
	return nil
}

// checkEncrypted looks at a write to a storage.
func (w *world) checkEncrypted(op *blockdev.Op) {
	m, ok := op.File.(*blockdevtest.Memory)
	if !ok || op.Kind != blockdev.Write {
		return
	}
	for _, s := range w.snaps {
		if s == nil || s.cipher == nil || m == s.poolFile {
			continue
		}
		for _, st := range s.appended {
			if st.File != op.File {
				continue
			}
			if err := s.cipher.checkWritten(op); err != nil {
				w.fail("I10: %v: %v", s, err)
			}
		}
	}
}
