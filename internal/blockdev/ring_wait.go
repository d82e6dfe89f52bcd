package blockdev

import (
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// How a queue waits
//
// In an ordinary wait the Go scheduler may take the thread's P, its right to run Go
// code. To get a P back costs more than all the rest of a turn. A raw wait keeps the
// P. So a queue waits raw from its first completion on, until a raw wait brings
// nothing.
//
// The runtime's own preemption signal ends a raw wait that brings nothing. A thread
// gets that signal when it has run the same goroutine for 10 ms, and at once when the
// world has to stop. A raw wait has no time limit, because to set a timer for each
// wait costs microseconds in a virtual machine. Commands that lie in the ring for
// ever, as those of ublk do, do not keep a queue raw. Only completions do.
//
// To fall asleep and to be woken costs as much again, for the queue and for the issuer
// of a request. If requests come one by one, it is most of their time. So a raw queue
// first spins for a moment. If it spun in vain, it sleeps at once the next 2, 4, 8…
// times. So a queue hardly spins for requests that come less often than spinTime.

const (
	// spinTime is about what it takes an issuer to be woken and to send its
	// next request.
	spinTime  = 50 * time.Microsecond
	maxMisses = 7
)

// spinners is how many raw queues there may be while any of them spins. So one
// processor stays for those that the queues wait for.
var spinners = runtime.NumCPU() - 1

// rawQueues is how many queues wait raw. Each of them holds a P.
var rawQueues atomic.Int32

// rawLimit is how many queues may wait raw. One P stays for everybody else. Without
// the preemption signal, which godebug can switch off, no queue may.
func rawLimit(godebug string) int32 {
	if strings.Contains(godebug, "asyncpreemptoff=1") {
		return 0
	}
	return int32(runtime.GOMAXPROCS(0)) - 1
}

// beginRaw makes the next waits raw, if that leaves a P for everybody else.
func (q *RingQueue) beginRaw() {
	if q.raw {
		return
	}
	if rawQueues.Add(1) > q.maxRaw {
		rawQueues.Add(-1)
		return
	}
	q.raw = true
}

// endRaw makes the next waits ordinary.
func (q *RingQueue) endRaw() {
	if q.raw {
		q.raw = false
		rawQueues.Add(-1)
	}
}

// wait gives new entries to the kernel and sleeps until something completes,
// unless there is work already.
func (q *RingQueue) wait() {
	if q.spins() && q.spin() {
		return
	}
	q.armed.Store(true)
	switch {
	case q.posted.Load() != nil, q.finished.head != nil,
		q.stopping.Load() && !q.ending && q.idle():
		q.armed.Store(false)
		q.enter(0, q.raw)
	case q.raw:
		q.enter(1, true)
		q.armed.Store(false)
		if q.ring.Ready() == 0 {
			q.endRaw() // interrupted: see rawLimit
		}
	default:
		q.enter(1, false)
		q.armed.Store(false)
	}
}

// spins says whether the next wait begins with spinning.
func (q *RingQueue) spins() bool {
	if !q.raw || int(rawQueues.Load()) > spinners {
		return false
	}
	if q.sleeps > 0 {
		q.sleeps--
		return false
	}
	return q.finished.head == nil && !q.stopping.Load()
}

// spin gives new entries to the kernel, looks for work for a while, and says
// whether there is any.
func (q *RingQueue) spin() bool {
	q.enter(0, true)
	for start := time.Now(); q.ring.Ready() == 0; {
		for range 32 {
			if q.posted.Load() != nil {
				q.misses = 0
				return true
			}
			if q.ring.Due() {
				q.misses = 0
				q.enter(0, true)
				return true
			}
		}
		if time.Since(start) > spinTime {
			q.misses = min(q.misses+1, maxMisses)
			q.sleeps = 1 << q.misses
			return false
		}
	}
	return true
}

// enter is the system call.
func (q *RingQueue) enter(min uint32, raw bool) {
	if err := q.ring.SubmitAndWait(min, raw); err != nil {
		// The ring is ours and the arguments are right, so nothing that a disk or a user
		// does leads here.
		panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
	}
}
