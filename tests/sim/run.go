package sim

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// words is size bytes of zeroed memory that can be taken away: page aligned, and
// off the heap.
func words(size int64) []byte {
	if size == 0 {
		return nil
	}
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return mem
}

// unmap takes words away for good.
func unmap(mem ...[]byte) {
	for _, m := range mem {
		if err := unix.Munmap(m); err != nil {
			panic(err)
		}
	}
}

// maxOutstanding is how many requests a client lets wait.
const maxOutstanding = 64

// next takes the next step when its time has come.
func (w *world) next() {
	if w.steps == len(w.c.Steps) {
		w.done = true
		return
	}
	st := w.c.Steps[w.steps]
	if st.Gap == settled && !w.quiet() || w.outstanding >= maxOutstanding {
		w.waiting = true
		return
	}
	w.steps++
	if w.trace != nil {
		w.tracef("step %d: %v", w.steps, st)
	}
	w.do(st)
	if w.steps < len(w.c.Steps) && w.c.Steps[w.steps].Gap != settled {
		w.client.After(uint(w.c.Steps[w.steps].Gap), w.next)
	} else {
		w.client.After(0, w.next)
	}
}

func (w *world) quiet() bool { return w.outstanding == 0 && w.proc != nil && w.proc.idle() }

// resume is called whenever something has ended.
func (w *world) resume() {
	if w.waiting && w.outstanding < maxOutstanding && (w.c.Steps[w.steps].Gap != settled || w.quiet()) {
		w.waiting = false
		w.client.After(0, w.next)
	}
	waiters := w.onIdle
	w.onIdle = nil
	for _, f := range waiters {
		f()
	}
}

var requestOps = map[Verb]ublk.Op{
	Read: ublk.OpRead, Write: ublk.OpWrite, Discard: ublk.OpDiscard, WriteZeroes: ublk.OpWriteZeroes, Flush: ublk.OpFlush,
	ImageRead: ublk.OpRead, ImageWrite: ublk.OpWrite, ImageDiscard: ublk.OpDiscard, ImageWriteZeroes: ublk.OpWriteZeroes,
	ImageFlush: ublk.OpFlush,
}

// do takes one step.
func (w *world) do(st Step) {
	slot := int(st.Snap) % len(w.snaps)
	s := w.snaps[slot]
	dev := int(st.Dev) % len(w.devices)
	switch st.Verb {
	case Read, Write, Discard, WriteZeroes, Flush:
		w.issue(w.devices[dev], st, requestOps[st.Verb])
	case ImageRead, ImageWrite, ImageDiscard, ImageWriteZeroes, ImageFlush:
		if s != nil {
			s.request(st, requestOps[st.Verb])
		}
	case Create:
		if w.proc != nil {
			w.create(st)
		}
	case Add:
		if s != nil && w.proc != nil {
			w.proc.do("add", func(done func()) {
				if w.snaps[slot] != s {
					done()
					return
				}
				s.add(dev, done)
			})
		}
	case Append:
		if s != nil && w.proc != nil {
			w.proc.do("append", func(done func()) {
				if w.snaps[slot] != s {
					done()
					return
				}
				s.append(int(st.Arg), done)
			})
		}
	case Take:
		if s != nil && w.proc != nil {
			s.take()
		}
	case Cancel:
		if p := w.proc; p != nil {
			p.control.After(0, func() {
				if p.cancel != nil {
					p.cancel()
				}
			})
		}
	case Destroy:
		if s != nil && w.proc != nil {
			s.destroy()
		}
	case Mark:
		if w.proc != nil {
			w.proc.control.After(0, func() { w.mark(dev, st) })
		}
	case Replace:
		if w.proc != nil {
			b := int64(max(w.c.Sector, 1))
			w.replace(dev, (int64(st.Arg%64)+b-1)/b*b*sectorSize)
		}
	case Stick:
		files := w.files()
		w.sched.Stick(files[int(st.Arg)%len(files)])
	case Unstick:
		w.unstick()
	case Slow:
		files := w.files()
		w.sched.SetSlow(files[int(st.Arg)%len(files)], uint(st.Len%8))
	case Pause:
		if w.proc != nil {
			w.proc.threads[int(st.Arg)%len(w.proc.threads)].Pause(uint(st.Len % 8))
		}
	case Fill, Room:
		w.full = st.Verb == Fill
		w.wasFull = w.wasFull || w.full
		for _, m := range w.storages {
			if w.full {
				m.SetLimit(m.Size())
			} else {
				m.SetLimit(int64(w.c.Limit) * sectorSize)
			}
		}
	case Truncate:
		w.truncate(st)
	case Checkpoint:
		if w.proc != nil && w.c.Zone != 0 && w.proc.keepers[dev] != nil {
			w.proc.keepers[dev].checkpoint()
		}
	case Kill:
		if w.proc != nil && w.deaths < w.c.Kills {
			w.client.After(0, w.kill)
		}
	}
}

