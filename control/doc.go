// Package control is the way to the daemon: its API, and a client that asks for
// it with HTTP and JSON over a UNIX socket.
//
//	program ── Client ══ control.sock ══ package daemon
//	              └──── both are an API ─────┘
//
// It needs nothing of what the daemon is made of, and builds on every system.
//
// Every call is "POST /v1/OBJECT/VERB" with a JSON object as its body and a JSON
// object, or an [Error], as its answer. Where the answer may be long, it is a line
// of JSON per piece: /v1/snapshot/watch has one per event until the caller goes
// away, /v1/cbt/changes one per range and /v1/cbt/map some of the map in base 64,
// both with "info" in the last one. A line with "error" ends an answer that is not
// whole. So
//
//	curl --unix-socket /run/ublk-blksnap/control.sock -d '{}' http://d/v1/device/list
//
// works as well as the client. The socket is 0600 in a directory 0700: who can
// connect may do everything.
package control
