package diffarea

import (
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Copy is the copying of one chunk, from the claim until its word says so. It
// belongs to its worker's thread, but for three fields. log.mu guards waiters and
// bucketNext until endLocked, because requests of any queue may join the copy until
// then. granted and region are set under log.mu by whoever settles the log, and
// belong to the worker's thread from then on.
type Copy struct {
	w     *Worker
	area  *Area
	chunk Chunk

	granted    bool // has a region
	region     Region
	waiters    waitList
	next       *Copy // in the worker's free list, in log.waiting, granted or ended
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

// moveTo empties the list into dst.
func (l *copyList) moveTo(dst *copyList) {
	for c := l.pop(); c != nil; c = l.pop() {
		dst.push(c)
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

// readBatch is how many bytes of several chunks are read at a time.
const readBatch = 1 << 20

// start starts the copies of the list: those of w here, others on their own threads.
// The chunks of a read follow each other on the disk and in the pool; followers have
// nothing to read and may stand in between.
func (l *copyList) start(w *Worker) {
	var first, last *Copy // of a read
	for c := l.pop(); c != nil; c = l.pop() {
		switch {
		case c.w != w:
			c.w.q.Post(&c.task)
		case !c.reads():
			c.start()
		case last != nil && last.adjoins(c) && c.end()-first.begin() <= readBatch:
			last.joined, last, c.started = c, c, true
		default:
			if first != nil {
				first.start()
			}
			first, last = c, c
		}
	}
	if first != nil {
		first.start()
	}
}

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
		w.settleLater(c.area.log).ended.push(c)
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

// endLocked takes a copy out of the log, to which its slot belongs from now on.
// woken gets those who waited for the copy.
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
