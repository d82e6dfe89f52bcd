package diffarea

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// AreaConfig is what an area is made of.
type AreaConfig struct {
	Log    *Log
	Orig   blockdev.File
	Size   int64  // of the original disk, bytes; the last chunk may be short
	Words  []byte // TableSize(chunks) bytes of zeroed memory that outlives the process
	Device uint64 // the original disk's number, for events
}

// Area is what one snapshot keeps of one disk: where each chunk of the image is.
type Area struct {
	log    *Log
	orig   blockdev.File
	size   int64
	device uint64
	table  *Table

	// copying are the copies under way, by chunk; guarded by log.mu.
	copying [64]*Copy
}

// Chunks is the number of chunks of a disk of size bytes.
func Chunks(size, chunkSize int64) Chunk { return Chunk((size + chunkSize - 1) / chunkSize) }

// NewArea makes the area of a disk, with all chunks new.
func NewArea(c AreaConfig) *Area {
	a := &Area{
		log:    c.Log,
		orig:   c.Orig,
		size:   c.Size,
		device: c.Device,
		table:  newTable(c.Words, Chunks(c.Size, c.Log.chunkSize)),
	}
	c.Log.mu.Lock()
	c.Log.areas = append(c.Log.areas, a)
	c.Log.chunks += Region(a.table.Len())
	c.Log.mu.Unlock()
	return a
}

// Log is the log that the area shares with the snapshot's other areas.
func (a *Area) Log() *Log { return a.log }

// Size is the size of the original disk and of the image, in bytes.
func (a *Area) Size() int64 { return a.size }

// ChunkSize is in bytes.
func (a *Area) ChunkSize() int64 { return a.log.chunkSize }

// Chunk is the chunk that holds the byte at off.
func (a *Area) Chunk(off int64) Chunk { return Chunk(off >> a.log.shift) }

// Start is the first byte of chunk c on the device.
func (a *Area) Start(c Chunk) int64 { return int64(c) << a.log.shift }

// length is the chunk's bytes on the device: less than a full chunk at the end
// of a disk.
func (a *Area) length(c Chunk) int64 {
	return min(a.size-a.Start(c), a.log.chunkSize)
}

// Load is the word of chunk c.
func (a *Area) Load(c Chunk) Word { return a.table.Load(c) }

// Err is the errno that broke the snapshot, 0 while it is whole.
func (a *Area) Err() unix.Errno { return a.log.Err() }

// Protected says that a write to chunk c may go on to the original disk: the
// chunk has been copied, or the snapshot is broken and it no longer matters.
func (a *Area) Protected(c Chunk) bool {
	return a.table.Load(c) != 0 || a.log.dead.Load() != 0
}

// SkipProtected is the first chunk from c on, below end, that is not
// Protected.
func (a *Area) SkipProtected(c, end Chunk) Chunk {
	if a.log.dead.Load() != 0 {
		return end
	}
	for c < end && a.table.Load(c) != 0 {
		c++
	}
	return c
}

// SkipNew is the first chunk from c on, below end, that is Protected.
func (a *Area) SkipNew(c, end Chunk) Chunk {
	if a.log.dead.Load() != 0 {
		return c
	}
	for c = a.table.skipNew(c, end); c < end && a.table.Load(c) == 0; c = a.table.skipNew(c+1, end) {
	}
	return c
}

// Locate says where the byte at off of the image is, given the word of its
// chunk, which is not FAILED.
func (a *Area) Locate(w Word, off int64) (blockdev.File, int64) {
	if w.State() == New {
		return a.orig, off
	}
	f, base := a.log.locate(w)
	return f, base + off&(a.log.chunkSize-1)
}

// MinSize is blockdev.Op.MinSize for a write to a chunk with word w, which is STORED.
func (a *Area) MinSize(w Word) int64 {
	l := a.log
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.minSizeLocked(l.state.find(w.Region()).source)
}

// OpFailed is told of an operation of an image that has failed, on w's thread. If it
// was on the storage, what is there cannot be relied on: the snapshot is broken.
func (a *Area) OpFailed(w *Worker, op *blockdev.Op) {
	l := a.log
	if op.File == a.orig || op.File == l.pool.File {
		return
	}
	l.mu.Lock()
	l.breakLocked(unix.EIO, a)
	l.settle(w, waitList{})
}

// Copy is the copying of one chunk, from the claim until its word says so. It
// belongs to its worker's thread; waiters, bucketNext and region are guarded by
// log.mu until the copy is granted.
type Copy struct {
	w     *Worker
	area  *Area
	chunk Chunk

	granted    bool // has a region
	region     Region
	waiters    waitList
	next       *Copy // in the worker's free list, its ended or ready, or in log.waiting
	bucketNext *Copy // in area.copying

	// A follower takes its data from the slot of a lead that reads a stretch
	// around it.
	lead      *Copy
	followers *Copy
	sibling   *Copy // in lead.followers
	started   bool
	joined    *Copy // the next chunk, which comes with the same read
	errno     unix.Errno

	// fill is set for an image's write: it is called in place of reading when
	// the slot is there.
	fill func(*Copy)

	op   blockdev.Op
	task blockdev.Task
}

