// Package blockdevtest holds doubles of package blockdev: disks, files and
// queues for tests. No binary of the product contains them.
//
//   - Memory is a disk or a file in memory that can lose, at a power failure,
//     what was not synced.
//   - Sched plays threads and disks in one goroutine, in an order that a seed
//     decides. Its queues (SchedQueue) operate on Memory. NewMemoryQueue makes the
//     simplest one: a single queue that does everything in order.
//   - MemoryThread is a queue over Memory on a goroutine of its own, for tests
//     with the race detector.
//   - Faulty is any queue with chosen operations (Faults) failing.
//
// All of them keep what blockdev promises about order and durability, and no more
// than that. So code that passes with them does not depend on the accidents of one
// disk.
package blockdevtest
