package diffarea

import "github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"

// Limits of the store queue. A small store waits while another is under way or
// copies are about to land, so that the next one is larger; full ones go out
// side by side.
const (
	storeBatch = 1 << 20   // bytes in one write to the storage, or one chunk if that is more
	maxStores  = 4         // writes to the storage at a time
	storeAsync = 256 << 10 // bytes from which a store is left to a kernel worker
)

// store is one write of neighbouring regions to the storage.
type store struct {
	l     *Log
	w     *Worker
	first Region
	n     Region
	op    blockdev.Op
	task  blockdev.Task // of the thread that stores
	next  *store

	// If it is encrypted:
	off    int64  // where it begins in the storage, bytes
	sector Sector // the number of its first sector
	sent   int64  // bytes written
	part   []byte // where the next are encrypted
}

// nextStoreLocked takes the stretch of landed regions at storeNext, if it is
// worth a write now.
func (l *Log) nextStoreLocked() *store {
	if l.dead.Load() != 0 || l.stores >= maxStores {
		return nil
	}
	for l.storeNext < l.next && l.slot(l.storeNext).state == slotDead {
		l.slot(l.storeNext).state = slotFree
		l.storeNext++
	}
	first := l.storeNext
	if first == l.next {
		return nil
	}
	// A write ends where the pool wraps, the storage continues elsewhere, or
	// the batch is full.
	ext := l.state.find(first)
	most := min(max(Region(storeBatch>>l.shift), 1), l.poolSlots-first%l.poolSlots, ext.first+ext.count-first)
	l.landed = max(l.landed, first)
	for l.landed < l.next && l.slot(l.landed).state == slotLanded {
		l.landed++
	}
	n := min(l.landed-first, most)
	wanted := first < l.urgent || l.waiting.head != nil
	grows := l.landed < l.next && l.slot(l.landed).state == slotCopying
	if n == 0 || n < most && (l.stores > 0 || grows && !wanted) {
		return nil
	}
	s := l.freeStores
	if s == nil {
		s = &store{l: l}
		s.op.Kind = blockdev.Write
		s.op.Done, s.task.Run = s.done, s.start
		if l.seal != nil {
			l.seal.give(s)
		}
	} else {
		l.freeStores = s.next
	}
	for r := first; r < first+n; r++ {
		l.slot(r).state = slotStoring
	}
	s.first, s.n = first, n
	s.op.File = l.file(ext.source)
	s.op.Off = ext.off + int64(first-ext.first)<<l.shift
	s.off, s.sector = s.op.Off, sectorAt(ext.source, s.op.Off)
	s.op.MinSize = l.minSizeLocked(ext.source)
	l.storeNext += n
	l.stores++
	l.busy++
	return s
}

func (s *store) submit(w *Worker) {
	if s.w = s.l.storer; s.w != nil {
		s.w.q.Post(&s.task)
		return
	}
	s.w = w
	s.start()
}

func (s *store) start() {
	l, w := s.l, s.w
	if l.seal != nil {
		s.sent = 0
		s.sealNext()
		return
	}
	s.op.Len = int64(s.n) << l.shift
	s.op.Buf = w.slots(l, s.first)
	if s.op.ForceAsync = s.op.Len >= storeAsync; s.op.ForceAsync {
		// The worker comes to it later: the place may be empty by then.
		s.op.Buf.Index = blockdev.NoIndex
	}
	w.q.Submit(&s.op)
}

// done runs when the regions have reached the storage. The words say so before
// the slots are given away: a reader that saw IN_MEMORY sees a changed word if
// its slot was used again.
func (s *store) done(op *blockdev.Op) {
	if op.Err == 0 && s.sealMore() {
		return
	}
	l, w := s.l, s.w // s may be used again without the lock
	if op.Err == 0 {
		for r := s.first; r < s.first+s.n; r++ {
			slot := l.slot(r)
			slot.area.table.set(slot.chunk, makeWord(Stored, r))
		}
	}
	var woken waitList
	l.mu.Lock()
	if op.Err != 0 {
		l.breakLocked(op.Err, l.slot(s.first).area)
	} else {
		for r := s.first; r < s.first+s.n; r++ {
			slot := l.slot(r)
			slot.state = slotFree
			slot.waiters.moveTo(&woken)
		}
	}
	l.stores--
	l.ended++
	l.busy--
	s.next, l.freeStores = l.freeStores, s
	l.mu.Unlock()
	w.settleLater(l)
	woken.wake(w)
}
