package sim

import (
	"bytes"
	"errors"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/mutation"
)

// What a power failure must leave of a change map is checked when the power fails, and
// beforehand at every instant that has a consequence: when a change of the disk is submitted,
// when a take, a write to an image or a mark by hand is answered.

var errNothing = errors.New("nothing is to be believed")

// recovered is the history that the next boot finds, if see shows what is left of a file.
func (s *state) recovered(see func(*blockdevtest.Memory) *blockdevtest.Memory) (cbtmap.History, record, error) {
	r := s.records[s.number(see(s.name))]
	if r.file == nil {
		return cbtmap.History{}, r, errNothing
	}
	file := contentOf(see(r.file), r.size)
	if r.log != nil {
		h, err := intentlog.Recover(file, contentOf(see(r.log), r.log.Size()))
		return h, r, err
	}
	m := s.w.newMap(s.dev)
	if err := m.Load(file); err != nil {
		return cbtmap.History{}, r, err
	}
	h, err := m.Copy()
	return h, r, err
}

// newMap is a new change map for a disk.
func (w *world) newMap(dev int) *cbtmap.Map {
	m, err := cbtmap.NewMemory(w.devices[dev].size, cbtmap.Params{
		MinimumShift: uint8(w.c.Block), MaximumShift: uint8(w.c.Block), MaximumCount: 1 << 30,
	})
	if err != nil {
		panic(err)
	}
	return m
}

// oblige notes that the blocks of a range have to be found changed after a power failure:
// in the epoch, which is an index.
func (w *world) oblige(dev int, off, n int64, epoch int) {
	if w.c.Zone == 0 || n == 0 {
		return
	}
	d := w.model.devs[dev]
	first, last := d.blocks(off, n)
	for b := first; b <= last && b < int64(len(d.owed)); b++ {
		d.owed[b] = max(d.owed[b], int32(epoch))
	}
	w.whatIf(dev)
}

// meanwhile calls f, which a thread of the process does without a pause, while other things
// happen where it takes a lock. Only a build with the copies of package bugs has such places.
func (w *world) meanwhile(f func()) {
	p := w.proc
	var others func()
	others = func() {
		mutation.OnLock(nil)
		for w.chance.OneIn(2) && w.sched.Meanwhile() {
			if w.proc != p {
				panic(death{})
			}
		}
		mutation.OnLock(others)
	}
	mutation.OnLock(others)
	defer mutation.OnLock(nil)
	f()
}

// whatIf checks what would be left if the power failed now, and nothing in flight came to
// the disk.
func (w *world) whatIf(dev int) {
	if w.c.Zone == 0 || w.powerFailed {
		return
	}
	choose := w.chance.Intn
	if w.chance.OneIn(2) {
		choose = func(int) int { return 0 }
	}
	h, r, err := w.states[dev].recovered(func(m *blockdevtest.Memory) *blockdevtest.Memory { return m.Left(choose) })
	w.checkHistory(dev, h, r, err)
}

// whatIfAnswered is whatIf at an instant that has a consequence for a backup: a take has been
// answered, or a base counts.
func (w *world) whatIfAnswered(dev int) {
	if w.powerFailed {
		return
	}
	w.whatIf(dev)
	left := func(m *blockdevtest.Memory) *blockdevtest.Memory { return m.Left(w.chance.Intn) }
	if h, _, err := w.states[dev].recovered(left); err == nil {
		w.checkBackup(dev, h, left(w.origs[dev]))
	}
}

// checkHistory compares what was recovered with what has to be there.
func (w *world) checkHistory(dev int, h cbtmap.History, r record, err error) {
	s, d := w.states[dev], w.model.devs[dev]
	if err != nil {
		if !s.gone {
			w.fail("I6: after a power failure the change map of disk%d is lost: %v", dev, err)
		}
		return
	}
	if h.DeviceCapacity != w.devices[dev].size {
		w.fail("I6: after a power failure the change map of disk%d is for %d bytes, the disk has %d", dev, h.DeviceCapacity, w.devices[dev].size)
	}
	for b, m := range h.Marks {
		if m > h.ChangesNumber+1 {
			w.fail("I3: after a power failure disk%d block %d is marked with %d at take %d", dev, b, m, h.ChangesNumber)
		}
	}
	last := d.epochOf(h.Info)
	if last < 0 {
		w.fail("I6: after a power failure the change map of disk%d is at %v, take %d, which never was", dev, h.GenerationID, h.ChangesNumber)
	}
	if told := w.answered[dev]; told.disk != nil && last < d.epochOf(told.info) {
		w.fail("I6: after a power failure disk%d is at take %d of %v, and take %d of %v has been answered",
			dev, h.ChangesNumber, h.GenerationID, told.info.ChangesNumber, told.info.GenerationID)
	}
	for b, e := range d.owed {
		if e < 0 {
			continue
		}
		// What belongs to a later take than the last durable one counts as changed since that.
		owed := d.epochs[min(int(e), last)]
		if owed.generation == h.GenerationID && h.Marks[b] <= owed.number {
			w.fail("I3: disk%d block %d changed after take %d; after a power failure, at take %d, its byte says %d",
				dev, b, owed.number, h.ChangesNumber, h.Marks[b])
		}
	}
	w.checkExact(dev, h, r)
}

