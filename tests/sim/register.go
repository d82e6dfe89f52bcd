package sim

import "slices"

// moment is the simulator's clock: every submission and completion of a request
// has its own.
type moment uint64

const never moment = 1<<64 - 1

// written is one write of one sector, as its issuer saw it.
type written struct {
	id   uint64 // of the request
	v    Version
	from moment // submitted
	to   moment // completed, never while it is under way
	// weak: it may have happened or not, so it puts an end to nothing before
	// it. Discards and failed writes are weak.
	weak bool
	// hard: it survives a power failure, unless it is overwritten.
	hard bool
}

// cell is what one sector may hold: the writes that are not known to be
// overwritten. It is the plain model of a sector: no chunk, no snapshot.
//
// A write w is superseded when another one that is not weak was submitted after w
// completed, and has completed itself.
type cell []written

// superseded says whether w is overwritten for a read that began at start.
func (c cell) superseded(w written, start moment) bool {
	for _, later := range c {
		if !later.weak && later.from > w.to && later.to < start {
			return true
		}
	}
	return false
}

// lost says whether w is overwritten for whoever looks after a power failure.
func (c cell) lost(w written) bool {
	for _, later := range c {
		if later.hard && !later.weak && later.from > w.to {
			return true
		}
	}
	return false
}

// survives says whether v may be there after a power failure.
func (c cell) survives(v Version) bool {
	for _, w := range c {
		if w.v == v && !c.lost(w) {
			return true
		}
	}
	return false
}

// allows says whether a read that began at start, and ends now, may see v.
func (c cell) allows(v Version, start moment) bool {
	for _, w := range c {
		if w.v == v && !c.superseded(w, start) {
			return true
		}
	}
	return false
}

// begin notes a write submitted at now.
func (c cell) begin(id uint64, v Version, now moment, weak bool) cell {
	return append(c, written{id: id, v: v, from: now, to: never, weak: weak})
}

// end notes its completion at now. failed: it may have happened or not.
func (c cell) end(id uint64, now moment, failed bool) {
	for i := range c {
		if c[i].id == id && c[i].to == never {
			c[i].to = now
			c[i].weak = c[i].weak || failed
		}
	}
}

// prune forgets what no read begun at oldest or later may see, nor, if the
// disk has a volatile cache, anyone after a power failure.
func (c cell) prune(oldest moment, volatile bool) cell {
	if len(c) < 2 {
		return c
	}
	var gone []bool
	for i, w := range c {
		if c.superseded(w, oldest) && (!volatile || c.lost(w)) {
			if gone == nil {
				gone = make([]bool, len(c))
			}
			gone[i] = true
		}
	}
	if gone == nil {
		return c
	}
	n := 0
	for i, w := range c {
		if !gone[i] {
			c[n] = w
			n++
		}
	}
	return c[:n]
}

// decided notes that a read saw v, when the oldest read under way began at
// oldest: if nobody has been writing since, it is what the sector holds.
func (c cell) decided(v Version, oldest moment) cell {
	if len(c) < 2 {
		return c
	}
	for _, w := range c {
		if w.to >= oldest {
			return c
		}
	}
	i := slices.IndexFunc(c, func(w written) bool { return w.v == v })
	w := c[i]
	w.weak = false
	return append(c[:0], w)
}

// versions is for messages: what a read begun at start may see.
func (c cell) versions(start moment) (vs []Version) {
	for _, w := range c {
		if !c.superseded(w, start) {
			vs = append(vs, w.v)
		}
	}
	return vs
}

// register is the plain model of a device that can be read and written: a cell
// per sector.
type register struct {
	dev    int // whose stamps its sectors carry
	base   func(sector int64) Version
	cells  map[int64]cell // sectors that were written since
	readAt map[moment]int // starts of the reads under way
	// volatile: what was not flushed can be lost.
	volatile bool
}

func newRegister(dev int, base func(int64) Version) *register {
	return &register{dev: dev, base: base, cells: make(map[int64]cell), readAt: make(map[moment]int)}
}

func (r *register) cell(sector int64) cell {
	if c := r.cells[sector]; c != nil {
		return c
	}
	return cell{{v: r.base(sector)}}
}

// begin notes the submission of write id, of version v.
func (r *register) begin(id uint64, v Version, from, to int64, now moment, weak bool) {
	for s := from; s < to; s++ {
		r.cells[s] = r.cell(s).begin(id, v, now, weak)
	}
}

// end notes its completion.
func (r *register) end(id uint64, from, to int64, now moment, failed bool) {
	oldest := min(now+1, r.oldestRead())
	for s := from; s < to; s++ {
		c := r.cells[s]
		c.end(id, now, failed)
		r.cells[s] = c.prune(oldest, r.volatile)
	}
}

// harden notes that write id is durable.
func (r *register) harden(id uint64, from, to int64) {
	for s := from; s < to; s++ {
		for i := range r.cells[s] {
			if r.cells[s][i].id == id {
				r.cells[s][i].hard = true
			}
		}
	}
}

// flushed notes that all that had completed by start is durable.
func (r *register) flushed(start moment) {
	for _, c := range r.cells {
		for i := range c {
			c[i].hard = c[i].hard || c[i].to < start
		}
	}
}

// oldestRead is the start of the oldest read under way.
func (r *register) oldestRead() moment {
	oldest := never
	for at := range r.readAt {
		oldest = min(oldest, at)
	}
	return oldest
}

// beginRead notes the submission of a read.
func (r *register) beginRead(now moment) { r.readAt[now]++ }

// endRead notes the completion of the read that began at start.
func (r *register) endRead(start moment) {
	if r.readAt[start]--; r.readAt[start] == 0 {
		delete(r.readAt, start)
	}
}

// check says whether a read begun at start, ending now, may see v in sector,
// and learns from it.
func (r *register) check(sector int64, v Version, start moment) bool {
	c := r.cells[sector]
	if c == nil {
		return v == r.base(sector)
	}
	if !c.allows(v, start) {
		return false
	}
	if !r.volatile {
		r.cells[sector] = c.decided(v, r.oldestRead())
	}
	return true
}