// copyList is a list of copies in order.
type copyList struct{ head, tail *Copy }

func (l *copyList) push(c *Copy) {
	c.next = nil
	if l.tail == nil {
		l.head = c
	} else {
		l.tail.next = c
	}
	l.tail = c
}

func (l *copyList) pop() *Copy {
	c := l.head
	if c != nil {
		l.head = c.next
		if l.head == nil {
			l.tail = nil
		}
		c.next = nil
	}
	return c
}

// append moves all of m to the end of l.
func (l *copyList) append(m *copyList) {
	for c := m.pop(); c != nil; c = m.pop() {
		l.push(c)
	}
}

// newCopy takes one from the worker's free list.
func (w *Worker) newCopy() *Copy {
	c := w.freeCopies
	if c == nil {
		c = &Copy{w: w}
		c.op.Kind = blockdev.Read
		c.op.Done = c.landed
		c.task.Run = c.start
	} else {
		w.freeCopies = c.next
	}
	c.next = nil
	return c
}

func (a *Area) bucket(c Chunk) **Copy { return &a.copying[uint64(c)%uint64(len(a.copying))] }

// findLocked is the copy of chunk c under way, or nil.
func (a *Area) findLocked(c Chunk) *Copy {
	p := *a.bucket(c)
	for p != nil && p.chunk != c {
		p = p.bucketNext
	}
	return p
}

// Protect sees to it that chunk c is copied. It returns true if there is
// nothing to wait for; else wake is called, once, on w's thread, when the chunk
// is Protected. It may be called from w's thread only; what it puts under way
// begins at the end of the turn.
//
// claimed is the copy that this call has put under way, if any. A caller with
// several areas gives it as lead to those whose chunks lie inside: the original
// disk is then read once. A lead that does not cover the chunk is ignored.
func (a *Area) Protect(w *Worker, c Chunk, lead *Copy, wake func()) (ok bool, claimed *Copy) {
	if a.Protected(c) {
		return true, nil
	}
	l := a.log
	l.mu.Lock()
	if a.Protected(c) {
		l.mu.Unlock()
		return true, nil
	}
	if cp := a.findLocked(c); cp != nil {
		cp.waiters.push(w.newWaiter(wake))
		l.mu.Unlock()
		return false, nil
	}
	cp := a.claimLocked(w, c)
	cp.waiters.push(w.newWaiter(wake))
	if lead != nil && lead.covers(a.Start(c), a.length(c)) {
		cp.lead = lead
		cp.sibling, lead.followers = lead.followers, cp
	}
	l.mu.Unlock()
	w.settleLater(l)
	return false, cp
}

// claimLocked puts a copy of chunk c under way; it waits for its region.
func (a *Area) claimLocked(w *Worker, c Chunk) *Copy {
	cp := w.newCopy()
	cp.area, cp.chunk = a, c
	b := a.bucket(c)
	cp.bucketNext, *b = *b, cp
	a.log.busy++
	a.log.waiting.push(cp)
	return cp
}

// covers says that the copy reads all of the n bytes at off.
func (c *Copy) covers(off, n int64) bool {
	if c.area == nil {
		return false
	}
	start := c.area.Start(c.chunk)
	return c.fill == nil && start <= off && off+n <= start+c.area.length(c.chunk)
}

// Follows says that the copy takes its data from lead.
func (c *Copy) Follows(lead *Copy) bool { return lead != nil && c.lead == lead }

// start goes on with a copy that has been granted its region, or that will
// never get one because the log is dead.
func (c *Copy) start() {
	c.started = true
	switch {
	case !c.granted:
		c.finish(unix.ECANCELED)
	case c.fill != nil:
		c.fill(c)
	case c.lead == nil:
		c.read()
	}
}

// memory is the chunk's bytes in its slot.
func (c *Copy) memory() []byte {
	return c.area.log.memory(c.region)[:c.area.length(c.chunk)]
}

// reads says that starting the copy means to read the original disk.
func (c *Copy) reads() bool { return c.granted && c.fill == nil && c.lead == nil }

// begin and end are the chunk's place on the device.
func (c *Copy) begin() int64 { return c.area.Start(c.chunk) }
func (c *Copy) end() int64   { return c.begin() + c.area.length(c.chunk) }

// adjoins says that d is the next chunk and its slot the next slot.
func (c *Copy) adjoins(d *Copy) bool {
	return d.area == c.area && d.chunk == c.chunk+1 && d.region == c.region+1 && d.region%d.area.log.poolSlots != 0
}

// read reads the chunk, and those that are joined to it.
func (c *Copy) read() {
	last := c
	for last.joined != nil {
		last = last.joined
	}
	c.readOld(&c.op, last.end()-c.begin())
}

// landed runs when the old data is in the slot, or could not be read.
func (c *Copy) landed(op *blockdev.Op) {
	errno := op.Err // op may be used again as soon as its copy is over
	c.finish(errno)
}