// truncate makes a storage file shorter, as somebody does who takes it for a log.
func (w *world) truncate(st Step) {
	files := slices.DeleteFunc(slices.Clone(w.storages), func(m *blockdevtest.Memory) bool { return m.Limit() == 0 || m.Size() == 0 })
	if len(files) == 0 {
		return
	}
	w.fired++
	m := files[int(st.Arg)%len(files)]
	m.Resize(int64(st.Off) * sectorSize % m.Size())
	w.tracef("%s is truncated at sector %d", m.Name(), m.Size()/sectorSize)
}

// issue makes a request of a step.
func (w *world) issue(d *device, st Step, op ublk.Op) {
	r := &request{op: op, fua: st.FUA}
	if op != ublk.OpFlush {
		size := d.size / sectorSize
		off := int64(st.Off) % size
		n := min(max(int64(st.Len), 1), size-off)
		if op == ublk.OpRead || op == ublk.OpWrite {
			n = min(n, int64(w.c.MaxIO))
		}
		if b := int64(w.c.Sector); b > 1 {
			off = off / b * b
			n = min((n+b-1)/b*b, size-off)
		}
		r.off, r.len = off*sectorSize, n*sectorSize
	}
	if op == ublk.OpWrite {
		r.v = w.version()
	}
	d.submit(int(st.Queue), r, nil)
}

// mark marks blocks dirty by hand, whatever is going on.
func (w *world) mark(dev int, st Step) {
	if w.proc.away(dev) {
		return
	}
	d := w.model.devs[dev]
	size := w.devices[dev].size / sectorSize
	off := int64(st.Off) % size
	n := min(max(int64(st.Len), 1), size-off)
	first, last := d.blocks(off*sectorSize, n*sectorSize)
	now := d.epochs[len(d.epochs)-1]
	for b := first; b <= last; b++ {
		now.may[b] = true // even if the process dies half way
	}
	cbt := w.proc.cbts[dev]
	if err := cbt.MarkDirty([]cbtmap.Sectors{{First: uint64(off), Count: uint64(n)}}); err != nil {
		if w.deaths == 0 || !cbt.Corrupted() {
			w.fail("I3: mark dirty: %v", err)
		}
		return
	}
	d.changed(off*sectorSize, n*sectorSize)
	w.checkReadable(dev, off*sectorSize, n*sectorSize, now, "a range marked dirty")
	if w.c.Zone == 0 {
		return
	}
	epoch := len(d.epochs) - 1
	w.eachZone(dev, off*sectorSize, n*sectorSize, func(z *zoneModel) { z.under++ })
	w.proc.keepers[dev].marked(off*sectorSize, n*sectorSize, func() {
		now := w.tick()
		w.eachZone(dev, off*sectorSize, n*sectorSize, func(z *zoneModel) { z.under, z.last = z.under-1, now })
		w.oblige(dev, off*sectorSize, n*sectorSize, epoch)
	})
}

// checkReadable looks whether the readable map shows a change that belongs to
// the images of the epoch.
func (w *world) checkReadable(dev int, off, n int64, since epoch, what string) {
	if w.proc == nil || w.proc.cbts[dev] == nil {
		return
	}
	cbt, d := w.proc.cbts[dev], w.model.devs[dev]
	info, err := cbt.Info()
	if err != nil || info.GenerationID != since.generation {
		return // whoever reads it copies everything
	}
	first, last := d.blocks(off, n)
	m := make([]byte, last-first+1)
	if _, err := cbt.ReadMap(info.GenerationID, m, first); err != nil {
		w.fail("I3: change map of disk%d: %v", dev, err)
	}
	for i, v := range m {
		if v < since.number {
			w.fail("I3: %s of disk%d, block %d, at take %d: its byte says %d", what, dev, first+int64(i), since.number, v)
		}
	}
}

// replace removes a device that no snapshot holds and adds it again, grown.
func (w *world) replace(dev int, grow int64) {
	w.proc.do(fmt.Sprintf("replace %d", dev), func(done func()) {
		for _, s := range w.snaps {
			if s != nil && slices.Contains(s.devs, dev) {
				done()
				return
			}
		}
		d, p := w.devices[dev], w.proc
		d.abandon() // requests that come now wait
		p.replaceIdle(dev, d.size+grow, done)
	})
}

// replaceIdle goes on when the process has completed what it had.
func (p *process) replaceIdle(dev int, size int64, done func()) {
	w := p.w
	d, cbt := w.devices[dev], p.cbts[dev]
	if d.busy() {
		w.onIdle = append(w.onIdle, func() { p.control.After(0, func() { p.replaceIdle(dev, size, done) }) })
		return
	}
	switch {
	case w.c.Records != 0:
		p.remove(dev, size, done)
	case w.c.Zone != 0 && size == d.size:
		p.replaceKept(dev, done)
	case w.c.Zone != 0:
		k := p.keepers[dev]
		k.away = true
		k.do(func(end func()) {
			k.forget(func() {
				end()
				p.growAll(dev, size)
				p.comeBack(dev, done)
			})
		})
	case size != d.size:
		p.growAll(dev, size)
		p.addAgain(dev, done)
	default:
		cbt.NewGeneration()
		p.addAgain(dev, done)
	}
}

