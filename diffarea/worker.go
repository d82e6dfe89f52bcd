package diffarea

import (
	"slices"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Worker is what one queue brings to the difference areas it works on: its way
// to start I/O, and its free copies and waiters, so that the steady state
// allocates nothing. It belongs to the queue's thread.
//
// The logs that a turn of the queue has changed, by requests and completions
// alike, are settled at the turn's end: one lock for all changes, and what lies
// side by side is read and stored together.
type Worker struct {
	q           blockdev.Queue
	freeCopies  *Copy
	freeWaiters *waiter

	turn   []change // what this turn has brought, by log
	spare  []change // to take turns with turn
	task   blockdev.Task
	posted bool

	use     []*Area // see Use
	useTask blockdev.Task
	using   bool // useTask is posted
	pinned  []pinnedPool
}

// change is what a turn has brought to one log: copies that have ended, perhaps
// none, and whatever else was changed under the log's lock.
type change struct {
	log   *Log
	ended copyList // their data has landed, or never will
}

// pinnedPool is a log's pool that the queue holds ready.
type pinnedPool struct {
	log   *Log
	index int32
}

// NewWorker makes the worker of queue q.
func NewWorker(q blockdev.Queue) *Worker {
	w := &Worker{q: q}
	w.task.Run = w.endTurn
	w.useTask.Run = w.pin
	return w
}

// UseFromStart is Use on another thread, before w's serves anything.
func (w *Worker) UseFromStart(areas []*Area) {
	if _, ok := w.q.(blockdev.Pinner); ok && len(areas) > 0 {
		w.q.Post(&blockdev.Task{Run: func() { w.Use(areas) }})
	}
}

// Use tells the worker which areas it will work on from now on, so that their
// pools are pinned and no others; see blockdev.Pinner. On w's thread. Pinning
// takes a while: what the caller starts beside goes first.
func (w *Worker) Use(areas []*Area) {
	w.use = areas
	if _, ok := w.q.(blockdev.Pinner); ok && !w.using {
		w.using = true
		w.q.Post(&w.useTask)
	}
}

// pin does what Use has asked for.
func (w *Worker) pin() {
	w.using = false
	pinner := w.q.(blockdev.Pinner)
	w.pinned = slices.DeleteFunc(w.pinned, func(p pinnedPool) bool {
		gone := !slices.ContainsFunc(w.use, func(a *Area) bool { return a.log == p.log })
		if gone {
			pinner.Unpin(p.index)
		}
		return gone
	})
	for _, a := range w.use {
		if w.pool(a.log) != blockdev.NoIndex {
			continue
		}
		if index, err := pinner.Pin(a.log.pool.Mem); err == nil {
			w.pinned = append(w.pinned, pinnedPool{a.log, index})
		}
	}
}

// pool is the index of l's pool with the worker's queue, or blockdev.NoIndex.
func (w *Worker) pool(l *Log) int32 {
	for _, p := range w.pinned {
		if p.log == l {
			return p.index
		}
	}
	return blockdev.NoIndex
}

// slots is the memory of a pool from region r's slot on.
func (w *Worker) slots(l *Log, r Region) blockdev.Buf {
	b := blockdev.MemBuf(l.pool.Mem)
	b.Index = w.pool(l)
	return b.At(int64(r%l.poolSlots) << l.shift)
}

// settleLater has the log settled at the end of the turn. Every change of a log
// ends with it, on w's thread and without the lock. It returns what the turn has
// brought to the log, good until the next call.
func (w *Worker) settleLater(l *Log) *change {
	if !w.posted {
		w.posted = true
		w.q.Post(&w.task)
	}
	for i := range w.turn {
		if w.turn[i].log == l {
			return &w.turn[i]
		}
	}
	w.turn = append(w.turn, change{log: l})
	return &w.turn[len(w.turn)-1]
}

// endTurn is the end of a turn. What it changes itself is for the next one.
func (w *Worker) endTurn() {
	w.posted = false
	turn := w.turn
	w.turn = w.spare
	for _, ch := range turn {
		ch.log.settle(w, ch.ended)
	}
	clear(turn)
	w.spare = turn[:0]
}

// waiter is a request that waits for a chunk. It is woken once, on its own
// worker's thread.
type waiter struct {
	w    *Worker
	wake func()
	task blockdev.Task
	next *waiter
}

// newWaiter takes one from the free list.
func (w *Worker) newWaiter(wake func()) *waiter {
	wt := w.freeWaiters
	if wt == nil {
		wt = &waiter{w: w}
		wt.task.Run = wt.run
	} else {
		w.freeWaiters = wt.next
	}
	wt.wake, wt.next = wake, nil
	return wt
}

// run wakes the request, on its own thread.
func (wt *waiter) run() {
	wake := wt.wake
	wt.wake = nil
	wt.next, wt.w.freeWaiters = wt.w.freeWaiters, wt
	wake()
}

// waitList is a list of waiters in order.
type waitList struct{ head, tail *waiter }

func (l *waitList) push(wt *waiter) {
	if l.tail == nil {
		l.head = wt
	} else {
		l.tail.next = wt
	}
	l.tail = wt
}

// moveTo empties the list into dst.
func (l *waitList) moveTo(dst *waitList) {
	if l.head == nil {
		return
	}
	if dst.tail == nil {
		dst.head = l.head
	} else {
		dst.tail.next = l.head
	}
	dst.tail = l.tail
	l.head, l.tail = nil, nil
}

// wake wakes all of the list from w's thread, with no lock held.
func (l *waitList) wake(w *Worker) {
	for wt := l.head; wt != nil; {
		next := wt.next
		if wt.w == w {
			wt.run()
		} else {
			wt.w.q.Post(&wt.task)
		}
		wt = next
	}
}
