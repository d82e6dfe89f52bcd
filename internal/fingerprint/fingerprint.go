// Package fingerprint tells whether somebody may have written to a disk meanwhile,
// by the places that every use of a disk changes: a mount for writing, a check or
// repair of a filesystem, a change of partitions or volumes.
//
//	┌ first MiB ┬────────────── what the disk holds ───────────────┬ last MiB ┐
//	│ MBR, GPT, │ partition 1          │ partition 2               │ GPT again│
//	│ md, LVM   │ first MiB … last MiB │ LUKS: head of the data    │ md       │
//	│           │ superblocks, their   │                           │          │
//	│           │ copies, log heads    │                           │          │
//	└───────────┴──────────────────────┴───────────────────────────┴──────────┘
//
// It looks at the content to know where these places are, down through partitions,
// volumes and mirrors, and is the SHA-256 of each. It trusts
// nothing that it reads: every number found on a disk is checked against the size of
// the disk, and how much is read is bounded.
//
// Equal prints do not prove that nothing was written. A write past all
// filesystems into the middle of the disk does not show. A change inside an encrypted
// or thin volume shows only if it touches what lies at its head.
package fingerprint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Place is a stretch of a disk that tells of writes.
type Place struct {
	Name   string `json:"place"`
	Offset int64  `json:"offset"` // bytes
	Length int64  `json:"length"`
	SHA256 string `json:"sha256"` // of what it held
}

// ErrTooMany means that the disk has more places than are looked at.
var ErrTooMany = errors.New("more partitions and volumes than can be looked at")

const (
	// maxPlaces and maxBytes bound what is read of one disk.
	maxPlaces = 8192
	maxBytes  = 2 << 30

	mib      = 1 << 20
	maxDepth = 5 // of contents within contents
)

// Read makes the fingerprint of a disk of size bytes in logical blocks of block
// bytes. It ends with the error of ctx as soon as a read has returned after that.
// The disk must not be written to meanwhile.
func Read(ctx context.Context, r io.ReaderAt, size int64, block int) ([]Place, error) {
	return (&scan{ctx: ctx, r: r, block: int64(block)}).all(size)
}

// Running is the fingerprint of a disk that is in use: of superblocks and headers
// alone, as a mount, a check and a repair change them and the life of a filesystem
// seldom does. Some live by writing them, as btrfs does: their fingerprint does not
// stay. The disk may be written to meanwhile. It is not to be compared with what Read
// returns.
func Running(ctx context.Context, r io.ReaderAt, size int64, block int) ([]Place, error) {
	return (&scan{ctx: ctx, r: r, block: int64(block), running: true}).all(size)
}

func (s *scan) all(size int64) ([]Place, error) {
	all := extent{"", 0, size}
	s.content(all, mib, 0)
	if s.running && len(s.places) == 0 {
		s.add(all, "first 4 KiB", 0, runningHead)
	}
	if s.err != nil {
		return nil, fmt.Errorf("read fingerprint: %w", s.err)
	}
	return s.places, nil
}

// runningHead is how much is looked at of the head of what is not known, while the
// disk is in use. Every superblock but that of btrfs lies in it.
const runningHead = 4 << 10

// Difference names a place in which two fingerprints of a disk differ, the most
// telling one; empty if they are equal.
func Difference(before, now []Place) string {
	type key struct {
		name   string
		offset int64
	}
	had := map[key]Place{}
	for _, p := range before {
		had[key{p.Name, p.Offset}] = p
	}
	for _, p := range now {
		if had[key{p.Name, p.Offset}] != p {
			return p.Name
		}
		delete(had, key{p.Name, p.Offset})
	}
	for _, p := range before { // in their order
		if _, gone := had[key{p.Name, p.Offset}]; gone {
			return p.Name
		}
	}
	return ""
}

// scan is one look at a disk. After an error it goes on without reading.
type scan struct {
	ctx    context.Context
	r      io.ReaderAt
	block  int64
	places []Place
	bytes  int64
	err    error
	// running: see Running.
	running bool
}

// extent is a part of the disk that holds something of its own.
type extent struct {
	name   string // before the names of its places
	offset int64
	size   int64
}

// part is the part of e at off, as far as it lies in e.
func (e extent) part(name string, off, size int64) extent {
	if off < 0 || off > e.size || size < 0 {
		return extent{e.name + name, e.offset, 0}
	}
	return extent{e.name + name, e.offset + off, min(size, e.size-off)}
}

// read is what e holds at off; nil if that does not lie in it.
func (s *scan) read(e extent, off, length int64) []byte {
	if off < 0 || length <= 0 || off > e.size-length || s.err != nil {
		return nil
	}
	if s.bytes += length; s.bytes > maxBytes {
		s.err = ErrTooMany
		return nil
	}
	b := make([]byte, length)
	if n, err := s.r.ReadAt(b, e.offset+off); n < len(b) {
		s.err = fmt.Errorf("%d bytes at %d: %w", length, e.offset+off, err)
		return nil
	}
	if s.err = s.ctx.Err(); s.err != nil {
		return nil
	}
	return b
}

// add makes length bytes at off in e a place, as far as they lie there.
func (s *scan) add(e extent, name string, off, length int64) {
	e = e.part("", off, length)
	if e.size == 0 || s.err != nil {
		return
	}
	sum := sha256.New()
	for at := int64(0); at < e.size; at += mib {
		b := s.read(e, at, min(mib, e.size-at))
		if b == nil {
			return
		}
		sum.Write(b)
	}
	s.append(Place{e.name + name, e.offset, e.size, hex.EncodeToString(sum.Sum(nil))})
}

// addRead makes a place at off in e of what was read there, some of it made equal.
func (s *scan) addRead(e extent, name string, off int64, b []byte) {
	sum := sha256.Sum256(b)
	s.append(Place{e.name + name, e.offset + off, int64(len(b)), hex.EncodeToString(sum[:])})
}

func (s *scan) append(p Place) {
	if s.err == nil && len(s.places) == maxPlaces {
		s.err = ErrTooMany
	}
	if s.err == nil {
		s.places = append(s.places, p)
	}
}

// content adds the places of whatever e holds: first those that tell what was
// written, then its first and last bytes, edge of each.
func (s *scan) content(e extent, edge int64, depth int) {
	if e.size < 512 || depth > maxDepth {
		return
	}
	s.ext(e)
	s.xfs(e)
	s.btrfs(e)
	s.f2fs(e)
	s.swap(e)
	s.luks(e)
	s.lvm(e, depth)
	s.md(e, depth)
	s.partitions(e, depth)
	if s.running {
		return
	}
	s.add(e, "first "+sizeName(edge), 0, edge)
	s.add(e, "last "+sizeName(edge), max(0, e.size-edge), edge)
}

func sizeName(n int64) string {
	if n >= mib {
		return "MiB"
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
