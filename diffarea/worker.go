package diffarea

import (
	"slices"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Worker is what one queue brings to the difference areas it works on: its way
// to start I/O, and its free copies and waiters, so that the steady state
// allocates nothing. It belongs to the queue's thread.
//
// What a turn of the queue brings, requests and completions alike, is gathered
// and put to the logs at the turn's end: one lock for all, and what lies side
// by side is read together.
type Worker struct {
	q           blockdev.Queue
	freeCopies  *Copy
	freeWaiters *waiter

	ended   copyList // whose data has landed, or never will
	touched []*Log   // of these, and of claimed copies
	spare   []*Log   // to take turns with touched
	task    blockdev.Task
	posted  bool
	ready   copyList // to be started

	use     []*Area // see Use
	useTask blockdev.Task
	using   bool // useTask is posted
	pinned  []pinnedPool
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

// settleLater has the log settled at the end of the turn.
func (w *Worker) settleLater(l *Log) {
	if !slices.Contains(w.touched, l) {
		w.touched = append(w.touched, l)
	}
	if !w.posted {
		w.posted = true
		w.q.Post(&w.task)
	}
}

// endTurn is the end of a turn.
func (w *Worker) endTurn() {
	w.posted = false
	logs, ended := w.touched, w.ended
	w.touched, w.ended = w.spare, copyList{}
	for _, l := range logs {
		var woken waitList
		var others copyList
		l.mu.Lock()
		for c := ended.pop(); c != nil; c = ended.pop() {
			if c.area.log == l {
				c.endLocked(&woken)
			} else {
				others.push(c)
			}
		}
		ended = others
		l.settle(w, woken)
	}
	clear(logs)
	w.spare = logs[:0]
}

// readBatch is how many bytes of several chunks are read at a time.
const readBatch = 1 << 20

// startReady starts what is ready. The chunks of a read follow each other on
// the disk and in the pool; followers have nothing to read and may stand in
// between.
func (w *Worker) startReady() {
	var first, last *Copy // of a read
	for c := w.ready.pop(); c != nil; c = w.ready.pop() {
		switch {
		case !c.reads():
			c.start()
		case last != nil && last.adjoins(c) && c.end()-first.begin() <= readBatch:
			last.joined, last, c.started = c, c, true
		default:
			if first != nil {
				first.start()
			}
			first, last = c, c
		}
	}
	if first != nil {
		first.start()
	}
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

// wakeAll wakes a list of waiters from w's thread.
func wakeAll(w *Worker, list *waiter) {
	for list != nil {
		wt := list
		list = wt.next
		if wt.w == w {
			wt.run()
		} else {
			wt.w.q.Post(&wt.task)
		}
	}
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
