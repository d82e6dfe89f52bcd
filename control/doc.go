// Package control is the daemon and the way to it: HTTP and JSON over a UNIX
// socket, and a Go client.
//
//	program ── Client ══ control.sock ══ Server ── Daemon ── filter, snapimage
//	              └──────────── both are an API ─────┘
//
// Every call is "POST /v1/OBJECT/VERB" with a JSON object as its body and a JSON
// object, or an [Error], as its answer; /v1/snapshot/watch answers with a line
// of JSON per event until the caller goes away. So
//
//	curl --unix-socket /run/ublk-blksnap/control.sock -d '{}' http://d/v1/device/list
//
// works as well as the client. The socket is 0600 in a directory 0700: who can
// connect may do everything.
//
// # The run directory
//
//	/run/ublk-blksnap/
//	  daemon.lock    held by flock(2) while a daemon lives; holds its process number
//	  control.sock
//	  daemon.log     of a daemon that was started by a command
//	  state/         a tmpfs of its own, mounted in the namespace of whoever starts
//	                 the daemon, so that it outlives the daemon
//	  udev/          a file per kernel device name, for the udev rules
//
// # Concurrency
//
// The daemon does one change at a time: [Daemon] has one lock around every
// operation that adds, removes or takes anything, from beginning to end. Looking
// (list, status, info, events) waits only for a second mutex that guards the
// tables and is never held during I/O. Lock order: the first, then the second.
// The queue threads of the devices take neither.
//
// # The end of a daemon
//
// SIGTERM and SIGINT ask it to stop. If no device is mounted, open or held by a
// snapshot, the daemon syncs and removes them all and ends with status 0.
// Otherwise nothing at all is removed: the daemon logs which device is used by
// whom and keeps running, because ending would cut a mounted filesystem from its
// disk. Unmount, then stop again. What comes after a SIGKILL depends on the
// devices: those added with recovery wait with their I/O (state "quiesced") for
// a daemon to take them over, the others fail all I/O and go.
package control