// epochOf is the index of the epoch that a take has begun, -1 if there was none.
func (d *devModel) epochOf(i cbtmap.Info) int {
	for e := len(d.epochs) - 1; e >= 0; e-- {
		if d.epochs[e].generation == i.GenerationID && d.epochs[e].number == i.ChangesNumber {
			return e
		}
	}
	return -1
}

// checkExact looks for blocks that count as changed though the map in memory did not say
// so, and nobody wrote to their zone since the base.
func (w *world) checkExact(dev int, h cbtmap.History, r record) {
	const activeAt = 512
	if w.proc == nil || w.proc.cbts[dev] == nil {
		return
	}
	if i, err := w.proc.cbts[dev].Info(); err != nil || i.GenerationID != h.GenerationID {
		return
	}
	for b, m := range h.Marks {
		if m <= min(w.tmpfs.maps[dev][activeAt+b], h.ChangesNumber+1) {
			continue
		}
		written := false
		from := int64(b) << w.c.Block
		w.eachZone(dev, from, min(1<<w.c.Block, h.DeviceCapacity-from), func(z *zoneModel) {
			written = written || z.under > 0 || z.last > r.at
		})
		if r.log == nil || !written {
			w.fail("disk%d block %d: after a power failure its byte says %d, before it said %d, and nobody wrote to its zone since the base",
				dev, b, m, w.tmpfs.maps[dev][activeAt+b])
		}
	}
}

// zoneModel is one zone of a disk's log.
type zoneModel struct {
	under int    // changes of it under way
	last  moment // when the last one ended
}

// eachZone calls f for the zones of a range.
func (w *world) eachZone(dev int, off, n int64, f func(z *zoneModel)) {
	if w.c.Zone == 0 || n == 0 {
		return
	}
	for i := off >> w.c.Zone; i <= (off+n-1)>>w.c.Zone; i++ {
		for int64(len(w.zones[dev])) <= i {
			w.zones[dev] = append(w.zones[dev], zoneModel{})
		}
		f(&w.zones[dev][i])
	}
}

// checkBackup is for a disk that has lost what was not flushed: a backup that has the last
// answered take, and copies what the recovered map calls changed since, must then have the
// disk.
func (w *world) checkBackup(dev int, h cbtmap.History, disk *blockdevtest.Memory) {
	told := w.answered[dev]
	if told.disk == nil || told.info.GenerationID != h.GenerationID {
		return
	}
	for b, m := range h.Marks {
		from := int64(b) << w.c.Block
		n := min(int64(1)<<w.c.Block, told.disk.Size()-from, disk.Size()-from)
		if m > told.info.ChangesNumber || n <= 0 {
			continue
		}
		p, q := make([]byte, n), make([]byte, n)
		if _, err := told.disk.ReadAt(p, from); err != nil {
			panic(err)
		}
		if _, err := disk.ReadAt(q, from); err != nil {
			panic(err)
		}
		if !bytes.Equal(p, q) {
			w.fail("I3: after a power failure disk%d differs from take %d in block %d, whose byte says %d", dev, told.info.ChangesNumber, b, m)
		}
	}
}

// reboots are the boots after the power failure, of which all but the last end with another
// one: whatever they had done by then, the history is the same.
func (w *world) reboots() {
	first := make([]cbtmap.History, len(w.devices))
	for left := w.sched.Random().Intn(4); ; left-- {
		p := w.start()
		p.filters = make([]*filter.Filter, len(w.devices))
		for dev := range w.devices {
			s := w.states[dev]
			p.cbts = append(p.cbts, w.newMap(dev))
			h, _, err := s.recovered(asItIs)
			if err == nil {
				if err := p.cbts[dev].Restore(h); err != nil {
					w.fail("I6: disk%d: %v", dev, err)
				}
			}
			if f := first[dev]; f.Marks == nil {
				first[dev] = h
			} else if err != nil || f.Info != h.Info || !bytes.Equal(f.Marks, h.Marks) {
				w.fail("I6: disk%d: the first boot finds take %d of %v, a later one take %d of %v, %v, or other marks",
					dev, f.ChangesNumber, f.GenerationID, h.ChangesNumber, h.GenerationID, err)
			}
		}
		p.keepAll()
		ended := false
		p.startAll(func(int) {}, func() { ended = true })
		if left == 0 {
			w.sched.Run()
			if !ended {
				w.fail("I8: a boot after a power failure does not end")
			}
			return
		}
		for n := w.sched.Random().Intn(100); n > 0 && w.sched.Step(); n-- {
		}
		w.sched.PowerFail(w.stateFiles()...)
	}
}

// asItIs is what is left of a file after the power has failed.
func asItIs(m *blockdevtest.Memory) *blockdevtest.Memory { return m }

// stateFiles are the files of all states.
func (w *world) stateFiles() (files []*blockdevtest.Memory) {
	for _, s := range w.states {
		files = append(files, s.files()...)
	}
	return files
}
