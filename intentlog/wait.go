package intentlog

import "github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"

// Wait is somebody who may have to wait for the log: a request, again and again.
type Wait struct {
	queue       blockdev.Queue
	task        blockdev.Task
	first, last int64 // zones
	next        *Wait
}

// Init says what is to be called after the wait, and on which queue's thread.
func (w *Wait) Init(q blockdev.Queue, done func()) {
	w.queue = q
	w.task.Run = done
}

// waits is a list of them, in order.
type waits struct{ head, tail *Wait }

func (l *waits) add(w *Wait) {
	w.next = nil
	if l.head == nil {
		l.head = w
	} else {
		l.tail.next = w
	}
	l.tail = w
}

// take empties the list.
func (l *waits) take() *Wait {
	w := l.head
	*l = waits{}
	return w
}

// wake lets a list of waits go, each on its own queue's thread, where it may be used
// again at once.
func wake(w *Wait) {
	for w != nil {
		next := w.next
		w.queue.Post(&w.task)
		w = next
	}
}
