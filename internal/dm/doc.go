// Package dm makes, changes and removes device-mapper devices, and gives them other tables
// while they are in use.
//
//	            Load                 Swap
//	(Table) ──────────> inactive ──────────> live ──> I/O
//	                       │ Clear             │ Inactive, Live
//
// A device has one live table, and may have one more that waits. Swap is one call of the
// kernel: I/O that is under way ends on the live table, what comes meanwhile waits, and goes
// on with the other one. So no request is lost, none overtakes another, and a process that
// dies leaves the device with the one table or the other, never suspended. A swap whose
// context ends is taken back by the kernel.
//
// Load may have to wait for a disk, because it opens the devices that the table names, and so
// may Make and Remove. Swap and Suspend wait for I/O under way. The others wait for nothing
// but for other commands of device-mapper. See ARCHITECTURE for who may wait for which disk.
//
// A table may hold the key of an encrypted volume. It is never written anywhere or told, and
// Wipe overwrites it. What the kernel copies of one it overwrites too.
//
// Any number of goroutines may use a Control. An error names the device, and wraps the
// kernel's errno.
package dm
