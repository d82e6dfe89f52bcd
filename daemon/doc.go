// Package daemon does what package control asks for: it serves the calls on a
// UNIX socket, and puts filters and snapshots together from the engine's parts.
//
//	control.Client ══ control.sock ══ server ── Daemon ── filter, snapshots
//
// # The run directory
//
//	/run/ublk-blksnap/
//	  daemon.lock    held by flock(2) while a daemon lives; holds its process number
//	  control.sock
//	  daemon.log     of a daemon that was started by a command
//	  record.json    what a daemon has while it lives, for those who miss it
//	  state/         a tmpfs of its own, mounted in the namespace of whoever starts
//	                 the daemon, so that it outlives the daemon
//	  udev/          a file per kernel device name, for the udev rules
//
// Nobody but root may be able to write to it, or to a directory above it that
// could have another one put in its place; and what is opened in it is never what
// a link leads to. The names under /dev/ublk-blksnap are the machine's, whichever
// run directory a daemon has: see link.go.
//
// # Concurrency
//
// The daemon does one change at a time: [Daemon] has one lock around every
// operation that adds, removes or takes anything, from beginning to end. Looking
// (list, status, info, events) takes the lock "use" of the device or snapshot for
// reading, and the mutex of the tables, which is never held during I/O. Lock
// order: opLock, use, mu. The queue threads of the devices take none of them.
//
// What callers can use of the daemon is bounded: see server.go. A request is
// small, or the daemon reads it piece by piece. There are five classes of calls:
// those that look, change, mark, watch, and read long answers. Each class has its
// own places, so that no class waits for another. Nothing of a device is held
// while a caller takes his time.
//
// # The end of a daemon
//
// SIGTERM, SIGINT and [control.API].Stop ask it to stop. If no device is mounted,
// open or held by a snapshot, the daemon syncs and removes them all and ends with status
// 0. Otherwise nothing at all is removed: the daemon says which device is used by
// whom and keeps running, because ending would cut a mounted filesystem from its
// disk. Unmount, then stop again. What comes after a SIGKILL depends on the
// devices: those added with recovery wait with their I/O (state "quiesced") for
// a daemon to take them over, the others fail all I/O and go.
package daemon
