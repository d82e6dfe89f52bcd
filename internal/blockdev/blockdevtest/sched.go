package blockdevtest

import (
	"container/heap"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Sched plays the threads and the disks of a process in one goroutine. It has any
// number of Queues, and Step lets one thing happen. A seed decides what happens next,
// so a run can be repeated exactly.
//
// An operation on a Memory file takes effect at some moment between Submit and
// Done, a longer one in pieces with other things in between. So overlapping
// operations come out in any order and readers see writes half done, as the
// package allows.
//
// With seed 0 nothing is chosen: everything takes effect and completes in the
// order of submission, which is what a simple unit test wants.
type Sched struct {
	// OnSubmit, OnEffect and OnComplete look at every operation: as it is
	// submitted, before n of its bytes from off take effect, before Done runs.
	OnSubmit   func(q *SchedQueue, op *blockdev.Op)
	OnEffect   func(q *SchedQueue, op *blockdev.Op, off, n int64)
	OnComplete func(q *SchedQueue, op *blockdev.Op)

	random Random
	orders bool // seed is not 0
	now    uint64
	events eventHeap
	seq    uint64
	steps  uint64
	slow   map[*Memory]uint
	stuck  map[*Memory][]*event
	flight map[*blockdev.Op]*event
	thread *SchedQueue // whose code is running
}

// Random is a small generator of choices whose sequence is part of what a seed
// means: it does not change with the Go version.
type Random struct{ state uint64 }

// NewRandom makes a generator; equal seeds make equal choices.
func NewRandom(seed uint64) Random { return Random{state: seed} }

// Uint64 is the next 64 bits (splitmix64).
func (r *Random) Uint64() uint64 {
	r.state += 0x9e3779b97f4a7c15
	z := r.state
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// Intn is a choice of 0 … n-1.
func (r *Random) Intn(n int) int {
	hi, _ := bits.Mul64(r.Uint64(), uint64(n))
	return int(hi)
}

// OneIn is true once in n times.
func (r *Random) OneIn(n int) bool { return r.Intn(n) == 0 }

// event is one operation in flight, or one posted task.
type event struct {
	at     uint64
	seq    uint64
	queue  *SchedQueue
	posted bool   // the first of queue.tasks is due; or:
	call   func() // this is; or:

	op     *blockdev.Op
	was    blockdev.Op // op as submitted
	file   *Memory
	pieces []int64 // where the pieces that have not taken effect end
	from   int64   // what has
	by     landing
	mark   uint64
	errno  unix.Errno
	dead   bool // nobody waits for it: the process was killed
}

type eventHeap []*event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	if h[i].at != h[j].at {
		return h[i].at < h[j].at
	}
	return h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(*event)) }
