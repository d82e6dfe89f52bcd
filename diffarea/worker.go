package diffarea

import "github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"

// Worker is what one queue brings to the difference areas it works on: its way
// to start I/O, and its stock of copies and waiters, so that the steady state
// allocates nothing. It belongs to the queue's thread.
type Worker struct {
	q       blockdev.Queue
	copies  *Copy
	waiters *waiter

	ready     copyList // to be started
	gathering bool     // not before Start
}

// NewWorker makes the worker of queue q.
func NewWorker(q blockdev.Queue) *Worker { return &Worker{q: q} }

// Gather makes the copies that Protect starts wait for Start, which reads those
// that lie side by side together.
func (w *Worker) Gather() { w.gathering = true }

// Start ends what Gather began.
func (w *Worker) Start() {
	w.gathering = false
	w.startReady()
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

// waiter takes one from the stock.
func (w *Worker) waiter(wake func()) *waiter {
	t := w.waiters
	if t == nil {
		t = &waiter{w: w}
		t.task.Run = t.run
	} else {
		w.waiters = t.next
	}
	t.wake, t.next = wake, nil
	return t
}

// run wakes the request, on its own thread.
func (t *waiter) run() {
	wake := t.wake
	t.wake = nil
	t.next, t.w.waiters = t.w.waiters, t
	wake()
}

// wakeAll wakes a list of waiters from w's thread.
func wakeAll(w *Worker, list *waiter) {
	for list != nil {
		t := list
		list = t.next
		if t.w == w {
			t.run()
		} else {
			t.w.q.Post(&t.task)
		}
	}
}

// waitList is a list of waiters in order.
type waitList struct{ head, tail *waiter }

func (l *waitList) push(t *waiter) {
	if l.tail == nil {
		l.head = t
	} else {
		l.tail.next = t
	}
	l.tail = t
}

// take empties the list into dst.
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
