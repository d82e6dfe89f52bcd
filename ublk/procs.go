package ublk

import (
	"runtime"
	"sync"
)

// A queue's thread that waits for requests keeps one of the Go scheduler's Ps (see
// package uring). So there must be more Ps than queues: one more to run everything
// else, and one for the garbage collector beside that.
const spareProcs = 2

var procs struct {
	mu     sync.Mutex // guards all
	base   int        // GOMAXPROCS without queues; 0: not known yet
	queues int
}

// addProcs tells the scheduler that there are n more queues, or fewer if n is
// negative.
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
