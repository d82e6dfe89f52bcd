// Package cbtmap is the change map of one original disk. It says which blocks
// changed since which take.
//
// # Numbers
//
// The size of a block is a power of two (see [Params]). There are two maps, and
// each block has one byte in either. Writes mark the active map. A take copies
// the active map to the readable map, and readers see only the readable map. A
// mark is the number of the coming take. So after that take
//
//	changed since take n  <=>  byte > n
//
// A number means something only within its generation, which has a UUID. A byte
// can tell 255 numbers apart. When they have run out, the next take begins a new
// generation:
//
//	event            GenerationID  ChangesNumber  marks write  active map    readable map
//	created          G1            0              1            all 0         all 0
//	take 1           G1            1              2            kept          bytes 0..1
//	take k           G1            k              k+1          kept          bytes 0..k
//	take 254         G1            254            255          kept          bytes 0..254
//	take 255         G2            0              1            all 0         all 0
//	take 256         G2            1              2            kept          bytes 0..1
//	take 510         G3            0              1            all 0         all 0
//	a corrupted
//	map's next take  G'            0              1            all 0         all 0
//	NewGeneration,
//	Resize           G'            0              1            all 1         all 0
//
// Number 0 of G2 and G3 is a take like any other: a backup may use it as the base
// of an increment. NewGeneration and Resize begin a generation outside a take.
// Such a generation knows nothing of what came before it, so every block counts
// as changed since its number 0. ChangesNumber is never above 254.
//
// # Readers
//
// A backup keeps the generation and the number of the take that it has copied:
// its base. A later take may still be of the base's generation. Then the increment
// is all blocks with byte > base number. Otherwise the increment is the whole
// device. [Map.Changes] and [Map.ReadMap] are told the generation, and fail with
// [ErrGeneration] if it has ended.
//
// A base is what [Map.Switch] returned for that take. [Map.Info] is no base: if
// several snapshots of a device are held, it may already speak of a later take.
//
// A write to an image marks both maps. So whoever reads the map afterwards finds
// that block in the increment of the image's own take. The next take's increment
// has it in any case.
//
// # Concurrency
//
// Mark runs on all queue threads at once, without a lock. The caller's gate
// keeps Mark out of Switch, Void, NewGeneration, Resize, Save, Load and Close.
// Everything else may be called at any time.
//
// # What survives
//
// Maps and header lie in one piece of memory, which outlives the process. In the
// daemon it is a mapped file on a tmpfs:
//
//	0      header, copy 0     of the copies whose checksum is right
//	128    header, copy 1     the newer one counts
//	256    corrupted flag     8 bytes, not 0: corrupted
//	512    active map         one byte a block, padded to 64
//	...    readable map       one byte a block, padded to 64
//
// [Open] mends the map after a SIGKILL between any two stores. A take that was cut
// short has not happened, though some blocks may count as changed too early. A new
// generation that was cut short leaves the map corrupted, even if a take began it.
// The next take begins another generation, and with it the map is whole again.
//
// None of this survives a power failure. What [Map.Save] returns is for a clean end. Package
// intentlog brings a map over a power failure, with [Map.Copy] and [Map.Restore].
package cbtmap
