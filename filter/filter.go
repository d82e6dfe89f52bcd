// Package filter is the filter device over one original disk. It passes every
// request on to that disk. Before that it marks in the change map what the request
// changes, and has the old data copied that the request overwrites.
//
//	kernel ──> Queue.Handle ──> gate ──> mark ──> log ──> protect ──> forward ──> original disk
//	                             │        cbtmap   intentlog  diffarea
//	                             └ closed: the write is held until the cut is over
//
// Each operation's rule:
//
//	READ          forwarded.
//	WRITE         marked, and logged if there is a write-intent log; its chunks
//	              protected in every snapshot; forwarded, with FUA if it has that.
//	WRITE_ZEROES  as WRITE, piece by piece if it is long.
//	DISCARD       marked and logged; forwarded only where no snapshot still needs the old
//	              data on the original disk. Elsewhere it is acknowledged and not
//	              done: a discard is only advice.
//	FLUSH         forwarded.
//
// # Concurrency
//
// Each Queue belongs to one thread. While it serves a request whose chunks have
// been copied, it shares nothing with other queues but the chunk words, which it
// loads atomically. A queue has its own gate and its own list of areas. Cut and
// Forget change them by tasks that they post to the queue's thread, so that the
// queue reads them without a lock.
package filter

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Config is what a filter is made of.
type Config struct {
	Orig blockdev.File
	Size int64       // of the original disk, bytes
	CBT  *cbtmap.Map // nil: changes are not tracked
	// Intent is the write-intent log, which follows CBT; nil: the change map does not
	// outlive a power failure.
	Intent *intentlog.Log
	Queues int
	// Counters, one for each queue, is where the queues count, if that shall outlive
	// the process; nil: in memory of the filter's own.
	Counters []Counters
}

// Filter is the filter over one original disk.
type Filter struct {
	orig   blockdev.File
	size   int64
	cbt    *cbtmap.Map
	intent *intentlog.Log // as the queues know it
	// log is the same for the threads of images.
	log    atomic.Pointer[intentlog.Log]
	queues []*Queue
	counts []Counters // by queue

	// areas are those of the snapshots held; owned by whoever makes cuts, one at
	// a time.
	areas []*diffarea.Area
	// published is the same for the queues to take over.
	published atomic.Pointer[[]*diffarea.Area]
}

// New makes a filter; its queues are added by NewQueue, all before the first
// cut.
func New(c Config) *Filter {
	f := &Filter{
		orig: c.Orig, size: c.Size, cbt: c.CBT, intent: c.Intent,
		queues: make([]*Queue, c.Queues), counts: c.Counters,
	}
	f.log.Store(c.Intent)
	if f.counts == nil {
		f.counts = make([]Counters, c.Queues)
	}
	f.publish()
	return f
}

// Orig is the original disk.
func (f *Filter) Orig() blockdev.File { return f.orig }

// Size is the size of the disk in bytes.
func (f *Filter) Size() int64 { return f.size }

// Grow makes the filter one over a disk of size bytes, with another write-intent log, or none.
// Its change map is for that size already. It may only be called at the instant of a cut. The
// areas that the filter has keep the size that the disk had, and what is beyond needs no copy.
func (f *Filter) Grow(size int64, intent *intentlog.Log) {
	f.size, f.intent = size, intent
	f.log.Store(intent)
}

// CBT is the change map, nil if there is none.
func (f *Filter) CBT() *cbtmap.Map { return f.cbt }

// Intent is the write-intent log, nil if there is none. It is another one after Grow.
func (f *Filter) Intent() *intentlog.Log { return f.log.Load() }

// Held says whether a snapshot holds the disk. For whoever makes cuts only.
func (f *Filter) Held() bool { return len(f.areas) > 0 }

// Counters count what a queue has done since it began. Bytes and requests are
// counted at completion. They fill cache lines of their own.
type Counters struct {
	Requests [ublk.OpWriteZeroes + 1]atomic.Uint64 // by ublk.Op
	Bytes    [ublk.OpWriteZeroes + 1]atomic.Uint64
	Errors   atomic.Uint64
	InFlight atomic.Int64
	// Skipped counts the bytes of discards that were not passed on because a
	// snapshot needs them.
	Skipped atomic.Uint64
	_       uint64
}

// Counters are those of queue i; safe from any thread.
func (f *Filter) Counters(i int) *Counters { return &f.counts[i] }

// Queue is one queue of the filter device: a ublk.Handler.
type Queue struct {
	f     *Filter
	q     blockdev.Queue
	w     *diffarea.Worker
	areas []*diffarea.Area // largest chunks first
	reqs  []*request       // by tag
	gate  gate

	counters *Counters
}

// NewQueue makes queue i, served by q's thread. Called once for each i.
func (f *Filter) NewQueue(i int, q blockdev.Queue) *Queue {
	fq := &Queue{f: f, q: q, w: diffarea.NewWorker(q), areas: f.publishedAreas(), counters: &f.counts[i]}
	f.queues[i] = fq
	fq.w.UseFromStart(fq.areas)
	return fq
}

// Handle starts a request.
func (q *Queue) Handle(r *ublk.Request) {
	req := q.request(r)
	q.counters.InFlight.Add(1)
	if r.Op == ublk.OpRead || r.Op == ublk.OpFlush {
		req.forward(r.Off, r.Off+r.Len)
		return
	}
	if q.gate.closed {
		q.gate.hold(req)
		return
	}
	q.admit(req)
}

