// Package control is the way to the daemon. It holds the daemon's API, and a client
// that calls it with HTTP and JSON over a UNIX socket.
//
//	program ── Client ══ control.sock ══ package daemon
//	              └──── both are an API ─────┘
//
// The package imports nothing of the daemon's parts, and builds on every system.
//
// Every call is "POST /v1/OBJECT/VERB" with a JSON object as its body. The answer
// is a JSON object, or an [Error]. A long answer is several lines, one JSON object
// each. /v1/snapshot/watch sends a line for each event until the caller goes away. If the
// daemon ends, the caller asks the next one for what came "since" the last "seq".
// /v1/cbt/changes sends a line for each range, and /v1/cbt/map a line for each
// piece of the map, in base 64. The last line of these two has "info". A line with
// "error" ends an answer, and means that the answer is not whole. So
//
//	curl --unix-socket /run/ublk-blksnap/control.sock -d '{}' http://d/v1/device/list
//
// works as well as the client. The socket has mode 0600, and whoever can connect may do
// everything. If the daemon is configured with a group, the members of that may look: on
// read.sock beside it, which knows the calls that change nothing.
package control
