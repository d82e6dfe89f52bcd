// Command bench measures each workload on each system, all in one run, and compares
// the figures with the targets of the project. It needs root and a kernel with
// ublk. "make bench" runs it in the virtual machine. BENCH, or -bench, is a regular
// expression that selects rows by SYSTEM/WORKLOAD/CHUNK. CHUNK is in KiB, and 0 if
// the system has none.
//
// # Systems
//
//	raw          the disk itself
//	loop         the kernel's loop driver over it, direct I/O
//	filter       ublk-blksnap over it, one queue, default mode, no snapshot
//	dm-snapshot  device-mapper's snapshot-origin and snapshot
//	snapshot     ublk-blksnap with a snapshot held
//	encrypted    the same, and what is stored is encrypted; with chunks of 64 KiB only
//	logged       filter over a loop device over the disk, with a write-intent log
//	unlogged     the same without one (a RAM disk, which cannot be known again, has none)
//
// Disk and difference storage are two RAM disks (brd). All of both is written
// beforehand, because a RAM disk allocates its pages on first touch: the figures
// would be those of the RAM disk, not of the system. The COW device of dm-snapshot
// is the same RAM disk that ublk-blksnap stores to. It is not persistent (N), so
// dm-snapshot keeps its table in memory, as ublk-blksnap keeps its own in a tmpfs.
//
// # Workloads
//
// All workloads are fio with io_uring and direct I/O. Their names say the rest, as
// randread-4k-qd32 does. Each of these workloads begins with a fresh snapshot:
//
//	first-randwrite-4k-qd32  4 KiB writes all over 1 GiB, no block twice: 16 MiB of
//	                         them, or 64 MiB with chunks below 64 KiB, where
//	                         16 MiB would be over in no time
//	first-write-128k-qd8     256 MiB in a row
//	zones-4k-qd32            4 KiB to each MiB, the first write to each zone of the log
//	zones-later-randwrite-4k-qd32 random writes after that
//	second-randwrite-4k-qd32 random writes to the same 256 MiB
//	image-…-cold             reads of an image of which nothing has been copied
//	image-…-half             the same after every second 256 KiB, at random, has
//	                         been overwritten
//
// # Figures
//
// The systems take turns, and a figure is the median of the turns. spread is
// (highest - lowest) / median of iops. A ratio is the median of the ratios of
// neighbours: turn i of one system to turn i of another. cpu_us_per_io is the time
// per I/O that the machine's processors were not idle, less what it costs to start
// fio. So it counts the issuer, the kernel and the daemon alike.
package main
