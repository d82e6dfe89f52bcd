// Package cbtmap is the change map of one original disk: which blocks changed
// since which take.
//
// # Numbers
//
// A block is a power of two of bytes (see [Params]). Each block has one byte in
// two maps. The active map is what writes mark; a take copies it to the
// readable map, which is all that readers see. A marked byte holds the number
// of the coming take, so that after it
//
//	changed since take n  <=>  byte > n
//
// A number means something only within its generation, named by a UUID. A byte
// can tell 255 numbers apart; then a take begins a new generation instead:
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
// Number 0 of G2 and G3 is a take like any other: it may be the base of an
// increment. A generation begun by NewGeneration or Resize, outside a take,
// knows nothing of what came before it, therefore every block counts as changed
// since its number 0. ChangesNumber is never above 254.
//
// # Readers
//
// A backup keeps the generation and the number of the take it has copied: its
// base. At a later take the increment since the base is the blocks with
// byte > base number if the generation is still the base's, and the whole device
// otherwise. [Map.Changes] and [Map.ReadMap] want the generation and refuse
// another with [ErrGeneration]. A base is what [Map.Switch] returned for that
// take: where several snapshots of one device are held, a later [Map.Info] may
// already speak of the next one. Increments are between takes: writes to an
// image belong to its own take's increment for those who read it afterwards, and
// to the next take's in any case.
//
// # Concurrency
//
// Mark runs on all queue threads at once, without a lock. The caller's gate
// keeps Mark out of Switch, Void, NewGeneration, Resize, Save, Load and Close.
// Everything else may be called at any time.
//
// # What survives
//
// Maps and header lie in one region of memory, in practice a mapped file on a
// tmpfs, which outlives the process:
//
//	0      header, copy 0     the newer of the two that has a
//	128    header, copy 1     right checksum counts
//	256    corrupted flag     8 bytes, not 0: corrupted
//	512    active map         one byte a block, padded to 64
//	...    readable map       one byte a block, padded to 64
//
// A SIGKILL between any two stores is made good by [Open]: a take that was cut
// short has not happened, though some blocks may count as changed too early. A
// new generation that was cut short, at the wrap as well, leaves the map
// corrupted, which the next take mends. Nothing here survives a power failure;
// [Map.Save] is for a clean shutdown.
package cbtmap