// finish ends a copy, and those that are joined to it: with errno 0 their slots
// hold the chunks. The words are set at once; the slots and those who wait
// follow at the end of the turn.
func (c *Copy) finish(errno unix.Errno) {
	w := c.w
	for c != nil {
		next := c.joined
		c.joined = nil
		c.lendData(errno)
		c.leave()
		if errno == 0 {
			c.area.table.set(c.chunk, makeWord(InMemory, c.region))
		}
		c.errno = errno
		w.ended.push(c)
		w.settleLater(c.area.log)
		c = next
	}
}

// lendData ends the copies that follow this one.
func (c *Copy) lendData(errno unix.Errno) {
	for f := c.followers; f != nil; {
		next := f.sibling
		f.lead, f.sibling = nil, nil
		if f.started {
			// The follower has a slot, or has given up. A follower that has neither yet
			// will read for itself, because the original is not overwritten before the
			// follower is done.
			if errno == 0 && f.granted {
				copy(f.memory(), c.memory()[f.begin()-c.begin():])
				f.finish(0)
			} else if f.granted {
				f.read()
			}
		}
		f = next
	}
	c.followers = nil
}

// endLocked takes a copy out of the log.
func (c *Copy) endLocked(woken *waitList) {
	a, l := c.area, c.area.log
	if c.granted {
		s := l.slot(c.region)
		if c.errno == 0 {
			s.state = slotLanded
		} else {
			s.state = slotDead
			l.breakLocked(c.errno, a)
			a.table.set(c.chunk, makeWord(Failed, 0))
		}
	}
	for p := a.bucket(c.chunk); ; p = &(*p).bucketNext {
		if *p == c {
			*p = c.bucketNext
			break
		}
	}
	l.busy--
	c.waiters.moveTo(woken)
	c.recycle()
}

// leave takes a follower that ends before its lead out of the lead's list.
func (c *Copy) leave() {
	if c.lead == nil {
		return
	}
	for p := &c.lead.followers; *p != nil; p = &(*p).sibling {
		if *p == c {
			*p = c.sibling
			break
		}
	}
	c.lead, c.sibling = nil, nil
}

// recycle puts the copy back into its worker's free list.
func (c *Copy) recycle() {
	w := c.w
	c.area, c.bucketNext, c.joined, c.fill = nil, nil, nil, nil
	c.waiters = waitList{}
	c.granted, c.started, c.region, c.errno = false, false, 0, 0
	c.next, w.freeCopies = w.freeCopies, c
}

// AwaitStored returns true if chunk c is not on its way to the storage; else
// wake is called, once, on w's thread, when it has arrived or never will.
func (a *Area) AwaitStored(w *Worker, c Chunk, wake func()) bool {
	l := a.log
	l.mu.Lock()
	word := a.table.Load(c)
	if word.State() != InMemory || l.dead.Load() != 0 {
		l.mu.Unlock()
		return true
	}
	l.slot(word.Region()).waiters.push(w.newWaiter(wake))
	l.urgent = max(l.urgent, word.Region()+1)
	l.settle(w, waitList{})
	return false
}

// Fill is Protect for an image's write to a new chunk, on w's thread: when the
// chunk has a slot, fill is called to put the chunk's whole data into it, and
// to say so by Filled. wake is called, once, when the chunk has been filled, or
// by whoever was copying it already, or will never be; look again then.
// It returns false, and nothing is called, if the chunk is Protected.
func (a *Area) Fill(w *Worker, c Chunk, fill func(*Copy), wake func()) bool {
	l := a.log
	l.mu.Lock()
	if a.Protected(c) {
		l.mu.Unlock()
		return false
	}
	cp := a.findLocked(c)
	if cp == nil {
		cp = a.claimLocked(w, c)
		cp.fill = fill
	}
	cp.waiters.push(w.newWaiter(wake))
	l.settle(w, waitList{})
	return true
}

// Slot is where a copy to be filled puts the chunk: memory, and the same bytes
// in the pool's file.
func (c *Copy) Slot() (mem []byte, f blockdev.File, off int64) {
	l := c.area.log
	return c.memory(), l.pool.File, int64(c.region%l.poolSlots) << l.shift
}

// Filled ends a copy that was given to fill: with errno 0 its slot holds the
// chunk.
func (c *Copy) Filled(errno unix.Errno) { c.finish(errno) }

// ReadOld reads the chunk from the original disk into the slot with op, whose
// Done the caller has set.
func (c *Copy) ReadOld(op *blockdev.Op) { c.readOld(op, c.area.length(c.chunk)) }

// readOld reads n bytes, of which a part may belong to the chunks and slots
// behind this one.
func (c *Copy) readOld(op *blockdev.Op, n int64) {
	op.Kind = blockdev.Read
	op.File = c.area.orig
	op.Off = c.begin()
	op.Len = n
	op.Buf = c.w.slots(c.area.log, c.region)
	c.w.q.Submit(op)
}

func (a *Area) String() string {
	return fmt.Sprintf("area of %s", a.orig.Name())
}
