package sim

import (
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// takeOver is the next process's part in what a dead one left of a snapshot, as the files
// tell. The rest of it waits until the filters are served.
func (d *dir) takeOver() (rest func(done func())) {
	s, w := d.s, d.s.w
	s.devs, s.appended, s.takes, s.cipher = nil, nil, nil, d.key
	w.snaps[s.slot] = s
	if d.rec == nil {
		s.gone = true
		return func(done func()) {
			s.step("no directory", func() { w.removeDir(d) }, s.ended(done))
		}
	}
	for _, m := range d.rec.members {
		s.devs = append(s.devs, m.dev)
	}
	for _, st := range d.rec.storage {
		if st.stage != storageUsed {
			st.use = diffarea.Storage{}
		}
		s.appended = append(s.appended, st.use)
	}
	past := d.past()
	switch {
	case past.Stage.Ends(d.rec.pending):
		if s.told && !s.aborted {
			w.fail("I6: %v ends with the process", s)
		}
		s.gone = true
		return func(done func()) { s.hide(func() { s.clear(s.ended(done)) }) }
	case past.Stage == snapshots.Taken:
		s.reopen(past)
		return func(done func()) { s.show(func() { s.clearUnfinished(done) }) }
	}
	if s.cut {
		w.fail("I6: the take of %v is lost", s)
	}
	return func(done func()) { s.goOn(done) }
}

// believe is for a take that the last process did not bring to an end. Somebody may have
// believed in it, and asks for what changed since: but has only what was there at the take
// before.
func (d *dir) believe() {
	if d.rec == nil {
		return
	}
	past, w := d.past(), d.s.w
	if past.Stage != snapshots.Taking {
		return
	}
	d.s.untake()
	for i, m := range d.rec.members {
		last := &w.takes[m.dev]
		if now, err := w.proc.cbts[m.dev].Info(); err == nil && now != past.Before[i] && last.disk != nil {
			last.info = now
		}
	}
}

// void makes such a take good.
func (d *dir) void(then func()) {
	var past snapshots.Past
	if d.rec != nil {
		past = d.past()
	}
	if past.Stage != snapshots.Taking {
		then()
		return
	}
	void := func(i int, next func()) {
		dev := d.rec.members[i].dev
		d.s.step(fmt.Sprintf("void the take of disk%d", dev), func() { d.s.w.proc.cbts[dev].Void(past.Before[i]) }, next)
	}
	noPage := func(then func()) { d.s.step("no page", func() { d.remove(takeFile) }, then) }
	inTurn(len(past.Before), void, func() { noPage(then) })
}

// untake takes a cut back that did not come on record.
func (s *snapshot) untake() {
	if s.taken {
		s.w.fail("I6: the take of %v is lost", s)
	}
	for i, im := range s.images {
		if i < len(s.believed) {
			s.w.takes[im.dev] = s.believed[i]
		}
	}
	s.cut, s.images, s.takes = false, nil, nil
}

// ended is for a snapshot of which nothing is left.
func (s *snapshot) ended(done func()) func() {
	return func() {
		s.w.snaps[s.slot] = nil
		done()
	}
}

// goOn goes on with a snapshot that was not taken, in fresh memory: nothing was stored.
func (s *snapshot) goOn(done func()) {
	s.removeFiles("", func() {
		s.begin(func() {
			for _, dev := range s.devs {
				s.addTo(dev, nil)
			}
			inTurn(len(s.appended), func(n int, next func()) {
				if s.appended[n].File == nil {
					next()
					return
				}
				s.give(s.appended[n], func(err error) {
					if err == nil {
						next()
						return
					}
					s.appended[n] = diffarea.Storage{}
					s.end(done) // and nothing else goes on with it
				})
			}, func() { s.clearUnfinished(done) })
		})
	})
}

// clearUnfinished gives back what the dead process was making or giving back.
func (s *snapshot) clearUnfinished(done func()) {
	inTurn(len(s.dir.rec.storage), func(n int, next func()) {
		if st := s.dir.rec.storage[n].stage; st == storageMaking || st == storageLeaving {
			s.wipe(n, next)
			return
		}
		next()
	}, done)
}
