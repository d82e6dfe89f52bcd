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
	l.mu.Unlock()
	w.settleLater(l)
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
	l.mu.Unlock()
	w.settleLater(l)
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
	l.mu.Unlock()
	w.settleLater(l)
	return true
}

func (a *Area) String() string {
	return fmt.Sprintf("area of %s", a.orig.Name())
}
