package sim

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// append gives the snapshot one more storage. Job only.
func (s *snapshot) append(kind int, done func()) {
	w := s.w
	if len(s.appended) >= w.c.Storages {
		done()
		return
	}
	size := int64(w.c.Limit) * sectorSize
	n := len(w.storages)
	st := diffarea.Storage{}
	var m *blockdevtest.Memory
	if w.c.Fixed>>(n%3)&1 != 0 {
		size = min(size, 8<<20)
		m = blockdevtest.NewMemoryDevice(fmt.Sprintf("store%d", n), size)
		st.Size, st.Fixed = size, true
		st.Start = int64(n%2) * diffarea.MinChunkSize
	} else {
		m = blockdevtest.NewMemoryFile(fmt.Sprintf("store%d", n), size)
		if kind&1 != 0 {
			st.Size = size
		}
		if w.full {
			m.SetLimit(0)
		}
	}
	m.SetBlockSize(int64(max(w.c.Sector, 1)) * sectorSize)
	st.File, st.Index = m, len(s.appended)
	w.storages = append(w.storages, m)
	pl := &storagePlace{of: s.dir, file: m, fixed: st.Fixed, wanted: kind&2 != 0, noted: st.Fixed && st.Start > 0}
	pl.name, pl.full, pl.header = newCached(nameless), newCached(false), newCached(false)
	w.places = append(w.places, pl)
	s.dir.places = append(s.dir.places, pl)
	s.put("storage is made", func(r *snapRecord) { r.storage = append(r.storage, storageRecord{stage: storageMaking}) }, func() {
		s.makePlace(st.Index, pl, func() {
			s.put("storage is used", func(r *snapRecord) { r.storage[st.Index].stage, r.storage[st.Index].use = storageUsed, st }, func() {
				s.appended = append(s.appended, st)
				s.give(st, func(err error) {
					if err == nil {
						done()
						return
					}
					s.appended[st.Index] = diffarea.Storage{}
					s.wipe(st.Index, done)
				})
			})
		})
	})
}

// give gives the engine a storage.
func (s *snapshot) give(st diffarea.Storage, done func(error)) {
	w, fired, m := s.w, s.w.fired, st.File.(*blockdevtest.Memory)
	size := int64(w.c.Limit) * sectorSize
	if st.Fixed {
		size = m.Size()
	}
	s.snap.Append(st, func(err error) {
		if err != nil && w.fired == fired && !errors.Is(err, unix.ENOSPC) && size-st.Start >= s.chunkSize && !s.broken() {
			w.fail("append: %v", err)
		}
		done(err)
	})
}

// event takes the snapshot's events.
func (s *snapshot) event(e diffarea.Event) {
	w := s.w
	w.tracef("%v: event %v %v", s, e.Kind, e.Errno)
	switch e.Kind {
	case diffarea.NoSpace:
		s.noSpace++
		if room := s.room(); room >= s.chunkSize {
			w.fail("%v: no space, yet there is room for %d more bytes", s, room)
		}
	case diffarea.Corrupted:
		w.stats.Breaks++
		if s.corrupted++; s.corrupted > 1 {
			w.fail("%v is corrupted twice", s)
		}
		if s.noSpace == 0 && w.fired == 0 {
			w.fail("I5: %v is corrupted for no reason: %v", s, e.Errno)
		}
		if s.noSpace > 0 && e.Errno != unix.ENOSPC {
			w.fail("%v has no space but is corrupted with %v", s, e.Errno)
		}
		s.tell()
		if e.Device != 0 && !slices.Contains(s.devs, int(e.Device-1)) {
			w.fail("%v is corrupted by device %d, which it does not have", s, e.Device)
		}
	case diffarea.LowFreeSpace:
		need := int64(0)
		for _, dev := range s.devs {
			need += int64(diffarea.Chunks(w.devices[dev].size, s.chunkSize)) * s.chunkSize
		}
		if most := min(max(int64(w.c.Portion)*sectorSize, s.chunkSize), need); e.Sectors <= 0 || w.deaths == 0 && e.Sectors*sectorSize > most {
			w.fail("%v wants %d sectors, it can need %d", s, e.Sectors, most/sectorSize)
		}
		if !s.cut {
			w.fail("%v wants storage before it is taken", s)
		}
	}
}

