package diffarea

import (
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Storage is a file or block device to which a log stores.
type Storage struct {
	File blockdev.File
	// Size is how many bytes of File may be used; 0 means as many as the file
	// system gives, for a file that grows.
	Size int64
	// Start is how many of these bytes, at the beginning, are not the log's: a multiple of
	// MinChunkSize.
	Start int64
	// Fixed: all of Size is there now, as on a block device. Otherwise it is
	// allocated in portions.
	Fixed bool
	// Room is how many bytes File can come to have, as its filesystem is now; 0 means
	// that nobody knows. Log.SetRoom changes it.
	Room int64
	// Spare: File never grows beyond Room. Without it only warnings reckon with Room,
	// because the filesystem itself says best when it is full.
	Spare bool
	// Index is the storage's place in the order of Append, counted from 0, for an
	// owner who counts failed ones too: the places before it that have no storage
	// stay empty. A place that is taken already means the next one.
	Index int
}

// source is a Storage and how far it has been taken into use.
type source struct {
	file    blockdev.File
	used    int64 // bytes made into extents
	size    int64 // 0: no limit
	room    int64 // see Storage.Room
	spare   bool  // see Storage.Spare
	portion int64 // bytes of the next growth
	done    bool  // cannot grow any more
	// appended is called after the first growth; nil from then on.
	appended func(error)
}

// extent is a stretch of regions that lie side by side in one source.
type extent struct {
	first  Region
	count  Region
	source uint64 // index in the order of Append
	off    int64  // of the first region in the source, bytes
}

// logState is the part of a log that outlives the process, in memory of the
// caller's.
//
//	 0 magic      8 chunk shift  16 next region   24 errno that broke it
//	32 pool slots 40 extents     48 key           56 low
//	64 extents, 32 bytes each: first, count, source, offset
//
// All numbers are 64 bits wide in the machine's order and change by one store;
// an extent is complete before it is counted. Key is 0 if what is stored is not
// encrypted, and else tells the key from others. Low is 1 while it is told that
// storage runs low.
type logState struct{ fields []uint64 }

// LogStateSize is the memory a log's state needs, in bytes.
const LogStateSize = 16 << 10

const (
	stateMagic = iota
	stateShift
	stateNext
	stateDead
	stateSlots
	stateExtents
	stateKey
	stateLow
	stateHead = 8

	extentFields = 4
	maxExtents   = (LogStateSize/8 - stateHead) / extentFields

	logMagic = 0x31474f4c46464944 // "DIFFLOG1"
)

func newLogState(mem []byte) *logState {
	if len(mem) < LogStateSize {
		panic(fmt.Sprintf("diffarea: log state in %d bytes", len(mem)))
	}
	return &logState{unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), LogStateSize/8)}
}

func (s *logState) get(i int) uint64    { return atomic.LoadUint64(&s.fields[i]) }
func (s *logState) put(i int, v uint64) { atomic.StoreUint64(&s.fields[i], v) }

func (s *logState) format(shift uint, slots int64, key uint64) {
	s.put(stateKey, key)
	s.put(stateShift, uint64(shift))
	s.put(stateSlots, uint64(slots))
	s.put(stateMagic, logMagic)
}

func (s *logState) setNext(r Region)         { s.put(stateNext, uint64(r)) }
func (s *logState) setDead(errno unix.Errno) { s.put(stateDead, uint64(errno)) }

func (s *logState) extent(i int) extent {
	f := s.fields[stateHead+i*extentFields:]
	return extent{Region(f[0]), Region(atomic.LoadUint64(&f[1])), f[2], int64(f[3])}
}

func (s *logState) extents() int { return int(s.get(stateExtents)) }

// capacity is the number of regions that the storage holds.
func (s *logState) capacity() Region {
	n := s.extents()
	if n == 0 {
		return 0
	}
	ext := s.extent(n - 1)
	return ext.first + ext.count
}

