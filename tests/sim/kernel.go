package sim

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// device is a ublk device as the kernel has it: it outlives the process that
// serves it. Requests that nobody serves wait.
type device struct {
	w      *world
	name   string
	dev    int   // the original's number, whose stamps it shows
	size   int64 // bytes
	reg    *register
	image  *image // nil for a filter device
	queues []*hwqueue
	gone   bool   // deleted: requests fail at once
	tag    uint64 // by which a process knows it, 0: there is none in the kernel
}

// hwqueue is one queue of a device.
type hwqueue struct {
	d       *device
	index   int
	tags    []*tag
	waiting []*request

	// While a process serves it:
	handler ublk.Handler
	thread  *blockdevtest.SchedQueue
}

// tag is a slot for one request. Its buffer and ublk.Request belong to the
// process that serves the queue.
type tag struct {
	n   int
	r   *request // nil: free
	req *ublk.Request
	buf []byte
}

// request is one request of a client.
type request struct {
	id    uint64
	d     *device
	op    ublk.Op
	fua   bool
	off   int64 // bytes
	len   int64
	v     Version // of what it writes
	start moment
	// spoilt: a fault hit an operation on the original on its behalf, so it may
	// fail.
	spoilt bool
	// doomed: it was its own last operation on the original, so it must.
	doomed bool
	epoch  int // of the original, when it was submitted to an image
	done   func(unix.Errno)
	broken bool // it is for an image whose snapshot was broken already
}

func (r *request) from() int64  { return r.off / sectorSize }
func (r *request) to() int64    { return (r.off + r.len) / sectorSize }
func (r *request) writes() bool { return r.op != ublk.OpRead && r.op != ublk.OpFlush }

// writesData: not a discard, which promises nothing.
func (r *request) writesData() bool { return r.writes() && r.op != ublk.OpDiscard }

func (r *request) overlaps(off, n int64) bool { return off < r.off+r.len && r.off < off+n }

func newDevice(w *world, name string, dev int, size int64, queues, depth int, reg *register) *device {
	d := &device{w: w, name: name, dev: dev, size: size, reg: reg}
	for i := 0; i < queues; i++ {
		h := &hwqueue{d: d, index: i}
		for n := 0; n < depth; n++ {
			h.tags = append(h.tags, &tag{n: n})
		}
		d.queues = append(d.queues, h)
	}
	return d
}

// submit is a client's request to queue i; done is called once.
func (d *device) submit(i int, r *request, done func(unix.Errno)) {
	w := d.w
	w.requests++
	r.id = w.requests
	r.d, r.done = d, done
	r.start = w.tick()
	if r.writes() {
		d.reg.begin(r.id, r.v, r.from(), r.to(), r.start, r.op == ublk.OpDiscard)
		if r.op == ublk.OpDiscard && d.image == nil {
			d.reg.begin(r.id, junk, r.from(), r.to(), r.start, true)
		}
	}
	if r.op == ublk.OpRead {
		d.reg.beginRead(r.start)
	}
	r.broken = d.image != nil && d.image.snap.broken()
	w.model.submitted(r)
	w.outstanding++
	h := d.queues[i%len(d.queues)]
	if d.gone {
		w.client.After(0, func() { w.finished(r, nil, unix.ENODEV) })
		return
	}
	h.waiting = append(h.waiting, r)
	h.dispatch()
}

// dispatch gives waiting requests to free tags.
func (h *hwqueue) dispatch() {
	for _, t := range h.tags {
		if len(h.waiting) == 0 || h.handler == nil {
			return
		}
		if t.r == nil {
			t.r, h.waiting = h.waiting[0], h.waiting[1:]
			h.give(t)
		}
	}
}