func (h *eventHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

// NewSched makes a world without queues.
func NewSched(seed uint64) *Sched {
	return &Sched{
		random: NewRandom(seed),
		orders: seed != 0,
		slow:   make(map[*Memory]uint),
		stuck:  make(map[*Memory][]*event),
		flight: make(map[*blockdev.Op]*event),
	}
}

// SchedQueue is a Queue of a Sched: one simulated thread.
type SchedQueue struct {
	s      *Sched
	name   string
	tasks  []*blockdev.Task // posted, in order
	paused uint64           // the thread does nothing before
	dead   bool
}

// NewQueue adds a thread.
func (s *Sched) NewQueue(name string) *SchedQueue {
	return &SchedQueue{s: s, name: name}
}

// NewMemoryQueue makes a world of its own with one queue, in which everything happens
// in order. It is for unit tests, with Run.
func NewMemoryQueue() *SchedQueue { return NewSched(0).NewQueue("q") }

// Name is the name given at creation.
func (q *SchedQueue) Name() string { return q.name }

// Sched is the world that q is part of.
func (q *SchedQueue) Sched() *Sched { return q.s }

// Run lets everything happen that is under way in q's world.
func (q *SchedQueue) Run() { q.s.Run() }

// delay is a choice of when the next thing happens to something: mostly soon,
// now and then much later.
func (s *Sched) delay(slow uint) uint64 {
	if !s.orders {
		return 0
	}
	return 1 + s.random.Uint64()&(1<<(uint(s.random.Intn(9))+slow)-1)
}

func (s *Sched) push(e *event, at uint64) {
	e.at = at
	e.seq = s.seq
	s.seq++
	heap.Push(&s.events, e)
}

// Submit starts op. It panics when op breaks the contract of Op.
func (q *SchedQueue) Submit(op *blockdev.Op) {
	s := q.s
	if q.dead {
		panic("blockdevtest: submit on a killed queue")
	}
	if s.thread != nil && s.thread != q {
		panic(fmt.Sprintf("blockdevtest: submit to queue %s on the thread of %s", q.name, s.thread.name))
	}
	if s.flight[op] != nil {
		panic("blockdevtest: operation submitted while in flight")
	}
	m, ok := op.File.(*Memory)
	if !ok {
		panic(fmt.Sprintf("blockdevtest: operation on a %T", op.File))
	}
	if op.Done == nil {
		panic("blockdevtest: operation without Done")
	}
	op.Err = 0
	e := &event{queue: q, op: op, was: *op, file: m}
	e.errno = m.check(op)
	if op.Kind == blockdev.Flush {
		e.mark = m.begun()
	}
	s.flight[op] = e
	if s.OnSubmit != nil {
		s.OnSubmit(q, op)
	}
	if e.errno == 0 {
		e.pieces = s.cut(op)
	}
	s.push(e, s.now+s.delay(s.slow[m]))
}

// cut chooses the pieces in which op takes effect.
func (s *Sched) cut(op *blockdev.Op) []int64 {
	if op.Kind == blockdev.Flush {
		return nil
	}
	sectors := op.Len / sector.Size
	if s.orders && sectors > 1 && op.Kind != blockdev.Allocate && s.random.OneIn(4) {
		at := (1 + int64(s.random.Intn(int(sectors-1)))) * sector.Size
		return []int64{at, op.Len}
	}
	return []int64{op.Len}
}

// Post runs t on q.
func (q *SchedQueue) Post(t *blockdev.Task) {
	if q.dead {
		panic("blockdevtest: post to a killed queue")
	}
	q.tasks = append(q.tasks, t)
	q.s.push(&event{queue: q, posted: true}, q.s.now+q.s.delay(0))
}

// After runs f on q at a later time, which is the later the larger slow is. f and
// posted tasks have no order. It is for what is not part of the engine.
func (q *SchedQueue) After(slow uint, f func()) {
	q.s.push(&event{queue: q, call: f}, q.s.now+q.s.delay(slow))
}

// Pause keeps q from running for a time that grows with slow, as a thread that
// the kernel does not schedule.
func (q *SchedQueue) Pause(slow uint) { q.paused = q.s.now + q.s.delay(slow) }

// SetSlow makes operations on m take up to 2^slow times as long.
func (s *Sched) SetSlow(m *Memory, slow uint) { s.slow[m] = slow }

// Stick keeps operations on m from taking effect and completing until Unstick.
func (s *Sched) Stick(m *Memory) {
	if s.stuck[m] == nil {
		s.stuck[m] = []*event{}
	}
}

// Stuck says whether m is stuck.
func (s *Sched) Stuck(m *Memory) bool { return s.stuck[m] != nil }

// Unstick lets m go on.
func (s *Sched) Unstick(m *Memory) {
	for _, e := range s.stuck[m] {
		s.push(e, s.now+s.delay(0))
	}
	delete(s.stuck, m)
}

// Steps is how many things have happened.
func (s *Sched) Steps() uint64 { return s.steps }

// Now is the simulated time, in no particular unit.
func (s *Sched) Now() uint64 { return s.now }

// Random is the world's generator, for choices that shall follow its seed.
func (s *Sched) Random() *Random { return &s.random }

// Thread is the queue whose code is running now, nil outside of any.
func (s *Sched) Thread() *SchedQueue { return s.thread }

// InFlight is how many operations of living queues have not completed.
func (s *Sched) InFlight() int { return len(s.flight) }

// Run steps until nothing is under way; what is stuck stays.
func (s *Sched) Run() {
	for s.Step() {
	}
}

// Step lets one thing happen; false when nothing is under way.
func (s *Sched) Step() bool {
	for len(s.events) > 0 {
		if s.happen(heap.Pop(&s.events).(*event)) {
			return true
		}
	}
	return false
}

// happen lets an event happen, unless it cannot now.
func (s *Sched) happen(e *event) bool {
	s.now = max(s.now, e.at)
	switch {
	case e.op != nil && s.stuck[e.file] != nil:
		s.stuck[e.file] = append(s.stuck[e.file], e)
		return false
	case len(e.pieces) > 0:
		s.steps++
		s.effect(e)
		return true
	case e.queue.dead:
		e.ended()
		return false
	case e.queue.paused > s.now:
		s.push(e, e.queue.paused)
		return false
	}
	s.steps++
	s.thread = e.queue
	switch {
	case e.posted:
		t := e.queue.tasks[0]
		e.queue.tasks = e.queue.tasks[1:]
		t.Run()
	case e.call != nil:
		e.call()
	default:
		s.complete(e)
	}
	s.thread = nil
	return true
}

// Meanwhile lets one thing happen while the thread that calls it stands between two
// instructions: on another thread, or on a disk. False if there is nothing.
func (s *Sched) Meanwhile() bool {
	me := s.thread
	s.thread = nil
	defer func() {
		if s.thread = me; me.dead {
			s.thread = nil
		}
	}()
	for {
		next := -1
		for i, e := range s.events {
			if (e.queue != me || len(e.pieces) > 0) && (next < 0 || s.events.Less(i, next)) {
				next = i
			}
		}
		if next < 0 {
			return false
		}
		if s.happen(heap.Remove(&s.events, next).(*event)) {
			return true
		}
	}
}

func (s *Sched) effect(e *event) {
	// What was checked at Submit may have changed meanwhile.
	if e.errno = e.file.check(&e.was); e.errno != 0 {
		e.pieces = nil
	} else {
		s.land(e)
	}
	s.push(e, s.now+s.delay(s.slow[e.file]))
}

func (s *Sched) complete(e *event) {
	op := e.op
	if op.Kind != e.was.Kind || op.Off != e.was.Off || op.Len != e.was.Len || op.Buf != e.was.Buf || op.File != e.was.File {
		panic(fmt.Sprintf("blockdevtest: %v of %s changed while in flight", e.was.Kind, e.file.Name()))
	}
	if e.errno == 0 {
		e.file.completed(op, &e.by, e.mark)
	}
	op.Err = e.errno
	delete(s.flight, op)
	if s.OnComplete != nil {
		s.OnComplete(e.queue, op)
	}
	op.Done(op)
}
