package sim

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// take makes the cut.
func (s *snapshot) take() {
	w := s.w
	w.proc.do(fmt.Sprintf("take %d", s.slot), func(done func()) {
		if w.snaps[s.slot] != s {
			done()
			return
		}
		s.tryTake(done)
	})
}

// tryTake takes, with the page of the take on record before.
func (s *snapshot) tryTake(done func()) {
	if s.cut || len(s.devs) == 0 {
		s.tryCut(done, done) // which fails
		return
	}
	var before []cbtmap.Info
	for _, dev := range s.devs {
		info, _ := s.w.proc.cbts[dev].Info()
		before = append(before, info)
	}
	s.makePage(before, func() {
		s.tryCut(done, func() {
			s.step("no page", func() { s.dir.remove(takeFile) }, done)
		})
	})
}

// makePage puts on record what the change maps say before a take.
func (s *snapshot) makePage(before []cbtmap.Info, then func()) {
	d, page := s.dir, s.w.words(snapshots.TakeSize(len(before)))
	s.step("page of the take", func() {
		d.remove(freshTake)
		d.files[freshTake] = page
	}, func() {
		s.step("numbers before the take", func() { snapshots.NewTakePage(page).Format(before) }, func() {
			s.step("name of the page", func() {
				delete(d.files, freshTake)
				d.files[takeFile] = page
			}, then)
		})
	})
}

// tryCut calls failed if there is no take.
func (s *snapshot) tryCut(done, failed func()) {
	w := s.w
	before := s.taken
	w.proc.cancel, w.proc.cutting = s.snap.Cancel, true
	cut := false
	s.snap.Take(func() {
		cut = true
		s.atCut()
		snapshots.NewTakePage(s.dir.files[takeFile]).Taken(len(s.devs), s.snap.TakeInfo)
	}, func(err error) {
		w.proc.cutting = false
		switch {
		case err == nil && !cut:
			w.fail("I7: take of %v is over without a cut", s)
		case err != nil && cut:
			w.fail("I7: take of %v fails after the cut: %v", s, err)
		case err == nil:
			w.stats.Takes++
			s.show(func() { s.answer(done) })
			return
		case errors.Is(err, snapimage.ErrTaken):
			if !before {
				w.fail("take: %v", err)
			}
		case errors.Is(err, snapimage.ErrCancelled), errors.Is(err, snapimage.ErrNoStorage):
		case errors.Is(err, snapimage.ErrNoDevices) && len(s.devs) == 0:
		case errors.Is(err, unix.ENOMEM) && w.tables == w.c.NoMemory:
		default:
			w.fail("take: %v", err)
		}
		failed()
	})
}

// answer tells that the snapshot has been taken, when no power failure can take it back.
func (s *snapshot) answer(done func()) {
	w := s.w
	if w.c.Zone == 0 {
		done()
		return
	}
	left := len(s.devs)
	for i, dev := range s.devs {
		w.proc.keepers[dev].taken(s.takes[i], func() {
			if left--; left > 0 {
				return
			}
			for i, dev := range s.devs {
				w.answered[dev] = taken{s.images[i].base, s.takes[i]}
				w.whatIfAnswered(dev)
				if w.sched.Random().OneIn(2) {
					w.proc.keepers[dev].checkpoint()
				}
			}
			done()
		})
	}
}

// atCut is the instant of the cut: the originals hold what the images must
// show, and nothing is being written.
func (s *snapshot) atCut() {
	w := s.w
	w.tracef("%v: cut", s)
	if s.cut {
		w.fail("I7: %v is cut twice", s)
	}
	s.cut = true
	s.believed = nil
	for i, dev := range s.devs {
		s.believed = append(s.believed, w.takes[dev])
		if n := w.changing[w.origs[dev]]; n != 0 {
			w.fail("I7: %d writes are in flight on disk%d at the cut", n, dev)
		}
		im := &image{snap: s, dev: dev, base: w.origs[dev].Clone(), needed: make([]bool, w.devices[dev].size/sectorSize)}
		w.devices[dev].eachWrite(im.needs)
		reg := newRegister(dev, im.version)
		im.device = newDevice(w, im.String(), dev, w.devices[dev].size, w.c.IQueues, w.c.Depth, reg)
		im.device.image = im
		s.images = append(s.images, im)
		w.checkSwitched(i, dev, s)
	}
}

// checkSwitched compares device dev's change map with the model right after a
// cut.
func (w *world) checkSwitched(i, dev int, s *snapshot) {
	cbt := w.proc.cbts[dev]
	info, err := cbt.Info()
	if err != nil {
		w.fail("I3: change map of disk%d: %v", dev, err)
	}
	s.takes = append(s.takes, info)
	if t := s.snap.TakeInfo(i); t != info {
		w.fail("I3: %v says its take of disk%d is %v, the map says %v", s, dev, t, info)
	}
	m := make([]byte, info.BlockCount)
	if _, err := cbt.ReadMap(info.GenerationID, m, 0); err != nil {
		w.fail("I3: change map of disk%d: %v", dev, err)
	}
	w.checkIncrement(dev, s, info)
	d := w.model.devs[dev]
	d.checkMap(m, info.GenerationID, info.ChangesNumber, w.deaths == 0)
	d.begin(info.GenerationID, info.ChangesNumber)
}

// checkIncrement does what a backup does: it takes what the change map calls
// changed since the take before, and must then have all that differs.
func (w *world) checkIncrement(dev int, s *snapshot, info cbtmap.Info) {
	now := taken{w.origs[dev].Clone(), info}
	before := w.takes[dev]
	w.takes[dev] = now
	if before.disk == nil || before.info.GenerationID != info.GenerationID {
		return
	}
	changed, err := w.proc.cbts[dev].Changes(info.GenerationID, uint64(before.info.ChangesNumber))
	if err != nil {
		w.fail("I3: changes of disk%d since take %d: %v", dev, before.info.ChangesNumber, err)
	}
	p, q := make([]byte, 1<<w.c.Block), make([]byte, 1<<w.c.Block)
	same := func(from, to int64) {
		for ; from < to; from += int64(len(p)) {
			n := min(to-from, int64(len(p)))
			if _, err := before.disk.ReadAt(p[:n], from); err != nil {
				panic(err)
			}
			if _, err := now.disk.ReadAt(q[:n], from); err != nil {
				panic(err)
			}
			if !bytes.Equal(p[:n], q[:n]) {
				w.fail("I3: disk%d differs at sector %d+%d between takes %d and %d, and the change map has no change there",
					dev, from/sectorSize, n/sectorSize, before.info.ChangesNumber, info.ChangesNumber)
			}
		}
	}
	at := int64(0)
	for r, err := range changed {
		if err != nil {
			w.fail("I3: changes of disk%d: %v", dev, err)
		}
		if r.Offset < at || r.Length <= 0 {
			w.fail("I3: disk%d: changes %d+%d after %d", dev, r.Offset, r.Length, at)
		}
		same(at, r.Offset)
		at = r.Offset + r.Length
	}
	same(at, info.DeviceCapacity)
}

// taken is a disk at a cut, as a backup has it.
type taken struct {
	disk *blockdevtest.Memory
	info cbtmap.Info
}
