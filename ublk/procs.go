package ublk

import (
	"runtime"
	"sync"
)

// A queue's thread that waits for requests keeps one of the scheduler's Ps
// (see package uring), so there must be more of them than queues: one to run
// everything else, and one for a collection of garbage beside that.
const spareProcs = 2

var procs struct {
	mu     sync.Mutex // guards all
	base   int        // GOMAXPROCS without queues; 0: not known yet
	queues int
}

// addProcs tells the scheduler of n more queues, or fewer.
func addProcs(n int) {
	procs.mu.Lock()
	defer procs.mu.Unlock()
	now := runtime.GOMAXPROCS(0)
	if procs.base == 0 {
		procs.base = now
	}
	procs.queues += n
	want := procs.base
	if procs.queues > 0 {
		want = max(want, procs.queues+spareProcs)
	}
	if want != now {
		runtime.GOMAXPROCS(want)
	}
}
