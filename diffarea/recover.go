package diffarea

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// OpenLog takes over the log of a process that died: the same state memory, the
// same pool with its content, and the same storage in the order of Append; a
// Storage without a File is one that could not be appended. Then every area is
// taken over with OpenArea, and Resume ends it.
//
// The caller has made sure that the dead process has no I/O under way any more. Its
// death alone does not prove that. The I/O of its queues has ended when the driver has
// let go of the device, because the queues' rings hold the device's file. The stores of
// its control queue have ended when the storage could be claimed anew, because I/O
// under way keeps its file open. Copies that had not landed never happened; their
// regions are not used again. A log that is dead needs no Seal, because nothing of it
// is read any more.
func OpenLog(c LogConfig, sources []Storage) (*Log, error) {
	s := newLogState(c.State)
	if s.get(stateMagic) != logMagic {
		return nil, fmt.Errorf("open log: %w: no magic number", ErrState)
	}
	if c.ChunkSize != 1<<min(s.get(stateShift), 62) {
		return nil, fmt.Errorf("open log: %w: chunks of 2^%d bytes, want %d", ErrState, s.get(stateShift), c.ChunkSize)
	}
	l, err := newLog(c, s)
	if err != nil {
		return nil, err
	}
	if int64(s.get(stateSlots)) != int64(l.poolSlots) {
		return nil, fmt.Errorf("open log: %w: %d pool slots, want %d", ErrState, s.get(stateSlots), l.poolSlots)
	}
	if s.get(stateDead) == 0 && s.get(stateKey) != l.seal.checkOf() {
		return nil, fmt.Errorf("open log: %w: what is stored was encrypted with another key", ErrState)
	}
	if err := s.check(len(sources)); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	for _, st := range sources {
		l.addSource(&source{
			file: st.File, used: st.Start, size: st.Size, room: st.Room, spare: st.Spare, portion: l.portion, done: st.Fixed || st.File == nil,
		})
	}
	for i := range s.extents() {
		ext := s.extent(i)
		src := l.sources[ext.source]
		misplaced := ext.off != src.used // a storage is taken into use without gaps
		src.used = ext.off + int64(ext.count)<<l.shift
		if misplaced || src.file == nil || src.size != 0 && src.used > src.size {
			return nil, fmt.Errorf("open log: %w: extent %d: regions %d+%d at %d of storage %d, which has %d bytes", ErrState, i, ext.first, ext.count, ext.off, ext.source, src.size)
		}
	}
	l.next, l.capacity, l.low = Region(s.get(stateNext)), s.capacity(), s.get(stateLow) != 0
	l.lost = l.next // until a word says otherwise
	l.dead.Store(uint32(s.get(stateDead)))
	l.storeNext = max(0, l.next-l.poolSlots)
	for r := l.storeNext; r < l.next; r++ {
		l.slot(r).state = slotDead // until a word says otherwise
	}
	return l, nil
}

// check says whether the extents are such as add makes.
func (s *logState) check(sources int) error {
	n := s.get(stateExtents)
	if n > maxExtents {
		return fmt.Errorf("%w: %d extents", ErrState, n)
	}
	first := Region(0)
	for i := range int(n) {
		ext := s.extent(i)
		misplaced := ext.off < 0 || ext.off&(MinChunkSize-1) != 0 || ext.source >= uint64(sources)
		if misplaced || ext.first != first || ext.count <= 0 || ext.count >= 1<<regionBits-first {
			return fmt.Errorf("%w: extent %d: regions %d+%d in storage %d of %d at %d", ErrState, i, ext.first, ext.count, ext.source, sources, ext.off)
		}
		first += ext.count
	}
	if next := s.get(stateNext); next > uint64(first) {
		return fmt.Errorf("%w: next region %d beyond %d", ErrState, next, first)
	}
	return nil
}

// OpenArea takes over an area of a log from OpenLog, with the words that the
// dead process left in c.Words. data calls back with the ranges of c.Words, in
// bytes, that may be other than zero; nil means all of it.
func OpenArea(c AreaConfig, data func(yield func(from, to int64))) (*Area, error) {
	a := NewArea(c)
	l := c.Log
	var err error
	take := func(chunk Chunk, w Word) {
		r := w.Region()
		switch {
		case w.State() == Failed && l.dead.Load() != 0:
		case w.State() == Failed:
			err = fmt.Errorf("%s: %w: chunk %d is FAILED in a whole snapshot", c.Orig.Name(), ErrState, chunk)
		case w.State() == New || r >= l.next:
			err = fmt.Errorf("%s: %w: chunk %d is %v in region %d of %d", c.Orig.Name(), ErrState, chunk, w.State(), r, l.next)
		case w.State() == Stored:
			l.lost--
		case w.State() == InMemory:
			s := l.slot(r)
			if r < l.next-l.poolSlots || s.state != slotDead {
				err = fmt.Errorf("%s: %w: chunk %d in region %d, whose slot is another's", c.Orig.Name(), ErrState, chunk, r)
				return
			}
			s.state, s.area, s.chunk = slotLanded, a, chunk
			l.lost--
		}
	}
	if data == nil {
		data = func(yield func(from, to int64)) { yield(0, TableSize(a.table.Len())) }
	}
	data(func(from, to int64) {
		a.table.adopt(Chunk(from/wordSize), min(Chunk((to+wordSize-1)/wordSize), a.table.Len()), take)
	})
	return a, err
}

// Resume starts a log from OpenLog: what was not stored goes on its way. It settles
// the log at once, so that the slots of copies that died are free before anybody asks
// for one.
func (l *Log) Resume(w *Worker) {
	l.settle(w, copyList{})
}

// Used is Log.Used from a log's state alone, for the storage at that place in the
// order of Append. The error is that of OpenLog.
func Used(state []byte, source int) (int64, error) {
	s := newLogState(state)
	if s.get(stateMagic) != logMagic || s.get(stateShift) > 62 {
		return 0, fmt.Errorf("read log: %w: no magic number", ErrState)
	}
	if err := s.check(maxExtents); err != nil {
		return 0, fmt.Errorf("read log: %w", err)
	}
	return s.usedOf(uint64(source), Region(s.get(stateNext)), uint(s.get(stateShift))), nil
}

// Dead is the errno that broke a log, 0 if none did, from its state alone.
func Dead(state []byte) unix.Errno { return unix.Errno(newLogState(state).get(stateDead)) }
