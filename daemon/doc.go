// Package daemon does what package control asks for. It serves the calls on a
// UNIX socket, and puts filters and snapshots together from the engine's parts.
//
//	control.Client ══ control.sock ══ server ── Daemon ── filter, snapshots
//
// # The run directory
//
//	/run/ublk-blksnap/
//	  daemon.lock    locked by flock(2) while a daemon lives; holds its process number
//	  boot.lock      locked while tables and rules of the boot are changed
//	  control.sock
//	  read.sock      for the members of a group, who may look: see readers.go
//	  guard.lock     held by flock(2) while a guard lives; see guard.go
//	  daemon.log     of a daemon that was started by a command
//	  state/         a tmpfs of its own, mounted in the namespace of whoever starts
//	                 the daemon, so that it outlives the daemon
//	    format       which files there are; statefile, see format.go
//	    start        how the daemon was started, and who starts the next one; statefile
//	    record.json  what a daemon has while it lives, so that the next one can say
//	                 what was lost if it died; statefile
//	    devices/     a record of each filter; statefile
//	    cbt/         its change map, mapped
//	    counters/    its counters, mapped; see counters.go
//	    snapshots/   see package snapshots
//	    events.json  what happened to snapshots; statefile
//	    recoveries   how often a daemon has taken over; statefile
//	    removed      which filters of boot.go somebody has removed; statefile
//	    frozen       what a take has frozen
//	    hooks        which hooks of a take have to be run after it; statefile
//	  udev/          a file per kernel device name, for the udev rules
//
// Nobody but root may be able to write to the run directory, or to put another
// directory in its place or in the place of one above it. The daemon follows no
// link when it opens something in the run directory.
// What the next daemon reads or changes before it serves lies on the tmpfs, which the
// kernel never swaps: the swap may be on a disk that waits for that daemon. The files
// above it are only locked and replaced then.
// The names under /dev/ublk-blksnap are the machine's, whichever run directory a
// daemon has: see link.go.
//
// # Concurrency
//
// The daemon does one change at a time. [Daemon] has a lock, opLock, which every
// operation that adds, removes or takes anything holds from beginning to end. Who
// only looks (list, status, info, events) takes the lock "use" of the device or
// snapshot for reading, and the mutex of the tables, mu, which is never held during
// I/O. Lock order: opLock, use, mu, and last the event log's, under which nothing is taken. The queue threads of the devices take none of
// them.
//
// What callers can use of the daemon is bounded: see server.go. A request is
// small, or the daemon reads it piece by piece. There are five classes of calls:
// those that look, change, mark, watch, and read long answers. Each class has its
// own places, so that no class waits for another. The daemon holds no lock of a
// device while it waits for a caller.
//
// # The end of a daemon
//
// SIGTERM, SIGINT and [control.API].Stop ask the daemon to stop. If no device is
// mounted, open or held by a snapshot, the daemon syncs and removes them all, and
// ends with status 0. Otherwise it removes nothing, says which device is used by
// whom, and keeps running, because its end would cut a mounted filesystem from its
// disk. Unmount the filesystem, then stop the daemon again.
//
// Under systemd SIGPWR says that the machine ends: see machine_end.go.
//
// After a SIGKILL the I/O of the devices waits (state "quiesced") for the next
// daemon, which takes them over before it listens: see takeover.go. What that one
// cannot take over is in [control.Info].Lost, and stays until it can, or until it is
// removed by force.
package daemon
