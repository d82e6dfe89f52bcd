// Package diffarea keeps what a snapshot needs of its disks: before a chunk of an
// original disk is overwritten for the first time since the cut, its old data is
// copied, first into memory, then to the difference storage.
//
//	Area    one disk in one snapshot: a word per chunk says where its data is
//	Log     one snapshot: regions, handed out in order to the chunks of all its
//	        areas; each is in a slot of the pool (memory) until it is stored
//	Worker  one queue's thread: starts the copies that its requests need
//	Copy    one chunk on its way
//
// # The way of one copied write
//
// A write comes to a chunk that is NEW. T is the thread of its queue. The lock is
// Log.mu, and no I/O or callback happens under it.
//
//  1. Claim (Area.Protect, on T, locked). The word is looked at again: if somebody
//     has copied the chunk meanwhile, the write goes on. If somebody is copying it
//     now, the write waits for that copy. Else a new Copy waits for a region, in
//     Log.waiting, and the write waits for the Copy.
//  2. End of turn (Worker.work, on T, locked). It runs once for all that the turn
//     of the queue brought, and ends in Log.settle, as every change of the log does.
//  3. Grant (Log.grantLocked, in settle). The Copy gets the next region and its
//     slot: COPYING. If the slot is still taken, the Copy stays where it is until a
//     store has freed it (8); if there is no storage behind the region, until that
//     has grown. If it cannot grow, the snapshot breaks.
//  4. Read (Worker.startReady, Copy.read, on T). Neighbours are read together,
//     from the original disk into their slots. A follower does not read: the Copy
//     of a larger chunk around it, in another snapshot, lends it the data (lendData).
//  5. Word (Copy.landed, finish, on T, no lock). The data is in the slot, and one
//     store to the chunk's word says so: IN_MEMORY. From here on images read the
//     chunk there, and a death of the process leaves it there.
//  6. Settle (Worker.work, Copy.endLocked, on T, locked). At the end of that turn
//     the slot is LANDED, and whoever waited for the Copy is set free.
//  7. Wake (wakeAll, no lock). The write goes on to the original disk.
//  8. Store (Log.nextStoreLocked, store.submit, store.done). The write does not
//     wait for this. A stretch of landed regions goes to the storage in one write:
//     STORING. When it has arrived the words say STORED, without the lock; then,
//     locked, the slots are FREE, and settle gives them to whoever waits in 3.
//
// The way changes threads in three places. A region may be granted (3) by any
// thread that settles the log, which then posts the Copy to T. A Copy wakes (7) the
// requests of other queues by posting to their threads. A store (8) runs on the
// thread whose settle found it due: often T, in 6.
//
// If the read fails, the slot is DEAD, the word FAILED and the log broken (6), but
// the write goes on all the same. In a broken log nothing is granted any more:
// copies that wait are ended without having read, and their writes go on.
//
// An image's write to a NEW chunk takes the same way from Area.Fill: it settles the
// log at once, and in place of 4 the image fills the slot (Copy.Filled). To a chunk
// in memory it waits until that is stored (Area.AwaitStored).
//
// # What outlives the process
//
// The words, the log's state and the pool are memory mapped shared. They change by
// single stores, each after what it speaks of: the slot has the data before the
// word says IN_MEMORY, the storage before it says STORED, and the slot is given
// away after that. OpenLog, OpenArea and Resume go on from there.
package diffarea
