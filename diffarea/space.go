package diffarea

import (
	"sync/atomic"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// How much storage a log has, can have, and can come to need.

// unlimited is left of a source that takes all its filesystem has.
const unlimited = 1 << 62

// left is how many bytes the source may still grow by, as far as is known.
func (s *source) left(chunk int64) int64 { return s.leftIn(chunk, s.spare) }

// prospect is left, or what the filesystem has room for if that is less.
func (s *source) prospect(chunk int64) int64 { return s.leftIn(chunk, true) }

func (s *source) leftIn(chunk int64, room bool) int64 {
	end := int64(unlimited)
	if s.size != 0 {
		end = s.size
	}
	if room && s.room != 0 {
		end = min(end, s.room)
	}
	switch {
	case s.done:
		return 0
	case end == unlimited:
		return unlimited
	}
	return max(end-s.used, 0) / chunk * chunk
}

// Reach is how many bytes of a storage's file are in use, for SetRoom.
func (l *Log) Reach(f blockdev.File) (used int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, s := range l.sources {
		if s.file == f && !(l.growth.active && l.growth.source == uint64(i)) {
			return s.used
		}
	}
	return -1
}

// SetRoom says that a storage's file can come to have room bytes: see Storage.Room. used is
// what Reach said before the filesystem was looked at. If the file has grown since, or was
// growing, nobody knows whether room counts that, and nothing changes.
func (l *Log) SetRoom(w *Worker, f blockdev.File, used, room int64) {
	l.mu.Lock()
	changed := false
	for i, s := range l.sources {
		if s.file == f && s.used == used && s.room != room && !(l.growth.active && l.growth.source == uint64(i)) {
			s.room, changed = room, true
		}
	}
	l.mu.Unlock()
	if changed {
		w.settleLater(l)
	}
}

// canGrowLocked says whether more storage may come without anybody's help.
func (l *Log) canGrowLocked() bool {
	if l.growth.active {
		return true
	}
	for _, s := range l.sources {
		if s.left(l.chunkSize) > 0 {
			return true
		}
	}
	return false
}

// Expect says that an area of a disk of size bytes will come, so that storage is
// had for it beforehand.
func (l *Log) Expect(w *Worker, size int64) {
	l.mu.Lock()
	l.expected += Region(Chunks(size, l.chunkSize))
	l.mu.Unlock()
	w.settleLater(l)
}

// needLocked is how many regions the areas can come to need: one for each chunk.
func (l *Log) needLocked() Region { return max(l.expected, l.chunks) + l.lost }

// outlook is what storage can come to, in regions.
type outlook struct {
	need    Region // at most
	all     Region // that there will ever be, as things are
	limited bool   // false: nobody knows an end, and all is 0
}

func (l *Log) outlookLocked() outlook {
	o := outlook{need: l.needLocked(), all: l.capacity, limited: true}
	for _, s := range l.sources {
		left := s.prospect(l.chunkSize)
		if left == unlimited {
			return outlook{need: o.need}
		}
		o.all += Region(left >> l.shift)
	}
	return o
}

// warnLocked says that storage runs low when four fifths are used of all there will be,
// and the areas can come to need more than that. It says so once, and again after an
// Append, or if that was over in between, by a margin: if less than three quarters were
// used, or a sixteenth more than is needed could be had, because the filesystem has more
// room.
func (l *Log) warnLocked(o outlook) {
	if l.dead.Load() != 0 {
		return
	}
	enough := !o.limited || o.need <= o.all
	switch {
	case l.low && (!o.limited || o.need+o.need/16 <= o.all || 4*l.next < 3*o.all):
		l.setLowLocked(false)
	case !l.low && !enough && o.all > 0 && 5*l.next >= 4*o.all:
		l.setLowLocked(true)
		l.events = append(l.events, Event{
			Kind: LowFreeSpace, Sectors: min(int64(o.need-o.all)<<l.shift, l.portion) / sector.Size,
			Used: int64(l.next) << l.shift, Limit: int64(o.all) << l.shift,
		})
	}
}

// setLowLocked notes whether it is told that storage runs low. The next process does not
// tell it again.
func (l *Log) setLowLocked(low bool) {
	if l.low == low || l.dead.Load() != 0 {
		return
	}
	l.low = low
	v := uint64(0)
	if low {
		v = 1
	}
	l.state.put(stateLow, v)
}

// Usage is how full a log is.
type Usage struct {
	ChunkSize int64 // bytes
	Regions   int64 // handed out
	Unstored  int64 // of these, not yet in the storage
	Capacity  int64 // regions that the storage holds now
	Limit     int64 // regions that it will ever hold, as things are; -1: nobody knows an end
	Need      int64 // regions that the areas can come to need
	PoolSlots int64
}

// usage is a Usage as of the last change.
type usage struct{ next, storeNext, capacity, limit, need atomic.Int64 }

// publishLocked makes changes known to Usage.
func (l *Log) publishLocked(o outlook) {
	limit := int64(-1)
	if o.limited {
		limit = int64(o.all)
	}
	l.usage.storeNext.Store(int64(l.storeNext))
	l.usage.next.Store(int64(l.next))
	l.usage.capacity.Store(int64(l.capacity))
	l.usage.limit.Store(limit)
	l.usage.need.Store(int64(o.need))
}

// Usage says how full the log is. It waits for nobody and may be called at any time.
func (l *Log) Usage() Usage {
	stored := l.usage.storeNext.Load() // before the other, which is never less
	next := l.usage.next.Load()
	return Usage{
		ChunkSize: l.chunkSize,
		Regions:   next,
		Unstored:  next - stored,
		Capacity:  l.usage.capacity.Load(),
		Limit:     l.usage.limit.Load(),
		Need:      l.usage.need.Load(),
		PoolSlots: int64(l.poolSlots),
	}
}
