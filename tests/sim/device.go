package sim

import (
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
)

// What the daemon does with the record of a filter:
//
//	new map ──> record ──> log begun, what was kept used up ──> device
//	what the disk is like ──> no device ──> map kept ──> no map ──> no record
//
// A death in between leaves a record of a device that the kernel has, which goes on, or of
// one that it has not, or at most a map. The map of a device that was being removed is kept
// by the next process, if the disk is still like that. All else that is left goes.

// adopt takes over the filter of a disk from a dead process, if there is one.
func (p *process) adopt(dev int) {
	w := p.w
	r := w.tmpfs.devices[dev]
	if r == nil || w.kernel[r.tag] == nil {
		return
	}
	cbt, err := cbtmap.Adopt(w.tmpfs.maps[dev])
	if err != nil {
		w.fail("I6: change map of disk%d: %v", dev, err)
	}
	p.cbts[dev] = cbt
	w.checkAdopted(dev, cbt)
	w.tmpfs.devices[dev] = &deviceRecord{tag: r.tag} // it does not end
}

// strangers write to disks that no filter holds while no process runs.
func (w *world) strangers() {
	for dev, r := range w.tmpfs.devices[:len(w.devices)] {
		if w.c.Zone != 0 && (r == nil || w.kernel[r.tag] == nil) && w.sched.Random().OneIn(4) {
			w.tracef("somebody writes to disk%d", dev)
			w.states[dev].like++
			w.states[dev].strange = true
		}
	}
}

// stepOf is a step of a device's.
func (p *process) stepOf(dev int, what string, do, then func()) {
	p.step(fmt.Sprintf("disk%d: %s", dev, what), do, then)
}

// remove removes a filter that nobody uses, and adds it again to the disk, which may have
// grown by then.
func (p *process) remove(dev int, size int64, done func()) {
	p.foresee(dev, func() { p.removeNow(dev, size, done) })
}

// foresee puts on record what a disk is like whose filter is about to be removed.
func (p *process) foresee(dev int, then func()) {
	w := p.w
	if p.keepers == nil {
		then()
		return
	}
	p.stepOf(dev, "what it is like", func() {
		w.tmpfs.devices[dev] = &deviceRecord{tag: w.devices[dev].tag, ends: true, like: w.states[dev].like}
	}, then)
}

// removeNow does what remove says.
func (p *process) removeNow(dev int, size int64, done func()) {
	w := p.w
	p.stepOf(dev, "no device", func() {
		w.deleted(w.devices[dev])
		if p.keepers != nil {
			w.states[dev].ends = true
		}
	}, func() {
		p.keepMap(dev, func() {
			p.filters[dev], p.cbts[dev] = nil, nil
			p.forget(dev, func() {
				if size != w.devices[dev].size {
					w.grow(dev, size)
				}
				p.addNew(dev, done)
			})
		})
	})
}

// keepMap keeps the map of a disk that has no filter any more.
func (p *process) keepMap(dev int, then func()) {
	if p.keepers == nil {
		then()
		return
	}
	k := p.keepers[dev]
	k.away = true
	k.do(func(end func()) {
		k.leave(func() {
			end()
			p.control.After(0, then)
		})
	})
}

// forget removes the rest of a filter that is not there any more.
func (p *process) forget(dev int, then func()) {
	w := p.w
	p.stepOf(dev, "no map", func() { w.tmpfs.maps[dev] = nil }, func() {
		p.stepOf(dev, "no record", func() { w.tmpfs.devices[dev] = nil }, then)
	})
}

// again adds a filter again whose adding or removal a dead process began: whoever asked for
// that asks again. First the rest of it goes.
func (p *process) again(dev int, done func()) {
	w := p.w
	if w.tmpfs.devices[dev] == nil { // a map at most, which no record leads to
		w.tmpfs.maps[dev] = nil
		p.addNew(dev, done)
		return
	}
	p.finishRemoval(dev, func() {
		p.stop(dev, func() {
			p.forget(dev, func() { p.addNew(dev, done) })
		})
	})
}

// finishRemoval keeps the map of a disk whose filter a dead process was removing, and which
// that one has not removed yet, if nobody has written to the disk since.
func (p *process) finishRemoval(dev int, then func()) {
	w, r := p.w, p.w.tmpfs.devices[dev]
	if p.keepers == nil || !r.ends || w.tmpfs.maps[dev] == nil || r.like != w.states[dev].like {
		then()
		return
	}
	cbt, err := cbtmap.Adopt(w.tmpfs.maps[dev])
	if err != nil {
		w.fail("I6: change map of disk%d: %v", dev, err)
	}
	p.cbts[dev] = cbt
	p.keepers[dev] = p.keep(dev)
	p.keepMap(dev, func() {
		p.cbts[dev], p.keepers[dev] = nil, nil
		then()
	})
}

// runs says whether what counts of a disk is a log, which only a filter writes.
func (w *world) runs(dev int) bool {
	if w.c.Zone == 0 {
		return false
	}
	s := w.states[dev]
	return s.records[s.number(s.name)].log != nil
}

// stop takes back what is believed of a filter with a log that is not there any more. What
// was kept at its end stays.
func (p *process) stop(dev int, then func()) {
	w := p.w
	if !w.runs(dev) {
		then()
		return
	}
	p.cbts[dev] = w.newMap(dev) // which the keeper has to have
	k := p.keep(dev)
	p.cbts[dev] = nil
	k.do(func(end func()) {
		k.forget(func() {
			end()
			p.control.After(0, then)
		})
	})
}

// addNew puts a filter over a disk that has none.
func (p *process) addNew(dev int, done func()) {
	w := p.w
	if w.runs(dev) {
		w.fail("I3: a power failure now would bring back a history of disk%d, which has no filter", dev)
	}
	p.stepOf(dev, "map", func() {
		p.cbts[dev] = w.newMap(dev)
		w.tmpfs.maps[dev] = p.cbts[dev].Memory()
	}, func() {
		var k *keeper
		if p.keepers == nil {
			p.begun(dev)
		} else {
			k = p.keep(dev)
			p.keepers[dev] = k
			k.load()
		}
		tag := w.newTag()
		p.stepOf(dev, "record", func() { w.tmpfs.devices[dev] = &deviceRecord{tag: tag} }, func() {
			p.beginLog(k, func() {
				p.stepOf(dev, "device", func() {
					w.made(w.devices[dev], tag)
					p.filterOf(dev)
					p.serveOf(dev)
				}, done)
			})
		})
	})
}

// beginLog begins the log of a disk that nobody writes to yet.
func (p *process) beginLog(k *keeper, then func()) {
	if k == nil {
		then()
		return
	}
	k.do(func(end func()) {
		k.come(func() {
			end()
			p.control.After(0, func() {
				k.away = false
				then()
			})
		})
	})
}
