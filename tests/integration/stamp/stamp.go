// Package stamp is contents that tell who wrote them, and a model of disks under random writers
// that can say whether an image is a cut: what all disks held at one instant.
//
//	writer ── lock: new version, tick ── pwrite ── lock: tick, now it is there ──>
//	                 │ also into every open window
//	take:  open window ───────────── TakeSnapshot ───────────── close window
//	                                      ↑ the cut, some time here
//
// A sector of the image may hold what it held when the window was opened, or
// what was written to it until the window was closed. Finding the content of a
// write says that the cut came after the write was started; finding that of its
// predecessor says that the cut came before it was done. If all of them together
// leave an instant for the cut, the image is right, on one disk or on several. And
// what has been seen of it once is seen ever after.
package stamp

import "unsafe"

// SectorSize is the size of a sector in bytes.
const SectorSize = 512

// Version names the content of a sector; every write has its own.
type Version uint64

// Zeroes is the version of a sector of zeroes.
const Zeroes Version = 0

// Fill fills the sectors of p, of which the first is number sector of disk,
// with version v.
func Fill(p []byte, v Version, disk int, sector int64) {
	if v == Zeroes {
		clear(p)
		return
	}
	w := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(p))), len(p)/8)
	for ; len(w) > 0; w, sector = w[SectorSize/8:], sector+1 {
		at := uint64(disk+1)<<48 | uint64(sector)
		w[0], w[1] = uint64(v), at
		x := uint64(v)*0x9e3779b97f4a7c15 ^ at
		for i := 2; i < SectorSize/8; i++ {
			x += 0x9e3779b97f4a7c15
			w[i] = x
		}
	}
}

// Of is the version in one sector, and whether all of it is that version's
// and belongs here.
func Of(p []byte, disk int, sector int64) (Version, bool) {
	w := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(p))), SectorSize/8)
	if w[0] == 0 {
		for _, x := range w {
			if x != 0 {
				return 0, false
			}
		}
		return Zeroes, true
	}
	at := uint64(disk+1)<<48 | uint64(sector)
	if w[1] != at {
		return Version(w[0]), false
	}
	x := w[0]*0x9e3779b97f4a7c15 ^ at
	for _, y := range w[2:] {
		if x += 0x9e3779b97f4a7c15; x != y {
			return Version(w[0]), false
		}
	}
	return Version(w[0]), true
}