// find is the extent of region r, which lies below capacity. Extents grow at
// the end only, so no lock is needed.
func (s *logState) find(r Region) extent {
	lo, hi := 0, s.extents()-1
	for lo < hi {
		mid := (lo + hi + 1) / 2
		if s.extent(mid).first <= r {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return s.extent(lo)
}

// add makes n more regions available at off of a source. It returns false if
// there are too many extents.
func (s *logState) add(source uint64, off int64, n Region, shift uint) bool {
	i := s.extents()
	ext := extent{source: source, off: off}
	if i > 0 {
		last := s.extent(i - 1)
		if last.source == source && last.off+int64(last.count)<<shift == off {
			s.put(stateHead+(i-1)*extentFields+1, uint64(last.count+n))
			return true
		}
		ext.first = last.first + last.count
	}
	if i == maxExtents {
		return false
	}
	f := s.fields[stateHead+i*extentFields:]
	f[0], f[1], f[2], f[3] = uint64(ext.first), uint64(n), ext.source, uint64(ext.off)
	s.put(stateExtents, uint64(i+1))
	return true
}

// file is the file of a source.
func (l *Log) file(source uint64) blockdev.File { return (*l.files.Load())[source] }

// Append gives the log one more storage, before or while it is in use. done is
// called, on any queue's thread, when the first portion is there, or with an
// error when there is none; the storage is then not used.
func (l *Log) Append(w *Worker, s Storage, done func(error)) {
	if s.Size != 0 && s.Size-s.Start < l.chunkSize {
		done(fmt.Errorf("%s: %d bytes are less than one chunk of %d", s.File.Name(), s.Size-s.Start, l.chunkSize))
		return
	}
	src := &source{file: s.File, used: s.Start, size: s.Size, room: s.Room, spare: s.Spare, portion: l.portion}
	l.mu.Lock()
	for len(l.sources) < s.Index {
		l.addSource(&source{done: true})
	}
	l.addSource(src)
	l.setLowLocked(false)
	if !s.Fixed {
		src.appended = done
		l.mu.Unlock()
		w.settleLater(l)
		return
	}
	src.done = true
	ok := l.extendLocked(uint64(len(l.sources)-1), s.Size-s.Start)
	if !ok {
		l.dropSourceLocked(src)
	}
	l.mu.Unlock()
	w.settleLater(l)
	if !ok {
		done(errExtents(s.File))
		return
	}
	done(nil)
}

// addSource makes a storage known, to readers without the lock too.
func (l *Log) addSource(s *source) {
	files := append(slices.Clone(*l.files.Load()), s.file)
	l.files.Store(&files)
	l.sources = append(l.sources, s)
}

// dropSourceLocked forgets a storage that could not be appended, so that those
// known count as their owner counts those appended.
func (l *Log) dropSourceLocked(s *source) {
	n := len(l.sources) - 1
	if l.sources[n] != s {
		return
	}
	files := slices.Clone((*l.files.Load())[:n])
	l.files.Store(&files)
	l.sources = l.sources[:n]
}

func errExtents(f blockdev.File) error {
	return fmt.Errorf("%s: the snapshot's storage is in %d pieces, and it cannot have more", f.Name(), maxExtents)
}

// extendLocked makes n more bytes of a source into regions.
func (l *Log) extendLocked(source uint64, n int64) bool {
	src := l.sources[source]
	ok := l.state.add(source, src.used, Region(n>>l.shift), l.shift)
	src.used += n >> l.shift << l.shift
	l.capacity = l.state.capacity()
	l.publishLocked(l.outlookLocked())
	return ok
}

// minSizeLocked is up to where a storage reaches, being allocated so far, unless
// somebody has truncated it: see blockdev.Op.MinSize.
func (l *Log) minSizeLocked(source uint64) int64 {
	return l.sources[source].used
}

// Used is how many bytes of a storage have been handed out: nothing was ever
// written beyond them.
func (l *Log) Used(f blockdev.File) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	used := int64(0)
	for i, s := range l.sources {
		if s.file == f {
			used = max(used, l.state.usedOf(uint64(i), l.next, l.shift))
		}
	}
	return used
}

// usedOf is Used of a source, when the regions before next have been handed out.
func (s *logState) usedOf(source uint64, next Region, shift uint) int64 {
	used := int64(0)
	for n := range s.extents() {
		if ext := s.extent(n); ext.source == source && ext.first < next {
			used = max(used, ext.off+int64(min(ext.count, next-ext.first))<<shift)
		}
	}
	return used
}

// growth is the one allocation of storage that a log has under way at most.
type growth struct {
	l      *Log
	w      *Worker
	op     blockdev.Op
	task   blockdev.Task // of the thread that stores
	active bool
	source uint64
}

func (g *growth) init(l *Log) {
	g.l = l
	g.op.Kind = blockdev.Allocate
	g.op.Done, g.task.Run = g.finished, g.start
}

// refusedLocked is the callbacks of Appends that came too late: nothing grows
// any more in a log that is dead.
func (l *Log) refusedLocked() []func(error) {
	if l.dead.Load() == 0 {
		return nil
	}
	return l.refuseLocked()
}

func (l *Log) refuseLocked() (done []func(error)) {
	for i, s := range l.sources {
		if s.appended == nil || l.growth.active && l.growth.source == uint64(i) {
			continue
		}
		done = append(done, s.appended)
		s.appended, s.done = nil, true
		defer l.dropSourceLocked(s)
	}
	return done
}

// nextGrowthLocked prepares the next growth, if there is need for one. It
// allocates no more than the areas can come to need, with one exception: a storage
// that is appended gets a first portion, so that its owner learns whether it works.
func (l *Log) nextGrowthLocked() bool {
	g := &l.growth
	if g.active || l.dead.Load() != 0 {
		return false
	}
	pick := -1
	for i, s := range l.sources {
		if s.appended != nil {
			pick = i
			break
		}
		if pick < 0 && s.left(l.chunkSize) > 0 {
			pick = i
		}
	}
	if pick < 0 {
		return false
	}
	s := l.sources[pick]
	have := l.capacity
	short := l.needLocked() - have
	low := short > 0 && int64(have-l.next)<<l.shift < l.portion/2 || l.next >= have && l.waiting.head != nil
	if s.appended == nil && !low {
		return false
	}
	g.active, g.source = true, uint64(pick)
	g.op.File = s.file
	g.op.Off, g.op.MinSize = s.used, l.minSizeLocked(uint64(pick))
	g.op.Len = max(min(s.portion, s.left(l.chunkSize), int64(short)<<l.shift)>>l.shift<<l.shift, l.chunkSize)
	l.busy++
	return true
}

func (g *growth) submit(w *Worker) {
	if g.w = g.l.storer; g.w != nil {
		g.w.q.Post(&g.task)
		return
	}
	g.w = w
	g.start()
}

func (g *growth) start() { g.w.q.Submit(&g.op) }

// finished takes the portion into use. A full file system, or quota, is asked
// again for half as much, until not even a chunk fits.
func (g *growth) finished(op *blockdev.Op) {
	l, w := g.l, g.w // g may be used again without the lock
	l.mu.Lock()
	l.ended++
	s := l.sources[g.source]
	var err error
	switch {
	case (op.Err == unix.ENOSPC || op.Err == unix.EDQUOT) && op.Len > l.chunkSize:
		s.portion = op.Len / 2
		g.active = false
		l.busy--
		l.mu.Unlock()
		w.settleLater(l)
		return
	case op.Err != 0:
		s.done = true
		err = fmt.Errorf("allocate %d bytes in %s: %w", op.Len, op.File.Name(), op.Err)
	case !l.extendLocked(g.source, op.Len):
		s.done = true
		err = errExtents(op.File)
	default:
		s.portion = l.portion
	}
	g.active = false
	l.busy--
	done := s.appended
	s.appended = nil
	if done != nil && err != nil {
		l.dropSourceLocked(s)
	}
	l.mu.Unlock()
	w.settleLater(l)
	if done != nil {
		done(err)
	}
}
