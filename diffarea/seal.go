package diffarea

import (
	"encoding/binary"
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Cipher encrypts what a log stores, each sector by itself, so that an image's write
// can replace any of them. Its methods are called on the threads of all queues. They do
// not block, and change nothing but dst.
type Cipher interface {
	// Encrypt encrypts the sectors of src into dst, which is the same memory or other
	// memory of the same length. at is the number of the first.
	Encrypt(dst, src []byte, at Sector)
	// Decrypt is the way back.
	Decrypt(dst, src []byte, at Sector)
}

// Sector is the number of an encrypted sector. No two sectors of a log's storage have
// the same one, in all of its life, and it stays if another process takes the log over.
//
//	 63                48 47                                  0
//	┌────────────────────┬─────────────────────────────────────┐
//	│ place among sources│ 1 + sector in that source, from 0    │
//	└────────────────────┴─────────────────────────────────────┘
//
// 0 is none: what is there is not encrypted.
type Sector uint64

func sectorAt(source uint64, off int64) Sector {
	return Sector(source<<48 | uint64(off/sector.Size+1))
}

// checkSector is the number of a sector that no storage has: see checkOf.
const checkSector = Sector(1<<64 - 1)

// Seal is what a log needs to encrypt what it stores.
type Seal struct {
	// Cipher has a key that no other log has, nor this one in another life.
	Cipher Cipher
	// Memory holds what is on its way to the storage: SealMemory bytes off the Go heap.
	Memory []byte
}

// sealPart is how many bytes are encrypted at a time.
const sealPart = 256 << 10

// SealMemory is how many bytes a Seal needs.
const SealMemory = maxStores * sealPart

// sealing is a log's Seal at work.
type sealing struct {
	cipher Cipher
	memory []byte
	given  int // parts of memory that a store has
}

func newSealing(s *Seal) *sealing {
	if len(s.Memory) < SealMemory {
		panic(fmt.Sprintf("diffarea: %d bytes to encrypt in", len(s.Memory)))
	}
	return &sealing{cipher: s.Cipher, memory: s.Memory}
}

// checkOf tells a key from others without telling what it is: 0 if there is none.
func (s *sealing) checkOf() uint64 {
	if s == nil {
		return 0
	}
	var b [sector.Size]byte
	s.cipher.Encrypt(b[:], b[:], checkSector)
	return binary.LittleEndian.Uint64(b[:]) | 1
}

// give gives a new store its part of the memory, for good.
func (s *sealing) give(st *store) {
	st.part = s.memory[s.given*sealPart:][:sealPart:sealPart]
	s.given++
}

// sealNext encrypts the next part and writes it. The slots do not change before the
// store is done.
func (s *store) sealNext() {
	l := s.l
	n := min(int64(s.n)<<l.shift-s.sent, sealPart)
	from := int64(s.first%l.poolSlots)<<l.shift + s.sent
	l.seal.cipher.Encrypt(s.part[:n], l.pool.Mem[from:from+n], s.sector+Sector(s.sent/sector.Size))
	s.op.Off, s.op.Len = s.off+s.sent, n
	s.op.Buf = blockdev.MemBuf(s.part)
	s.op.ForceAsync = n >= storeAsync
	s.w.q.Submit(&s.op)
}

// sealMore goes on with a store of which a part has been written; false if that was
// the last one.
func (s *store) sealMore() bool {
	if s.l.seal == nil {
		return false
	}
	if s.sent += s.op.Len; s.sent == int64(s.n)<<s.l.shift {
		return false
	}
	s.sealNext()
	return true
}

// Encrypted says whether what is stored is encrypted. Then images have to be served in
// copy mode, because their payloads are decrypted and encrypted in place.
func (a *Area) Encrypted() bool { return a.log.seal != nil }

// Sector is the number of the encrypted sector that holds the byte at off of the image,
// given the word of its chunk; 0 if the byte is not encrypted where it is.
func (a *Area) Sector(w Word, off int64) Sector {
	if a.log.seal == nil || w.State() != Stored {
		return 0
	}
	ext := a.log.state.find(w.Region())
	return sectorAt(ext.source, ext.off+int64(w.Region()-ext.first)<<a.log.shift+off&(a.log.chunkSize-1))
}

// Encrypt encrypts n bytes of a payload in place, which are to be the sectors from at
// on; it does nothing if that is 0.
func (a *Area) Encrypt(b blockdev.Buf, n int64, at Sector) {
	if at != 0 {
		p := b.Bytes(n)
		a.log.seal.cipher.Encrypt(p, p, at)
	}
}

// Decrypt is the way back of Encrypt.
func (a *Area) Decrypt(b blockdev.Buf, n int64, at Sector) {
	if at != 0 {
		p := b.Bytes(n)
		a.log.seal.cipher.Decrypt(p, p, at)
	}
}