// give has the handler start the request of a tag.
func (h *hwqueue) give(t *tag) {
	r := t.r
	q := t.req
	q.Op, q.Off, q.Len, q.FUA, q.NoUnmap = r.op, r.off, r.len, r.fua, false
	q.Buf = blockdev.Buf{Index: blockdev.NoIndex}
	switch r.op {
	case ublk.OpRead:
		for i := range t.buf[:r.len] {
			t.buf[i] = 0xee
		}
		q.Buf = blockdev.MemBuf(t.buf[:r.len])
	case ublk.OpWrite:
		fill(t.buf[:r.len], r.v, h.d.dev, r.from())
		q.Buf = blockdev.MemBuf(t.buf[:r.len])
	case ublk.OpFlush:
		q.Off, q.Len = 0, 0
	}
	handler := h.handler
	h.thread.After(0, func() { handler.Handle(q) })
}

// serve makes a process's handler serve the queue. Requests that an earlier
// process left behind are issued again.
func (h *hwqueue) serve(thread *blockdevtest.SchedQueue, handler ublk.Handler) {
	h.thread, h.handler = thread, handler
	c := &completer{h}
	for _, t := range h.tags {
		t.req = ublk.NewRequest(t.n, c)
		t.buf = make([]byte, h.d.w.maxIO())
		if t.r != nil {
			t.r.doomed = false
			h.give(t)
		}
	}
	h.dispatch()
}

// abandon ends the serving of a device: by the death of its process, or for
// new requests only.
func (d *device) abandon() {
	for _, h := range d.queues {
		h.handler = nil
	}
}

// remove deletes the device: what waits fails, what the process has is the
// process's to complete.
func (d *device) remove() {
	d.gone = true
	for _, h := range d.queues {
		for _, r := range h.waiting {
			d.w.client.After(0, func() { d.w.finished(r, nil, unix.ENODEV) })
		}
		h.waiting = nil
	}
}

// abort fails the requests that a process had of a removed device and can no
// longer complete.
func (d *device) abort() {
	for _, h := range d.queues {
		for _, t := range h.tags {
			if r := t.r; r != nil {
				t.r = nil
				d.w.client.After(0, func() { d.w.finished(r, nil, unix.EIO) })
			}
		}
	}
}

// busy says whether a process has requests of the device.
func (d *device) busy() bool {
	for _, h := range d.queues {
		for _, t := range h.tags {
			if t.r != nil {
				return true
			}
		}
	}
	return false
}

// completer is a queue as its handler sees it.
type completer struct{ h *hwqueue }

// Completed takes a result from the engine.
func (c *completer) Completed(q *ublk.Request, errno unix.Errno) {
	h := c.h
	w := h.d.w
	t := h.tags[q.Tag]
	if t.r == nil || t.req != q {
		w.fail("I8: %s queue %d: tag %d completed twice", h.d.name, h.index, q.Tag)
	}
	if w.sched.Thread() != h.thread {
		w.fail("%s queue %d: tag %d completed on the thread of another queue", h.d.name, h.index, q.Tag)
	}
	r := t.r
	t.r = nil
	w.finished(r, t.buf, errno)
	h.dispatch()
}

// spoil notes that requests of a kind that touch a range may fail, and returns
// them.
func (d *device) spoil(op ublk.Op, off, n int64) (spoilt []*request) {
	for _, h := range d.queues {
		for _, t := range h.tags {
			if t.r != nil && t.r.op == op && (op == ublk.OpFlush || t.r.overlaps(off, n)) {
				t.r.spoilt = true
				spoilt = append(spoilt, t.r)
			}
		}
	}
	return spoilt
}

// eachWrite calls f for the requests that wait or are under way and write data.
func (d *device) eachWrite(f func(r *request)) {
	for _, h := range d.queues {
		for _, r := range h.waiting {
			if r.writesData() {
				f(r)
			}
		}
		for _, t := range h.tags {
			if t.r != nil && t.r.writesData() {
				f(t.r)
			}
		}
	}
}

// tagOf is the request into or from whose buffer b points, or nil.
func (d *device) tagOf(b blockdev.Buf) *request {
	at := uintptr(b.Mem)
	for _, h := range d.queues {
		for _, t := range h.tags {
			if t.r == nil || len(t.buf) == 0 {
				continue
			}
			base := uintptr(unsafe.Pointer(unsafe.SliceData(t.buf)))
			if at >= base && at < base+uintptr(len(t.buf)) {
				return t.r
			}
		}
	}
	return nil
}
