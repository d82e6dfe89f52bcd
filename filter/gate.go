package filter

import (
	"slices"
	"sync/atomic"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// gate is a queue's part of a cut. It is owned by the queue's thread.
type gate struct {
	closed   bool
	inflight int      // requests between admit and finish
	held     *request // that came while it was closed, in order
	heldTail *request
	drained  func() // called once when closed and nothing is in flight
}

// hold keeps a request until the gate opens.
func (g *gate) hold(req *request) {
	req.next = nil
	if g.held == nil {
		g.held = req
	} else {
		g.heldTail.next = req
	}
	g.heldTail = req
}

// leave counts a request out.
func (g *gate) leave() {
	if g.inflight--; g.inflight == 0 && g.drained != nil {
		f := g.drained
		g.drained = nil
		f()
	}
}

// close lets no more changes of the disk through and calls drained when none
// is in flight.
func (g *gate) close(drained func()) {
	g.closed = true
	if g.inflight == 0 {
		drained()
		return
	}
	g.drained = drained
}

// open ends the cut for one queue: what was held goes on, under the areas that
// the cut has left.
func (q *Queue) open() {
	g := &q.gate
	g.closed, g.drained = false, nil
	q.areas = q.f.publishedAreas()
	held := g.held
	g.held, g.heldTail = nil, nil
	for held != nil {
		req := held
		held = req.next
		req.next = nil
		q.admit(req)
	}
}

// publishedAreas is the list of areas for the queues: largest chunks first, and never
// changed afterwards.
func (f *Filter) publishedAreas() []*diffarea.Area { return *f.published.Load() }

// publish makes the areas visible to queues that look from now on.
func (f *Filter) publish() {
	list := slices.Clone(f.areas)
	slices.SortStableFunc(list, func(a, b *diffarea.Area) int { return int(b.ChunkSize() - a.ChunkSize()) })
	f.published.Store(&list)
}

// Install puts an area back on a filter whose queues have not begun to serve:
// the next daemon takes over a snapshot of the last.
func (f *Filter) Install(a *diffarea.Area) {
	f.areas = append(f.areas, a)
	f.publish()
	for _, q := range f.queues {
		if q != nil {
			q.areas = f.publishedAreas()
			q.w.UseFromStart(q.areas)
		}
	}
}

// Cut is one instant on several filters.
//
//	CLOSING ──> AT ──> OPENING ──> over
//	   └─ Cancel ────────┘
type Cut struct {
	filters []*Filter
	areas   []*diffarea.Area
	at      func()
	done    func(ok bool)
	stage   atomic.Int32
	closing atomic.Int32 // queues that have not closed and drained
	opening atomic.Int32 // queues that have not opened again
}

const (
	cutClosing = iota
	cutAt
	cutCancelled
)

// StartCut closes the gates of all filters. When no change is in flight on any
// of them, areas[i] is installed on filters[i], if there are areas, at is called, and the gates
// open; at that instant the original disks hold what the images will show.
// done is called last, when every gate is open again. at and done run on some
// queue's thread. Only one cut or Forget may be under way on a filter.
func StartCut(filters []*Filter, areas []*diffarea.Area, at func(), done func(ok bool)) *Cut {
	c := &Cut{filters: filters, areas: areas, at: at, done: done}
	c.closing.Store(int32(c.queues()))
	for _, f := range filters {
		for _, q := range f.queues {
			q.q.Post(&blockdev.Task{Run: func() { q.gate.close(c.closed) }})
		}
	}
	return c
}

func (c *Cut) queues() int {
	n := 0
	for _, f := range c.filters {
		n += len(f.queues)
	}
	return n
}

// closed runs for each queue that has closed and drained; the last one is the
// instant of the cut.
func (c *Cut) closed() {
	if c.closing.Add(-1) != 0 || !c.stage.CompareAndSwap(cutClosing, cutAt) {
		return
	}
	for i, a := range c.areas {
		f := c.filters[i]
		f.areas = append(f.areas, a)
		f.publish()
	}
	c.at()
	c.reopen(true)
}

// Cancel gives a cut up that could not drain: done is called with false when
// all gates are open again. It returns false if the cut was faster.
func (c *Cut) Cancel() bool {
	if !c.stage.CompareAndSwap(cutClosing, cutCancelled) {
		return false
	}
	c.reopen(false)
	return true
}

func (c *Cut) reopen(ok bool) {
	c.opening.Store(int32(c.queues()))
	for _, f := range c.filters {
		for _, q := range f.queues {
			q.q.Post(&blockdev.Task{Run: func() {
				q.open()
				if c.opening.Add(-1) == 0 {
					c.done(ok)
				}
				q.w.Use(q.areas)
			}})
		}
	}
}

// Forget takes areas off the filters, areas[i] off filters[i], without
// stopping anything. done is called, on some queue's thread, when no queue
// will start anything on them any more; what is under way goes on.
func Forget(filters []*Filter, areas []*diffarea.Area, done func()) {
	left := new(atomic.Int32)
	for i, f := range filters {
		f.areas = slices.DeleteFunc(f.areas, func(a *diffarea.Area) bool { return a == areas[i] })
		f.publish()
		left.Add(int32(len(f.queues)))
	}
	for _, f := range filters {
		for _, q := range f.queues {
			q.q.Post(&blockdev.Task{Run: func() {
				q.areas = f.publishedAreas()
				q.w.Use(q.areas)
				if left.Add(-1) == 0 {
					done()
				}
			}})
		}
	}
}