// request is the queue's own part of the kernel's request of one tag.
type request struct {
	q      *Queue
	kernel *ublk.Request

	pos     int64 // bytes before it are done
	end     int64 // of the piece under way
	pending int   // copies waited for, and one while they are being collected
	next    *request

	op       blockdev.Op
	wait     intentlog.Wait
	onCopied func()
}

func (q *Queue) request(r *ublk.Request) *request {
	for len(q.reqs) <= r.Tag {
		req := &request{q: q}
		req.op.File = q.f.orig
		req.op.Done = req.forwarded
		req.wait.Init(q.q, req.advance)
		req.onCopied = req.chunkCopied
		q.reqs = append(q.reqs, req)
	}
	req := q.reqs[r.Tag]
	req.kernel = r
	req.pos = r.Off
	return req
}

// admit lets a request that changes the disk through the gate. From here until
// finish it counts as in flight, and no cut happens.
func (q *Queue) admit(req *request) {
	q.gate.inflight++
	if q.f.cbt != nil {
		q.f.cbt.Mark(req.kernel.Off, req.kernel.Len)
	}
	if q.f.intent != nil && q.f.intent.Hold(&req.wait, req.kernel.Off, req.kernel.Len) {
		return // goes on with advance
	}
	req.advance()
}

// advance goes on with a request from pos: the next piece of a discard, or the
// copying that the next piece of a write needs.
func (req *request) advance() {
	if len(req.q.areas) == 0 {
		// From the beginning, or because the last snapshot has gone meanwhile.
		req.forward(req.pos, req.kernel.Off+req.kernel.Len)
		return
	}
	if req.kernel.Op == ublk.OpDiscard {
		req.advanceDiscard()
		return
	}
	req.pending = 1
	req.end = req.protect(req.pos, req.kernel.Off+req.kernel.Len)
	req.chunkCopied()
}

// Limits of what one request does at a time: the copies, enough for a write of
// 1 MiB at the smallest chunk size, and the bytes it looks at. A longer
// WRITE_ZEROES goes in pieces.
const (
	maxCopies = 256
	maxPiece  = 64 << 20
)

// protect has the chunks of [from, end) copied in every area and returns how
// far it came.
func (req *request) protect(from, end int64) int64 {
	q := req.q
	step := q.areas[len(q.areas)-1].ChunkSize()
	end = min(end, from+maxPiece)
	copies := 0
	var lead *diffarea.Copy
	for pos := from; pos < end; pos = pos&^(step-1) + step {
		if copies >= maxCopies {
			return pos
		}
		for _, a := range q.areas {
			if pos >= a.Size() {
				continue // the disk has grown since
			}
			c := a.Chunk(pos)
			if pos > from && pos > a.Start(c) || a.Protected(c) {
				continue // seen at its first byte
			}
			req.pending++
			ok, claimed := a.Protect(q.w, c, lead, req.onCopied)
			if ok {
				req.pending--
				continue
			}
			copies++
			if claimed != nil && !claimed.Follows(lead) {
				lead = claimed
			}
		}
	}
	return end
}

// chunkCopied runs as each chunk's copy has landed; after the last one the
// piece may be overwritten.
func (req *request) chunkCopied() {
	if req.pending--; req.pending == 0 {
		req.forward(req.pos, req.end)
	}
}

// advanceDiscard passes on the next stretch that every snapshot has already
// copied.
func (req *request) advanceDiscard() {
	end := req.kernel.Off + req.kernel.Len
	start := req.pos
	for start < end {
		stop := end
		again := false
		for _, a := range req.q.areas {
			if start >= a.Size() {
				continue // the disk has grown since
			}
			// Whole chunks only: a chunk that is still new keeps all its bytes.
			c, last := a.Chunk(start), a.Chunk(min(end, a.Size())-1)+1
			if s := a.SkipNew(c, last); s != c {
				req.q.counters.Skipped.Add(uint64(min(a.Start(s), end) - start))
				start, again = min(a.Start(s), end), true
				break
			}
			stop = min(stop, a.Start(a.SkipProtected(c, last)))
		}
		if !again {
			req.forward(start, min(stop, end))
			return
		}
	}
	req.finish(0)
}

// forward sends [from, to) of the request to the original disk.
func (req *request) forward(from, to int64) {
	r, op := req.kernel, &req.op
	switch r.Op {
	case ublk.OpRead:
		op.Kind = blockdev.Read
	case ublk.OpWrite:
		op.Kind = blockdev.Write
	case ublk.OpFlush:
		op.Kind = blockdev.Flush
	case ublk.OpDiscard:
		op.Kind = blockdev.Discard
	case ublk.OpWriteZeroes:
		op.Kind = blockdev.WriteZeroes
	}
	op.FUA, op.NoUnmap = r.FUA, r.NoUnmap
	op.Off, op.Len = from, to-from
	op.Buf = r.Buf.At(from - r.Off)
	req.q.q.Submit(op)
}

// forwarded runs when the original disk has done a piece.
func (req *request) forwarded(op *blockdev.Op) {
	req.pos = op.Off + op.Len
	if op.Err != 0 || req.pos >= req.kernel.Off+req.kernel.Len {
		req.finish(op.Err)
		return
	}
	req.advance()
}

// finish gives the request back to the kernel.
func (req *request) finish(errno unix.Errno) {
	q, r := req.q, req.kernel
	n := q.counters
	n.Requests[r.Op].Add(1)
	n.Bytes[r.Op].Add(uint64(r.Len))
	if errno != 0 {
		n.Errors.Add(1)
	}
	n.InFlight.Add(-1)
	write := r.Op != ublk.OpRead && r.Op != ublk.OpFlush
	req.kernel = nil
	r.Complete(errno)
	if write {
		q.gate.leave()
	}
}