// begun tells the model that a map may have begun a generation outside of a take.
func (p *process) begun(dev int) {
	w := p.w
	m, size := w.model.devs[dev], w.devices[dev].size
	info, err := p.cbts[dev].Info()
	if err != nil || info.DeviceCapacity != size {
		w.fail("I3: disk%d of %d bytes has a change map of %d: %v", dev, size, info.DeviceCapacity, err)
	}
	strange := w.c.Zone != 0 && w.states[dev].strange
	if w.c.Zone != 0 {
		w.states[dev].strange = false
	}
	if now := m.epochs[len(m.epochs)-1]; info.GenerationID != now.generation {
		m.begin(info.GenerationID, info.ChangesNumber)
		m.allMay()
	} else if strange {
		w.fail("I3: the history of disk%d is believed, to which somebody wrote", dev)
	} else if info.ChangesNumber != now.number && !w.powerFailed {
		w.fail("I3: disk%d is at take %d, and its map was kept at take %d", dev, now.number, info.ChangesNumber)
	}
}

// growAll makes a disk larger, and its map with it.
func (p *process) growAll(dev int, size int64) {
	w := p.w
	w.grow(dev, size)
	if err := p.cbts[dev].Resize(size); err != nil {
		w.fail("resize: %v", err)
	}
	w.tmpfs.maps[dev] = p.cbts[dev].Memory()
}

// grow makes a disk larger, for which what is known of it is not believed.
func (w *world) grow(dev int, size int64) {
	if w.c.Zone != 0 {
		s := w.states[dev]
		s.gone, s.kept, s.ends = true, false, false
	}
	w.origs[dev].Resize(size)
	w.devices[dev].size = size
	w.model.devs[dev].resize(size)
}

// replaceKept keeps the map over the time without a filter.
func (p *process) replaceKept(dev int, done func()) {
	k := p.keepers[dev]
	k.away = true
	k.do(func(end func()) {
		k.leave(func() {
			end()
			p.cbts[dev] = p.w.newMap(dev)
			p.comeBack(dev, done)
		})
	})
}

// comeBack adds a device whose map may have been kept.
func (p *process) comeBack(dev int, done func()) {
	k := p.keep(dev)
	p.keepers[dev] = k
	k.do(func(end func()) {
		k.load()
		k.come(func() {
			end()
			p.control.After(0, func() {
				k.away = false
				p.w.tmpfs.maps[dev] = p.cbts[dev].Memory()
				p.addAgain(dev, done)
			})
		})
	})
}

// addAgain adds a device with the map that it has now.
func (p *process) addAgain(dev int, done func()) {
	p.begun(dev)
	p.filterOf(dev)
	p.serveOf(dev)
	done()
}

// finish is the end of a run: everything is looked at, then taken apart.
func (w *world) finish() {
	w.faults.Clear()
	for _, s := range w.states {
		w.whatIf(s.dev)
		if s.gone && w.stats.Faults == 0 && w.deaths == 0 && !w.gaveUp {
			w.fail("I6: a power failure would cost the history of disk%d, and nothing has failed", s.dev)
		}
	}
	for i, d := range w.devices {
		now := w.tick()
		w.model.checkDisk(d, 0, d.size/sectorSize, now, now, "at the end")
		if n := w.changing[w.origs[i]]; n != 0 {
			w.fail("%d writes to disk%d are in flight at the end", n, i)
		}
	}
	for _, s := range w.snaps {
		if s == nil || !s.taken {
			continue
		}
		for _, im := range s.images {
			im.readAll()
		}
		if w.settle(); w.powerFailed {
			return
		}
		if s.checkUsage(); s.broken() && !s.aborted {
			s.checkTold()
		}
	}
	for _, s := range w.snaps {
		if s == nil {
			continue
		}
		// The process may still die, and forget what it was told.
		for deaths := w.deaths; ; deaths = w.deaths {
			s.destroy()
			if w.settle(); w.powerFailed {
				return
			}
			if w.snaps[s.slot] == nil {
				break
			}
			if w.deaths == deaths {
				w.fail("%v was not destroyed", s)
			}
		}
	}
	for _, f := range w.proc.filters {
		if f.Held() {
			w.fail("%s is still held at the end", f.Orig().Name())
		}
	}
	if n := w.sched.InFlight(); n != 0 {
		w.fail("%d operations are in flight at the end", n)
	}
	w.checkRecords()
}
