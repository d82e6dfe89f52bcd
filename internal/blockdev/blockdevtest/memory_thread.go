package blockdevtest

import (
	"runtime"
	"sync"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// MemoryThread is a Queue over Memory files on a goroutine of its own: real
// threads, for tests of what happens side by side. Operations take effect and
// complete in any order.
type MemoryThread struct {
	random Random         // of the goroutine
	ops    []*blockdev.Op // of the goroutine: in flight

	mu     sync.Mutex
	wake   sync.Cond
	tasks  []*blockdev.Task
	closed bool
	ended  sync.WaitGroup
}

// NewMemoryThread starts a queue; seed makes its choices, though not those of
// the Go scheduler.
func NewMemoryThread(seed uint64) *MemoryThread {
	q := &MemoryThread{random: NewRandom(seed)}
	q.wake.L = &q.mu
	q.ended.Add(1)
	go q.loop()
	return q
}

// Submit starts op; on the queue's goroutine only.
func (q *MemoryThread) Submit(op *blockdev.Op) {
	op.Err = 0
	q.ops = append(q.ops, op)
}

// Post runs t on the queue's goroutine.
func (q *MemoryThread) Post(t *blockdev.Task) {
	q.mu.Lock()
	q.tasks = append(q.tasks, t)
	q.mu.Unlock()
	q.wake.Signal()
}

// Close ends the queue when nothing is under way any more.
func (q *MemoryThread) Close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.wake.Signal()
	q.ended.Wait()
}

func (q *MemoryThread) loop() {
	defer q.ended.Done()
	for {
		q.mu.Lock()
		for len(q.tasks) == 0 && len(q.ops) == 0 && !q.closed {
			q.wake.Wait()
		}
		var t *blockdev.Task
		if n := len(q.tasks); n > 0 && (len(q.ops) == 0 || q.random.OneIn(2)) {
			t, q.tasks = q.tasks[0], q.tasks[1:]
		}
		q.mu.Unlock()
		switch {
		case t != nil:
			t.Run()
		case len(q.ops) == 0:
			return
		default:
			q.one()
		}
		if q.random.OneIn(4) {
			runtime.Gosched()
		}
	}
}

// one completes one of the operations in flight.
func (q *MemoryThread) one() {
	n := len(q.ops) - 1
	i := q.random.Intn(n + 1)
	op := q.ops[i]
	q.ops[i] = q.ops[n]
	q.ops = q.ops[:n]
	m := op.File.(*Memory)
	mark := m.begun()
	var by landing
	if op.Err = m.check(op); op.Err == 0 {
		if op.Kind != blockdev.Flush {
			m.apply(op, &by, 0, op.Len)
		}
		if q.random.OneIn(4) {
			runtime.Gosched()
		}
		m.completed(op, &by, mark)
	}
	op.Done(op)
}
