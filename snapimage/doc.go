// Package snapimage is a snapshot over several devices, and its images. It is the
// part of the engine that stands above the filters.
//
//	New ──> Add, Append ──> Take ──> images ──> Destroy
//	                         │         │
//	         filters: the cut┘         └reads and writes of the image devices
//
// The difficult work happens below: the cut in package filter, chunks and storage
// in package diffarea, the change map in package cbtmap. A [Snapshot] calls them in
// the right order, and an [Image] reads each chunk where it is.
//
// # Concurrency
//
// A Snapshot is control work. Its methods are called on the thread of one queue,
// the control queue, and call back on it. The caller waits for one to call back
// before it calls the next. Cancel, Break and Abort may come in between, and an
// Append whose storage does not answer holds up none of the others.
//
// An image is the data path. Each of its [Queue]s belongs to its own thread, and
// shares with the others only the chunk words, which are read atomically, and the
// log behind them.
//
// Like all of the engine this package knows no files, no time and no goroutines.
// Its caller gives it memory and storage, and decides how long a disk may take.
// In the daemon the caller is package snapshots. In the simulator it is
// tests/sim.
//
// # What survives
//
// The memory of [Config] may outlive the process: the log's state and pool, and
// a table of words for each device. [Reopen] takes a snapshot over from it.
// Nothing survives a power failure.
package snapimage
