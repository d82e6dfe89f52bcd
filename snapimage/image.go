package snapimage

import (
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Image is one disk as it was at the cut, and what has been written to the
// image since.
type Image struct {
	area *diffarea.Area
	cbt  *cbtmap.Map
}

// Area is the difference area behind the image, for who checks it: see
// diffarea.Log.Check.
func (im *Image) Area() *diffarea.Area { return im.area }

// NewQueue makes the handler of one of the image device's queues, served by
// q's thread.
func (im *Image) NewQueue(q blockdev.Queue) *Queue {
	return &Queue{im: im, q: q, w: diffarea.NewWorker(q)}
}

// Queue is one queue of an image device: a ublk.Handler. Each operation's rule:
//
//	READ          each chunk from where it is; what moved meanwhile, again.
//	WRITE         into the difference area, never to the original disk; both
//	              change maps marked.
//	WRITE_ZEROES  as WRITE.
//	DISCARD       ignored: a trim of the image must not fill the storage.
//	FLUSH         done at once: an image does not outlive a power failure.
//
// On a broken snapshot every READ and WRITE fails with EIO.
type Queue struct {
	im    *Image
	q     blockdev.Queue
	w     *diffarea.Worker
	reads []*read  // by tag, made when first needed
	wrs   []*write // by tag
	stock *piece
}

// Handle starts a request.
func (q *Queue) Handle(r *ublk.Request) {
	switch {
	case r.Op == ublk.OpFlush || r.Op == ublk.OpDiscard:
		r.Complete(0)
	case q.im.area.Err() != 0:
		r.Complete(unix.EIO)
	case r.Op == ublk.OpRead:
		q.read(r)
	default:
		q.write(r)
	}
}

// window is how many chunks of a read are under way at a time: a read of 1 MiB
// at the smallest chunk size, wherever it begins.
const window = 257

// read is a READ under way.
//
//	look at the words ──> read each stretch where it is ──> look again ──> done
//	        ^                                                   │ moved
//	        └─── only the chunks that moved ────────────────────┘
//
// A chunk moves at most twice, so this ends.
type read struct {
	q       *Queue
	r       *ublk.Request
	pos     int64 // bytes before it are done
	end     int64 // of the window
	words   [window]diffarea.Word
	pending int // pieces under way, and one while they are being started
	err     unix.Errno
}

// piece is one read of bytes that lie side by side.
type piece struct {
	t    *read
	op   blockdev.Op
	next *piece
}

func (q *Queue) read(r *ublk.Request) {
	for len(q.reads) <= r.Tag {
		q.reads = append(q.reads, &read{q: q})
	}
	t := q.reads[r.Tag]
	t.r, t.pos = r, r.Off
	t.look()
}

// look starts on the window at pos.
func (t *read) look() {
	a := t.q.im.area
	first := a.Chunk(t.pos)
	t.end = min(t.r.Off+t.r.Len, a.Start(first+window))
	t.err = 0
	t.pending = 1
	var s stretch
	for i, off := 0, t.pos; off < t.end; i++ {
		end := min(t.end, a.Start(first+diffarea.Chunk(i)+1))
		t.words[i] = a.Load(first + diffarea.Chunk(i))
		s.add(t, t.words[i], off, end)
		off = end
	}
	s.submit(t)
	t.arrived()
}

// again reads the chunks of the window that have moved since they were looked
// at; it returns false if there are none.
func (t *read) again() bool {
	a := t.q.im.area
	first := a.Chunk(t.pos)
	t.pending = 1
	var s stretch
	moved := false
	for i, off := 0, t.pos; off < t.end; i++ {
		end := min(t.end, a.Start(first+diffarea.Chunk(i)+1))
		if w := a.Load(first + diffarea.Chunk(i)); w != t.words[i] {
			t.words[i], moved = w, true
			s.add(t, w, off, end)
		}
		off = end
	}
	if !moved {
		return false
	}
	s.submit(t)
	t.arrived()
	return true
}

// stretch gathers neighbouring chunks into one piece.
type stretch struct {
	file     blockdev.File
	at       int64 // in file
	off, end int64 // on the image
}

// add makes the chunk with word w, bytes [off, end) of the image, part of the
// stretch, or submits what there is and begins anew.
func (s *stretch) add(t *read, w diffarea.Word, off, end int64) {
	if w.State() == diffarea.Failed {
		t.err = unix.EIO
		return
	}
	f, at := t.q.im.area.Place(w, off)
	if s.file == f && s.end == off && s.at+(s.end-s.off) == at {
		s.end = end
		return
	}
	s.submit(t)
	*s = stretch{f, at, off, end}
}

func (s *stretch) submit(t *read) {
	if s.file == nil {
		return
	}
	q := t.q
	p := q.stock
	if p == nil {
		p = &piece{}
		p.op.Kind = blockdev.Read
		p.op.Done = p.done
	} else {
		q.stock = p.next
	}
	p.t = t
	p.op.File, p.op.Off, p.op.Len = s.file, s.at, s.end-s.off
	p.op.Buf = t.r.Buf.At(s.off - t.r.Off)
	t.pending++
	s.file = nil
	q.q.Submit(&p.op)
}

func (p *piece) done(op *blockdev.Op) {
	t := p.t
	p.t = nil
	p.next, t.q.stock = t.q.stock, p
	if op.Err != 0 {
		t.err = op.Err
		t.q.im.area.Failed(t.q.w, op)
	}
	t.arrived()
}

// arrived runs as each piece has arrived. After the last, the words say whether
// it was read from the right place.
func (t *read) arrived() {
	if t.pending--; t.pending != 0 {
		return
	}
	r := t.r
	if t.q.im.area.Err() != 0 {
		t.err = unix.EIO
	}
	if t.err != 0 {
		t.r = nil
		r.Complete(t.err)
		return
	}
	if t.again() {
		return
	}
	if t.pos = t.end; t.pos < r.Off+r.Len {
		t.look()
		return
	}
	t.r = nil
	r.Complete(0)
}

// write is a WRITE or WRITE_ZEROES under way, chunk by chunk.
//
//	NEW        wait for a slot, put the old data there unless all of it is
//	           overwritten, then the new
//	IN_MEMORY  wait until it is stored: its slot is on its way out
//	STORED     written in place
type write struct {
	q    *Queue
	r    *ublk.Request
	pos  int64 // bytes before it are done
	n    int64 // bytes of the chunk at pos
	fill *diffarea.Copy
	op   blockdev.Op

	step    func()
	filling func(*diffarea.Copy)
	oldRead func(*blockdev.Op)
	applied func(*blockdev.Op)
	stored  func(*blockdev.Op)
}

func (q *Queue) write(r *ublk.Request) {
	for len(q.wrs) <= r.Tag {
		t := &write{q: q}
		t.step, t.filling, t.oldRead = t.doStep, t.doFill, t.doOldRead
		t.applied, t.stored = t.doApplied, t.doStored
		q.wrs = append(q.wrs, t)
	}
	t := q.wrs[r.Tag]
	t.r, t.pos = r, r.Off
	if q.im.cbt != nil {
		q.im.cbt.MarkBoth(r.Off, r.Len)
	}
	t.doStep()
}

func (t *write) finish(errno unix.Errno) {
	r := t.r
	t.r = nil
	r.Complete(errno)
}

// doStep looks at the chunk at pos and starts what it needs.
func (t *write) doStep() {
	a := t.q.im.area
	for {
		if a.Err() != 0 {
			t.finish(unix.EIO)
			return
		}
		if t.pos >= t.r.Off+t.r.Len {
			t.finish(0)
			return
		}
		c := a.Chunk(t.pos)
		t.n = min(t.r.Off+t.r.Len, a.Start(c+1)) - t.pos
		switch w := a.Load(c); w.State() {
		case diffarea.New:
			if a.Fill(t.q.w, c, t.filling, t.step) {
				return
			}
		case diffarea.InMemory:
			if !a.AwaitStored(t.q.w, c, t.step) {
				return
			}
		case diffarea.Stored:
			f, at := a.Place(w, t.pos)
			t.op.Reach = a.Reach(w)
			t.submit(f, at, t.stored)
			return
		case diffarea.Failed:
			t.finish(unix.EIO)
			return
		}
	}
}

// submit writes the payload for the chunk at pos to a file.
func (t *write) submit(f blockdev.File, at int64, done func(*blockdev.Op)) {
	t.op.Kind, t.op.File, t.op.Off, t.op.Len, t.op.Done = blockdev.Write, f, at, t.n, done
	if t.r.Op == ublk.OpWriteZeroes {
		zeroes := blockdev.Zeroes()
		t.n = min(t.n, int64(len(zeroes)))
		t.op.Len = t.n
		t.op.Buf = blockdev.MemBuf(zeroes)
	} else {
		t.op.Buf = t.r.Buf.At(t.pos - t.r.Off)
	}
	t.q.q.Submit(&t.op)
}

func (t *write) doStored(op *blockdev.Op) {
	if op.Err != 0 {
		t.q.im.area.Failed(t.q.w, op)
		t.finish(op.Err)
		return
	}
	t.pos += t.n
	t.doStep()
}

// doFill runs when the new chunk has a slot.
func (t *write) doFill(c *diffarea.Copy) {
	t.fill = c
	t.op.Reach = 0
	mem, _, _ := c.Slot()
	if t.n == int64(len(mem)) {
		t.apply()
		return
	}
	t.op.Done = t.oldRead
	c.ReadOld(&t.op)
}

func (t *write) doOldRead(op *blockdev.Op) {
	if op.Err != 0 {
		t.fill.Filled(op.Err)
		return
	}
	t.apply()
}

// apply puts the payload over the old data in the slot.
func (t *write) apply() {
	a := t.q.im.area
	mem, f, at := t.fill.Slot()
	in := t.pos - a.Start(a.Chunk(t.pos))
	if t.r.Op == ublk.OpWriteZeroes {
		clear(mem[in : in+t.n])
		t.filled()
		return
	}
	t.submit(f, at+in, t.applied)
}

func (t *write) doApplied(op *blockdev.Op) {
	if op.Err != 0 {
		t.fill.Filled(op.Err)
		return
	}
	t.filled()
}

// filled goes on with the next chunk: Filled wakes the step.
func (t *write) filled() {
	t.pos += t.n
	t.fill.Filled(0)
}
