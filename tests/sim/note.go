package sim

// A snapshot's note is on stable storage while there is anything on its storage that a
// power failure would leave to be read, or to lie about. What a note names the first process
// of the next boot clears:
//
//	hidden name noted ──> file ──> file noted ──> its name, durable ──> stored to
//	device noted ──> header, durable ──> stored to
//	empty, durable ──> no name or header, durable ──> no note

// cached is a small thing on stable storage with a volatile cache. A power failure leaves any
// of what it has been since it last was durable.
type cached[T comparable] struct{ since []T }

func newCached[T comparable](v T) cached[T] { return cached[T]{[]T{v}} }

func (c *cached[T]) now() T { return c.since[len(c.since)-1] }

func (c *cached[T]) set(v T) {
	if v != c.now() {
		c.since = append(c.since, v)
	}
}

// sync makes it durable.
func (c *cached[T]) sync() { c.since = c.since[len(c.since)-1:] }

// lose is a power failure.
func (c *cached[T]) lose(choose func(n int) int) { c.since = []T{c.since[choose(len(c.since))]} }

// fileName is what a file is called.
type fileName int

const (
	nameless fileName = iota
	hidden            // as which it was made
	named             // as was asked for
)

// note is what is noted of a snapshot's storage.
type note struct {
	hidden map[*storagePlace]bool // by the name under which it is made
	known  map[*storagePlace]bool // by what it is, or by its header
}

// keepNote puts the note on stable storage, in the place of the last.
func (s *snapshot) keepNote(then func()) {
	if s.w.c.Records == 0 {
		then()
		return
	}
	s.step("note", func() {
		n := &note{make(map[*storagePlace]bool), make(map[*storagePlace]bool)}
		for _, st := range s.dir.rec.storage {
			if st.name != nil {
				n.hidden[st.name] = true
			}
			if st.place != nil {
				n.known[st.place] = true
			}
		}
		s.dir.note.set(n)
		s.dir.note.sync()
	}, then)
}

// dropNote removes it: there is nothing left that it names.
func (s *snapshot) dropNote(then func()) {
	if s.w.c.Records == 0 {
		then()
		return
	}
	s.step("no note", func() {
		s.dir.note.set(nil)
		s.dir.note.sync()
	}, then)
}

// finds says whether the next boot finds a place by a note, if that is what it has.
func (n *note) finds(pl *storagePlace, name fileName, header bool) bool {
	switch {
	case n == nil:
		return false
	case pl.fixed:
		return n.known[pl] && header
	}
	return n.known[pl] || n.hidden[pl] && name == hidden
}

// checkNotes is for every instant: whatever a power failure leaves now, the next boot finds
// it.
func (w *world) checkNotes() {
	for _, d := range w.tmpfs.dirs {
		for _, pl := range d.places {
			for _, n := range d.note.since {
				pl.checkNote(n)
			}
		}
	}
}

func (pl *storagePlace) checkNote(n *note) {
	for _, name := range pl.name.since {
		for _, header := range pl.header.since {
			if (name != nameless || header) && !n.finds(pl, name, header) {
				pl.of.s.w.fail("I10: after a power failure nobody knows of %v, which %v has made", pl, pl.of.s)
			}
			for _, full := range pl.full.since {
				if full && (name != nameless || pl.fixed && pl.noted) && !n.finds(pl, name, header) {
					pl.of.s.w.fail("I10: after a power failure %v can be read, to which %v stored", pl, pl.of.s)
				}
			}
		}
	}
}

// stored notes that something is stored in a place.
func (w *world) stored(pl *storagePlace) {
	if !pl.of.rec.encrypted {
		pl.full.set(true)
	}
	for _, n := range pl.of.note.since {
		pl.checkNote(n)
	}
}

// clearLost is what the boots after a power failure do, of which all but the last end with
// another one.
func (w *world) clearLost() {
	choose := w.sched.Random().Intn
	for _, d := range w.tmpfs.dirs {
		for again := true; again; {
			d.note.lose(choose)
			for _, pl := range d.places {
				pl.name.lose(choose)
				pl.header.lose(choose)
				pl.full.lose(choose)
			}
			again = !d.clearNoted(choose(12))
			w.checkNotes()
		}
		for _, pl := range d.places {
			if pl.name.now() != nameless || pl.header.now() || pl.full.now() && pl.fixed && pl.noted {
				w.fail("I10: after a power failure %v is not cleared", pl)
			}
		}
	}
}

// clearNoted clears what is noted, if it lasts as long as that takes.
func (d *dir) clearNoted(steps int) (done bool) {
	n := d.note.now()
	if n == nil {
		return true
	}
	lasts := func() bool {
		d.s.w.checkNotes()
		steps--
		return steps != 0
	}
	for _, pl := range d.places {
		if !n.finds(pl, pl.name.now(), pl.header.now()) {
			continue
		}
		for _, step := range pl.clearing() {
			if step(); !lasts() {
				return false
			}
		}
	}
	d.note.set(nil)
	d.note.sync()
	return true
}

// clearing are the steps that leave nothing of a place.
func (pl *storagePlace) clearing() []func() {
	return []func(){
		func() { pl.full.set(false) }, pl.full.sync,
		func() { pl.name.set(nameless) }, pl.name.sync,
		func() { pl.header.set(false) }, pl.header.sync,
	}
}
