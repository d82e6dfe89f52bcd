package blockdevtest

import (
	"container/heap"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Kill ends threads at this instant, as the death of their process does.
// Their operations in flight may still take effect, now or much later, wholly,
// in part or not at all; nothing runs on the queues any more.
func (s *Sched) Kill(queues ...*SchedQueue) {
	for _, q := range queues {
		q.dead = true
		q.tasks = nil
		if s.thread == q {
			s.thread = nil
		}
	}
	kept := s.events[:0]
	for _, e := range s.events {
		if e.queue.dead && len(e.pieces) == 0 {
			delete(s.flight, e.op)
			e.ended()
			continue
		}
		kept = append(kept, e)
	}
	clear(s.events[len(kept):])
	s.events = kept
	for _, e := range s.events {
		s.orphan(e)
	}
	heap.Init(&s.events)
	for _, m := range s.stuckFiles() {
		for _, e := range s.stuck[m] {
			s.orphan(e)
		}
	}
}

// orphan decides what becomes of an operation whose queue was killed.
func (s *Sched) orphan(e *event) {
	if !e.queue.dead || e.dead {
		return
	}
	e.dead = true
	delete(s.flight, e.op)
	switch s.random.Intn(4) {
	case 0: // it never got so far
		e.pieces = nil
	case 1: // it gets half way
		sectors := (e.was.Len - e.from) / sector.Size
		if e.was.Kind != blockdev.Allocate && sectors > 0 {
			e.pieces = []int64{e.from + sector.Size*int64(s.random.Intn(int(sectors)))}
		}
	}
	e.at = s.now + s.delay(uint(s.random.Intn(4)))
}

// stuckFiles is the stuck files in the order of their first event, because a run must
// not depend on the order of a map.
func (s *Sched) stuckFiles() []*Memory {
	var files []*Memory
	for m, es := range s.stuck {
		if len(es) == 0 {
			continue
		}
		i := 0
		for i < len(files) && s.stuck[files[i]][0].seq < es[0].seq {
			i++
		}
		files = append(files[:i], append([]*Memory{m}, files[i:]...)...)
	}
	return files
}

// Settle lets the operations that killed queues left behind take effect before anything
// else happens, on stuck files too. That is what a recovery waits for. If keep is not
// nil, Settle does so only for the files for which keep says yes.
func (s *Sched) Settle(keep func(*Memory) bool) {
	var rest, mine []*event
	for _, m := range s.stuckFiles() {
		if keep != nil && !keep(m) {
			continue
		}
		waiting := s.stuck[m][:0]
		for _, e := range s.stuck[m] {
			if e.dead {
				mine = append(mine, e)
			} else {
				waiting = append(waiting, e)
			}
		}
		s.stuck[m] = waiting
	}
	for len(s.events) > 0 {
		e := heap.Pop(&s.events).(*event)
		if e.dead && (keep == nil || keep(e.file)) {
			mine = append(mine, e)
		} else {
			rest = append(rest, e)
		}
	}
	for _, e := range rest {
		heap.Push(&s.events, e)
	}
	for _, e := range mine {
		for len(e.pieces) > 0 && e.file.check(&e.was) == 0 {
			s.land(e)
		}
		e.ended()
	}
}

// ended is for an operation of a killed queue that has had its effect, so that a later Flush
// covers what it did. By itself it promises nothing: it may have been cut short.
func (e *event) ended() {
	if e.op == nil || e.was.Kind == blockdev.Flush {
		return
	}
	was := e.was
	was.FUA = false
	e.file.completed(&was, &e.by, 0)
}

// land lets the next piece of an operation take effect.
func (s *Sched) land(e *event) {
	n := e.pieces[0] - e.from
	if s.OnEffect != nil {
		s.OnEffect(e.queue, &e.was, e.from, n)
	}
	e.file.apply(&e.was, &e.by, e.from, n)
	e.from, e.pieces = e.pieces[0], e.pieces[1:]
}

// PowerFail ends every operation and forgets every task, and makes files lose
// what was not durable. Of a write in flight any subset of sectors survives.
// The queues are not to be used any more.
func (s *Sched) PowerFail(files ...*Memory) {
	pending := make([]*event, 0, len(s.events))
	for len(s.events) > 0 {
		pending = append(pending, heap.Pop(&s.events).(*event))
	}
	for _, m := range s.stuckFiles() {
		pending = append(pending, s.stuck[m]...)
	}
	clear(s.stuck)
	clear(s.flight)
	for _, e := range pending {
		e.queue.dead = true
		if e.op == nil || e.was.Kind == blockdev.Read || e.was.Kind == blockdev.Flush || e.errno != 0 {
			continue
		}
		for n := e.from; n < e.was.Len && e.file.check(&e.was) == 0; n += sector.Size {
			if e.file.unsynced != nil || s.random.OneIn(2) {
				e.file.apply(&e.was, &e.by, n, min(sector.Size, e.was.Len-n))
			}
		}
	}
	for _, m := range files {
		m.PowerFail(s.random.Intn)
	}
}
