// Package blockdevtest holds doubles of package blockdev: disks, files and
// queues for tests, which never reach a product's binary.
//
//   - Memory is a disk or a file in memory that can lose, at a power failure,
//     what was not synced.
//   - Sched plays threads and disks in one goroutine, in an order that a seed
//     decides. Its queues (SchedQueue) operate on Memory. NewMemoryQueue is the
//     simplest: one queue, everything in order.
//   - MemoryThread is a queue over Memory on a goroutine of its own, for tests
//     with the race detector.
//   - Faulty is any queue with chosen operations (Faults) failing.
//
// All of them keep what blockdev promises about order and durability and no
// more than that, so that code which passes with them does not live on an
// accident of one disk.
package blockdevtest
