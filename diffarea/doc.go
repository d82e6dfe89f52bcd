// Package diffarea keeps the old data that a snapshot needs. Before a chunk of an
// original disk is overwritten for the first time since the cut, its old data is
// copied into memory. Later it is stored in the difference storage.
//
//	Area    one disk in one snapshot: a word per chunk says where its data is
//	Log     one snapshot: regions, handed out in order to the chunks of all its
//	        areas; each is in a slot of the pool (memory) until it is stored
//	Worker  one queue's thread: starts the copies that its requests need
//	Copy    one chunk on its way
//
// # The way of one copied write
//
// A write comes to a chunk that is NEW. T is the thread of its queue. "Locked"
// means that the thread holds Log.mu. No I/O and no callback happens under it.
//
//  1. Claim (area.go: Area.Protect, on T, locked). T looks at the word again. If the
//     chunk has been copied meanwhile, the write goes on. If a Copy of it is under
//     way, the write waits for that Copy. Otherwise T makes a new Copy. The Copy
//     waits for a region, in Log.waiting, and the write waits for the Copy.
//  2. Grant (log.go: Log.settle, locked). At the end of the turn the Copy gets the
//     next region and that region's slot: COPYING. If the slot is still taken, the
//     Copy waits until a store has freed it (6). If no storage is behind the region
//     yet, the Copy waits until the storage has grown. If the storage cannot grow,
//     the snapshot breaks.
//  3. Read (copy.go: copyList.start, on T). The old data is read from the original
//     disk into the slot, for neighbours in one read. A follower does not read:
//     another snapshot's Copy of a larger chunk around it lends it the data
//     (lendData).
//  4. Word (copy.go: Copy.finish, on T, no lock). The data is in the slot, and one
//     store to the chunk's word says so: IN_MEMORY. From now on images read the
//     chunk from the slot, and it stays there if the process dies.
//  5. Wake (log.go: Log.settle, on T). At the end of that turn, locked, the slot is
//     LANDED (Copy.endLocked). Then, without the lock, all who waited for the Copy
//     are woken. The write goes on to the original disk.
//  6. Store (store.go). The write does not wait for this step. The same settle gives
//     a stretch of landed regions to the storage in one write: STORING. When the
//     data has arrived (store.done), the words say STORED, without the lock. Then,
//     locked, the slots become FREE, and the next settle grants them to the Copies
//     that wait in 2.
//
// Whoever changes a log says so (Worker.settleLater). At the end of the queue's turn
// Log.settle does what all changes of the turn have made possible: one lock for all.
// It runs nowhere else but in Resume.
//
// The way changes threads in three places. Any thread that settles the log may
// grant the region (2); it then posts the Copy to T. T wakes (5) the requests of
// other queues by posting to their threads. A store (6) runs on the thread whose
// settle found it due, which is often T, in 5.
//
// If the read fails, the slot is DEAD, the word FAILED and the log broken (5). The
// write goes on all the same. A broken log grants nothing any more: copies that
// wait end without reading, and their writes go on.
//
// An image's write to a NEW chunk goes the same way, from Area.Fill. Instead of step
// 3 the image fills the slot (Copy.Filled). An image's write to a chunk that is
// IN_MEMORY waits until the chunk is stored (Area.AwaitStored).
//
// # What outlives the process
//
// The words, the log's state and the pool are memory mapped shared. They change by
// single stores, in this order: the data is in the slot before the word says
// IN_MEMORY; the data is in the storage before the word says STORED; the slot is
// given away only after that. OpenLog, OpenArea and Resume take over from there.
package diffarea
