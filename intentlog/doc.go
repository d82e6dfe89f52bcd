// Package intentlog is the write-intent log of one original disk. With it a change
// map outlives a power failure.
//
// The map lies in memory. On stable storage there are an older copy of it, the base,
// and the log. The log says which zones of the disk were written since. A zone is a
// power of two, 1 MiB at least. After a power failure
//
//	map  =  base  +  every block of a zone that the log names counts as changed
//
// # Stamps
//
// The log has one entry for each zone: the stamp of the last write that had to wait
// for it. A stamp is an epoch and a number:
//
//	epoch   56 bits: one more with every base that is made, and with every generation
//	number   8 bits: as in the map, the number of the coming take
//
// A write marks the map. Then it asks the log ([Log.Hold]). If an entry of its zones is
// below the present stamp, it waits until the entry is on stable storage. All writes
// that came meanwhile wait for the next such write of the log together. So only the
// first write to a zone after a take or after a new base waits. All others load the
// present stamp and the zone's entry, and go.
//
//	write ──> mark the map ──> entry >= stamp? ── yes ──────────────> original disk
//	                               no └> write the entry durably ──┘
//
// Stamps only ever rise, so an entry is changed in place and nothing is ever erased.
//
// # Base
//
// [Log.Base] begins an epoch and then copies the map, while writes go on. A write that
// has been held under the epoch before had marked the map before the copy began. All
// others have an entry of the new epoch or a later one. So with a base of epoch E that
// is durable, an entry (e, n) means
//
//	e < E   nothing: it is in the base
//	e = E   the zone's blocks changed with mark n
//	e > E   the zone's blocks changed just now: with the highest mark there may be
//
// This holds for every base ever made, with the log as it is at any later time. So a
// base that does not come to be durable costs nothing, and the old one stays right.
//
// # Takes
//
// A take is durable when the log's header has its number, or a base has it. Nobody may
// be told of the take before (see [Log.Taken]). Before that the original disk is
// flushed: otherwise it could lose what the take's images show, and the next increment
// would not have it. A mark above the number of the last durable take + 1 belongs to a
// take that has not happened, and counts as number + 1.
//
// # When the log fails
//
// The writes that wait go on waiting. Config.Failed is called. The owner sees to it that
// base and log are never believed again, and then calls [Log.GiveUp], which lets all
// go. From then on the log is off, and all writes pass. The engine knows no time; so the
// owner also watches whether the log answers ([Log.Waiting]).
//
// # Concurrency
//
// Hold is called on the thread of any queue. The log is written on the thread of a queue
// of its own, which serves the logs of any number of disks, so that a dead file system
// below them holds up no other I/O. All else may be called on any thread. The log has
// one mutex. It is a leaf, and only a write that has to wait takes it.
//
// # Format
//
// The file of the log, in sectors of 512 bytes, little endian. It is written in blocks
// of 4096 bytes that are aligned:
//
//	sector 0     header: magic 8, disk size 8, log2 of a zone 8, generation 16, number 8
//	sector 1…    60 entries of 8 bytes each; 0: never written
//	             sectors that fill the last block have no entries
//
//	480          of every sector: the log's ID, 16 bytes
//	496          the number of the sector, 8 bytes
//	504          0, 4 bytes
//	508          CRC-32C of all before, 4 bytes
//
// A sector of which anything is wrong makes all of it unbelievable. There is one header,
// not two in turn: if the newer one were damaged, the older one would give the number of a
// take away for a second time.
//
// A base is a sector as above, with number 0, and after it the active map, a byte a
// block:
//
//	magic 8, epoch 8, generation 16, number 8, disk size 8, block size 8, CRC-32C of the bytes 8
package intentlog
