// Package cbtstate keeps a change map while its disk has no filter, and says later
// whether it may be believed.
//
//	filter ends:  stop serving ─> sync the disk ─> fingerprint ─> KEY.map ─> KEY.json
//	filter comes: KEY.json ─> is it this disk, and as it was left? ─> KEY.used ─> first write
//
// KEY is made of the disk's identity. The record, KEY.json, is what makes the map
// count: it appears last, and is renamed before anything can be marked. So a record
// is there only after a clean end, and no record is used twice: a filter that ends in
// any other way leaves KEY.used alone. Each step is on stable storage before the next
// one begins; a power failure between any two leaves either the whole state or none.
//
// The history of a disk is believed if all of this holds:
//
//   - the record and the map are whole, of this version, and root's alone, as is the
//     directory with everything above it;
//   - the disk has the identity, the size and the block size that it had;
//   - in the same boot, and if the disk was there all the time, the kernel has counted
//     no write since;
//   - its fingerprint is the same.
//
// Of a disk that has a filter there is running state, for who finds it after a power
// failure: KEY.running, a record that names a base, a map that was saved while the filter
// ran, and a log of what was written since, of which package intentlog makes the map
// anew. It is believed if the disk has the identity and the size that it had, if in this
// boot, which is another one, nobody has written to it, and if its superblocks are as
// they were when the filter's daemon last looked. A clean record comes before it.
//
// Otherwise a [Refusal] says what does not, and the record is used up all the same.
//
// # Format
//
// KEY.json is one line and the record in JSON:
//
//	ublk-blksnap change map state 1 SHA-256 of "1\n" and of all that follows
//	{ "id": … }
//
// KEY.running is a record like it, with its id in the names of KEY.ID.base and KEY.ID.log.
// KEY.map and the base are what Save of a change map (package cbtmap) returned; the SHA-256 is in the record.
package cbtstate
