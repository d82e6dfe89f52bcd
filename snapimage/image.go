package snapimage

import (
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Image is one disk as it was at the cut, and what has been written to the
// image since.
type Image struct {
	area   *diffarea.Area
	cbt    *cbtmap.Map
	filter *filter.Filter // which knows the write-intent log
}

func newImage(a *diffarea.Area, f *filter.Filter) *Image {
	return &Image{area: a, cbt: f.CBT(), filter: f}
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
//	              change maps marked, and the disk's write-intent log written,
//	              because a backup may read what was written here.
//	WRITE_ZEROES  as WRITE.
//	DISCARD       ignored: a trim of the image must not fill the storage.
//	FLUSH         done at once: an image does not outlive a power failure.
//
// If what is stored is encrypted, payloads are decrypted and encrypted where they are.
// So the queue must be in copy mode, and WRITE_ZEROES, which has no payload, is refused.
//
// On a broken snapshot every READ and WRITE fails with EIO.
type Queue struct {
	im         *Image
	q          blockdev.Queue
	w          *diffarea.Worker
	reads      []*read  // by tag, made when first needed
	writes     []*write // by tag
	freePieces *piece
}

// Handle starts a request.
func (q *Queue) Handle(r *ublk.Request) {
	switch {
	case r.Op == ublk.OpFlush || r.Op == ublk.OpDiscard:
		r.Complete(0)
	case q.im.area.Encrypted() && (r.Buf.Mem == nil || r.Op == ublk.OpWriteZeroes):
		r.Complete(unix.EOPNOTSUPP)
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
	kernel  *ublk.Request
	pos     int64 // bytes before it are done
	end     int64 // of the window
	words   [window]diffarea.Word
	pending int // pieces under way, and one while they are being started
	err     unix.Errno
}

// piece is one read of bytes that lie side by side.
type piece struct {
	rd     *read
	op     blockdev.Op
	sector diffarea.Sector // the first, if they are encrypted
	next   *piece
}

func (q *Queue) read(r *ublk.Request) {
	for len(q.reads) <= r.Tag {
		q.reads = append(q.reads, &read{q: q})
	}
	rd := q.reads[r.Tag]
	rd.kernel, rd.pos = r, r.Off
	rd.readWindow()
}

// readWindow starts on the window at pos.
func (rd *read) readWindow() {
	a := rd.q.im.area
	first := a.Chunk(rd.pos)
	rd.end = min(rd.kernel.Off+rd.kernel.Len, a.Start(first+window))
	rd.err = 0
	rd.pending = 1
	var s stretch
	for i, off := 0, rd.pos; off < rd.end; i++ {
		end := min(rd.end, a.Start(first+diffarea.Chunk(i)+1))
		rd.words[i] = a.Load(first + diffarea.Chunk(i))
		s.add(rd, rd.words[i], off, end)
		off = end
	}
	s.submit(rd)
	rd.pieceDone()
}

// rereadMoved reads the chunks of the window that have moved since they were looked
// at; it returns false if there are none.
func (rd *read) rereadMoved() bool {
	a := rd.q.im.area
	first := a.Chunk(rd.pos)
	rd.pending = 1
	var s stretch
	moved := false
	for i, off := 0, rd.pos; off < rd.end; i++ {
		end := min(rd.end, a.Start(first+diffarea.Chunk(i)+1))
		if w := a.Load(first + diffarea.Chunk(i)); w != rd.words[i] {
			rd.words[i], moved = w, true
			s.add(rd, w, off, end)
		}
		off = end
	}
	if !moved {
		return false
	}
	s.submit(rd)
	rd.pieceDone()
	return true
}

// stretch gathers neighbouring chunks into one piece.
type stretch struct {
	file     blockdev.File
	at       int64           // in file
	sector   diffarea.Sector // the first, if they are encrypted
	off, end int64           // on the image
}

// add makes the chunk with word w, bytes [off, end) of the image, part of the
// stretch, or submits what there is and begins anew.
func (s *stretch) add(rd *read, w diffarea.Word, off, end int64) {
	if w.State() == diffarea.Failed {
		rd.err = unix.EIO
		return
	}
	f, at := rd.q.im.area.Locate(w, off)
	if s.file == f && s.end == off && s.at+(s.end-s.off) == at {
		s.end = end
		return
	}
	s.submit(rd)
	*s = stretch{f, at, rd.q.im.area.Sector(w, off), off, end}
}

func (s *stretch) submit(rd *read) {
	if s.file == nil {
		return
	}
	q := rd.q
	p := q.freePieces
	if p == nil {
		p = &piece{}
		p.op.Kind = blockdev.Read
		p.op.Done = p.done
	} else {
		q.freePieces = p.next
	}
	p.rd, p.sector = rd, s.sector
	p.op.File, p.op.Off, p.op.Len = s.file, s.at, s.end-s.off
	p.op.Buf = rd.kernel.Buf.At(s.off - rd.kernel.Off)
	rd.pending++
	s.file = nil
	q.q.Submit(&p.op)
}

func (p *piece) done(op *blockdev.Op) {
	rd := p.rd
	p.rd = nil
	p.next, rd.q.freePieces = rd.q.freePieces, p
	if op.Err != 0 {
		rd.err = op.Err
		rd.q.im.area.OpFailed(rd.q.w, op)
	} else {
		rd.q.im.area.Decrypt(op.Buf, op.Len, p.sector)
	}
	rd.pieceDone()
}

// pieceDone runs as each piece has arrived. After the last, the words say whether
// it was read from the right place.
func (rd *read) pieceDone() {
	if rd.pending--; rd.pending != 0 {
		return
	}
	r := rd.kernel
	if rd.q.im.area.Err() != 0 {
		rd.err = unix.EIO
	}
	if rd.err != 0 {
		rd.kernel = nil
		r.Complete(rd.err)
		return
	}
	if rd.rereadMoved() {
		return
	}
	if rd.pos = rd.end; rd.pos < r.Off+r.Len {
		rd.readWindow()
		return
	}
	rd.kernel = nil
	r.Complete(0)
}

// write is a WRITE or WRITE_ZEROES under way, chunk by chunk.
//
//	NEW        wait for a slot, put the old data there unless all of it is
//	           overwritten, then the new
//	IN_MEMORY  wait until it is stored: its slot is on its way out
//	STORED     written in place
type write struct {
	q      *Queue
	kernel *ublk.Request
	pos    int64 // bytes before it are done
	n      int64 // bytes of the chunk at pos
	fill   *diffarea.Copy
	op     blockdev.Op
	wait   intentlog.Wait

	onStep    func()
	onFill    func(*diffarea.Copy)
	onOldRead func(*blockdev.Op)
	onApplied func(*blockdev.Op)
	onStored  func(*blockdev.Op)
}

func (q *Queue) write(r *ublk.Request) {
	for len(q.writes) <= r.Tag {
		wr := &write{q: q}
		wr.onStep, wr.onFill, wr.onOldRead = wr.doStep, wr.doFill, wr.doOldRead
		wr.onApplied, wr.onStored = wr.doApplied, wr.doStored
		wr.wait.Init(q.q, wr.onStep)
		q.writes = append(q.writes, wr)
	}
	wr := q.writes[r.Tag]
	wr.kernel, wr.pos = r, r.Off
	if q.im.cbt != nil {
		q.im.cbt.MarkBoth(r.Off, r.Len)
	}
	if log := q.im.filter.Intent(); log != nil && log.Hold(&wr.wait, r.Off, r.Len) {
		return // goes on with doStep
	}
	wr.doStep()
}

func (wr *write) finish(errno unix.Errno) {
	r := wr.kernel
	wr.kernel = nil
	r.Complete(errno)
}

// doStep looks at the chunk at pos and starts what it needs.
func (wr *write) doStep() {
	a := wr.q.im.area
	for {
		if a.Err() != 0 {
			wr.finish(unix.EIO)
			return
		}
		if wr.pos >= wr.kernel.Off+wr.kernel.Len {
			wr.finish(0)
			return
		}
		c := a.Chunk(wr.pos)
		wr.n = min(wr.kernel.Off+wr.kernel.Len, a.Start(c+1)) - wr.pos
		switch w := a.Load(c); w.State() {
		case diffarea.New:
			if a.Fill(wr.q.w, c, wr.onFill, wr.onStep) {
				return
			}
		case diffarea.InMemory:
			if !a.AwaitStored(wr.q.w, c, wr.onStep) {
				return
			}
		case diffarea.Stored:
			f, at := a.Locate(w, wr.pos)
			wr.op.MinSize = a.MinSize(w)
			a.Encrypt(wr.kernel.Buf.At(wr.pos-wr.kernel.Off), wr.n, a.Sector(w, wr.pos))
			wr.submit(f, at, wr.onStored)
			return
		case diffarea.Failed:
			wr.finish(unix.EIO)
			return
		}
	}
}

// submit writes the payload for the chunk at pos to a file.
func (wr *write) submit(f blockdev.File, at int64, done func(*blockdev.Op)) {
	wr.op.Kind, wr.op.File, wr.op.Off, wr.op.Len, wr.op.Done = blockdev.Write, f, at, wr.n, done
	if wr.kernel.Op == ublk.OpWriteZeroes {
		zeroes := blockdev.Zeroes()
		wr.n = min(wr.n, int64(len(zeroes)))
		wr.op.Len = wr.n
		wr.op.Buf = blockdev.MemBuf(zeroes)
	} else {
		wr.op.Buf = wr.kernel.Buf.At(wr.pos - wr.kernel.Off)
	}
	wr.q.q.Submit(&wr.op)
}

func (wr *write) doStored(op *blockdev.Op) {
	if op.Err != 0 {
		wr.q.im.area.OpFailed(wr.q.w, op)
		wr.finish(op.Err)
		return
	}
	wr.pos += wr.n
	wr.doStep()
}

// doFill runs when the new chunk has a slot.
func (wr *write) doFill(c *diffarea.Copy) {
	wr.fill = c
	wr.op.MinSize = 0
	mem, _, _ := c.Slot()
	if wr.n == int64(len(mem)) {
		wr.apply()
		return
	}
	wr.op.Done = wr.onOldRead
	c.ReadOld(&wr.op)
}

func (wr *write) doOldRead(op *blockdev.Op) {
	if op.Err != 0 {
		wr.fill.Filled(op.Err)
		return
	}
	wr.apply()
}

// apply puts the payload over the old data in the slot.
func (wr *write) apply() {
	a := wr.q.im.area
	mem, f, at := wr.fill.Slot()
	in := wr.pos - a.Start(a.Chunk(wr.pos))
	if wr.kernel.Op == ublk.OpWriteZeroes {
		clear(mem[in : in+wr.n])
		wr.filled()
		return
	}
	wr.submit(f, at+in, wr.onApplied)
}

func (wr *write) doApplied(op *blockdev.Op) {
	if op.Err != 0 {
		wr.fill.Filled(op.Err)
		return
	}
	wr.filled()
}

// filled goes on with the next chunk: Filled wakes the step.
func (wr *write) filled() {
	wr.pos += wr.n
	wr.fill.Filled(0)
}
