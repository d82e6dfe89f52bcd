package blockdev

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// The thread of a RingQueue does the same turn again and again. This file has the
// order of a turn, what a turn delivers (posted tasks, completions), and how another
// thread wakes the queue.

// The user_data of a ring entry says in its high half what the entry is, and in its
// low half which one.
const (
	kindOp      uint64 = iota << 32 // low half: slot
	kindCommand                     // low half: tag
	kindWake
	kindPause        // low half: slot
	kindMask  uint64 = 0xffffffff << 32
)

// Post runs t.Run on the queue's thread. After the end of the queue it does
// nothing.
func (q *RingQueue) Post(t *Task) {
	for {
		head := q.posted.Load()
		t.next = head
		if q.posted.CompareAndSwap(head, t) {
			break
		}
	}
	q.wake()
}

// wake makes a sleeping queue look at what was posted. No wake-up is lost, because of
// the order on both sides: a poster publishes its task and then looks at armed, and
// the queue sets armed and then looks for published tasks.
func (q *RingQueue) wake() {
	if q.armed.Load() && q.armed.CompareAndSwap(true, false) {
		q.signal()
	}
}

// signal completes the read of the eventfd.
func (q *RingQueue) signal() {
	one := [8]byte{1}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.wakeFd < 0 {
		return
	}
	for {
		_, err := unix.Write(q.wakeFd, one[:])
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (q *RingQueue) run() {
	for {
		q.runTasks()
		q.runFinished()
		q.startWaiting()
		switch {
		case !q.stopping.Load() || !q.idle():
			if !q.wakeRead {
				q.readWake()
			}
		case !q.wakeRead:
			q.endRaw()
			return
		case !q.ending:
			// The last entry in the ring is the read of the eventfd.
			q.ending = true
			q.signal()
		}
		q.wait()
		if q.reap() {
			q.beginRaw()
		}
	}
}

// idle says whether nothing is left to do.
func (q *RingQueue) idle() bool {
	return q.inFlight == 0 && (q.commands == 0 || q.abandoned.Load()) && q.waiting.head == nil &&
		q.finished.head == nil && q.posted.Load() == nil
}

// runTasks runs what was posted, in the order of posting.
func (q *RingQueue) runTasks() {
	if q.posted.Load() == nil {
		return
	}
	newest := q.posted.Swap(nil)
	var oldest *Task
	for newest != nil {
		next := newest.next
		newest.next = oldest
		oldest, newest = newest, next
	}
	for oldest != nil {
		t := oldest
		oldest = t.next
		t.next = nil
		t.Run()
	}
}

// runFinished hands out the operations that needed no I/O. If their Done adds further
// ones, these wait for the next turn.
func (q *RingQueue) runFinished() {
	list := q.finished
	q.finished = opList{}
	for op := list.pop(); op != nil; op = list.pop() {
		op.Done(op)
	}
}

// sqe is a free entry of the submission queue. If the queue is full, it is submitted
// first.
func (q *RingQueue) sqe() *uring.SQE {
	for {
		if s := q.ring.SQE(); s != nil {
			return s
		}
		if err := q.ring.Submit(); err != nil {
			panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
		}
	}
}

// Command is an entry for a command of the layer above. The command's result goes to
// OnCommand, with tag. The caller fills the entry with a Prep method at once, and
// leaves UserData alone. Command is called on the queue's thread only.
func (q *RingQueue) Command(tag uint32) *uring.SQE {
	s := q.sqe()
	s.UserData = kindCommand | uint64(tag)
	q.commands++
	return s
}

func (q *RingQueue) readWake() {
	s := q.sqe()
	s.PrepRead(q.wakeFd, uint64(uintptr(unsafe.Pointer(&q.wakeBuf[0]))), 8, 0, 0)
	s.UserData = kindWake
	q.wakeRead = true
}

// reap hands out completions and says whether there were any.
func (q *RingQueue) reap() bool {
	any := false
	for {
		n := q.ring.Reap(q.cqes[:])
		for i := range n {
			c := &q.cqes[i]
			which := uint32(c.UserData)
			switch c.UserData & kindMask {
			case kindOp:
				q.completed(which, c.Res)
			case kindCommand:
				q.commands--
				q.cfg.OnCommand(which, c.Res)
			case kindWake:
				q.wakeRead = false
				q.ending = false
			case kindPause:
				q.issue(which)
			}
		}
		any = any || n > 0
		if n < len(q.cqes) {
			return any
		}
	}
}