// tell tells the clients that the snapshot is broken. Nobody needs its key any more then.
func (s *snapshot) tell() {
	s.step("event", func() { s.heard = true }, func() {
		s.step("no key", func() { s.dir.remove(keyFile) }, func() {
			s.step("it is told", func() {
				if page := s.dir.files[takeFile]; page != nil {
					snapshots.NewTakePage(page).SetBreakReported()
				}
			}, func() {})
		})
	})
}

// checkTold is for a broken snapshot at rest.
func (s *snapshot) checkTold() {
	if !s.heard {
		s.w.fail("I5: %v is broken, and nobody was told", s)
	}
	if s.dir.key != nil {
		s.w.fail("I10: %v is broken, and its key is there", s)
	}
}

// checkReported sees to it that a break is reported, and nothing else: broken says whether
// there was one. It is reported at the end of the turn, so nothing may be under way.
func (s *snapshot) checkReported(broken bool) {
	if reported := s.corrupted > 0; s.w.deaths == 0 && reported != broken {
		s.w.fail("I5: %v is broken: %v (%v); reported: %v", s, broken, s.snap.Log().Err(), reported)
	}
}

// room is how much more the storage could take, in bytes. It is 0 if the storage has
// ever failed or been full, because the engine need not try again.
func (s *snapshot) room() int64 {
	if s.w.fired > 0 || s.w.wasFull {
		return 0
	}
	u := s.snap.Log().Usage()
	left := (u.Capacity - u.Regions) * u.ChunkSize
	for _, st := range s.appended {
		if st.File == nil {
			continue
		}
		m := st.File.(*blockdevtest.Memory)
		if max := m.Limit(); max > 0 {
			left += (max - m.Size()) / u.ChunkSize * u.ChunkSize
		}
	}
	return left
}

// checkUsed is for a destroyed snapshot: what is to be wiped must be all that
// was ever written.
func (s *snapshot) checkUsed() {
	for _, st := range s.appended {
		if st.File == nil {
			continue
		}
		if used, end := s.snap.Log().Used(st.File), s.w.written[st.File]; end > used {
			s.w.fail("I10: %v says that %d bytes of %s were used, yet something was written up to %d", s, used, st.File.Name(), end)
		}
	}
}

// checkUsage is for a log at rest.
func (s *snapshot) checkUsage() {
	if err := s.snap.Log().Check(); err != nil {
		s.w.fail("%v: %v", s, err)
	}
	u := s.snap.Log().Usage()
	if u.Regions > u.Capacity && !s.broken() {
		s.w.fail("%v: %d regions in storage for %d", s, u.Regions, u.Capacity)
	}
	if u.Unstored != 0 && !s.broken() {
		s.w.fail("%v: %d regions were never stored", s, u.Unstored)
	}
	copied := int64(0)
	for i, im := range s.images {
		a := s.snap.Image(i).Area()
		for c := range diffarea.Chunks(a.Size(), a.ChunkSize()) {
			if a.Load(c) == 0 {
				continue
			}
			copied++
			from := a.Start(c) / sectorSize
			to := min(a.Start(c+1), a.Size()) / sectorSize
			if !slices.Contains(im.needed[from:to], true) {
				s.w.fail("%v: chunk %d of disk%d was copied, and nothing was written there", s, c, im.dev)
			}
		}
	}
	if s.w.deaths == 0 && s.w.fired == 0 && !s.broken() && copied != u.Regions {
		s.w.fail("%v: %d regions handed out for %d chunks", s, u.Regions, copied)
	}
	if !s.aborted {
		s.checkReported(s.broken())
	}
}
