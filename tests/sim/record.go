package sim

import (
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// tmpfs is what the daemon keeps for the next one, as files of which each is replaced as a
// whole or changed by single stores. No power failure leaves anything of it. A process that
// begins goes by it, and by what the kernel has, and by nothing else.
type tmpfs struct {
	devices [maxDevices]*deviceRecord // nil: there is none
	maps    [maxDevices][]byte        // of the changes, nil: there is none
	dirs    []*dir                    // in the order in which they were made
}

// deviceRecord is what is on record of a filter: written before the kernel makes the device,
// removed last of all of it.
type deviceRecord struct {
	tag  uint64 // by which the kernel's device is known
	ends bool   // it is being removed
	like int    // what the disk was like then
}

// dir is a snapshot's directory.
type dir struct {
	s     *snapshot         // whose it is: for the clients
	rec   *snapRecord       // nil: it has not been written yet
	files map[string][]byte // the take, the log's state, the pool, the words
	key   *cipher           // the file with the key, nil: there is none
	note  cached[*note]     // on stable storage

	places []*storagePlace       // that there ever were, for the checks
	pins   map[int]*storagePlace // by number of storage
}

// The files of a dir.
const (
	takeFile  = "take"
	freshTake = "take.new"
	logFile   = "log"
	poolFile  = "pool"
	keyFile   = "key"
)

// snapRecord is what is on record of a snapshot.
type snapRecord struct {
	pending    bool // nobody has been told of it
	destroying bool
	encrypted  bool
	members    []memberRecord  // in the order of Add
	storage    []storageRecord // in the order of Append
}

type memberRecord struct {
	dev   int
	size  int64
	image uint64 // the tag of the image's device, 0: there is none
}

// stage is that of a storage.
//
//	making ──> used ──> leaving ──> gone
//	   └──────────────────^
type stage int

const (
	storageMaking stage = iota
	storageUsed
	storageLeaving
	storageGone
)

// storageRecord is what is on record of a storage.
type storageRecord struct {
	stage stage
	name  *storagePlace    // a file is about to be there under a hidden name
	place *storagePlace    // who it is, once that is known
	use   diffarea.Storage // from the stage used on
}

// storagePlace is a file or a block device that stores.
type storagePlace struct {
	of     *dir
	file   *blockdevtest.Memory
	fixed  bool // a block device
	wanted bool // the file is to get a name
	noted  bool // the device can be known again in another boot
	pinned bool // it is kept by a mount

	name   cached[fileName]
	full   cached[bool] // something is stored there, as it was on a disk
	header cached[bool] // of a device
}

func (pl *storagePlace) String() string { return pl.file.Name() }

// there says whether a place takes room that somebody has to give back.
func (pl *storagePlace) there() bool { return pl.name.now() != nameless || pl.pinned }

// step does one step of a record, or has the kernel do one, and then calls then. The process
// may die before it and after it.
func (p *process) step(what string, do, then func()) {
	if p.w.c.Records == 0 {
		do()
		then()
		return
	}
	p.control.After(0, func() {
		p.w.tracef("step: %s", what)
		do()
		p.w.checkNotes()
		then()
	})
}

// inTurn calls f for 0 … n-1, one after the other, and then calls then.
func inTurn(n int, f func(i int, next func()), then func()) {
	var from func(i int)
	from = func(i int) {
		if i == n {
			then()
			return
		}
		f(i, func() { from(i + 1) })
	}
	from(0)
}

// step is a step of the snapshot's.
func (s *snapshot) step(what string, do, then func()) {
	s.w.proc.step(fmt.Sprintf("%v: %s", s, what), do, then)
}

// put changes the record.
func (s *snapshot) put(what string, change func(*snapRecord), then func()) {
	s.step("record: "+what, func() { s.dir.put(change) }, then)
}

func (d *dir) put(change func(*snapRecord)) {
	next := snapRecord{}
	if d.rec != nil {
		next = *d.rec
		next.members, next.storage = slices.Clone(next.members), slices.Clone(next.storage)
	}
	change(&next)
	d.rec = &next
}

// remove removes a file: nobody may use its memory any more.
func (d *dir) remove(name string) {
	if name == keyFile {
		d.key = nil
	}
	mem := d.files[name]
	if mem == nil {
		return
	}
	delete(d.files, name)
	if name == poolFile {
		d.s.w.retired[d.s.poolFile] = d.s.String()
	}
	if err := unix.Mprotect(mem, unix.PROT_NONE); err != nil {
		panic(err)
	}
}

// removeFiles removes all files but one, each in a step.
func (s *snapshot) removeFiles(but string, then func()) {
	names := slices.Sorted(maps.Keys(s.dir.files))
	names = slices.DeleteFunc(names, func(name string) bool { return name == but })
	if s.dir.key != nil {
		names = append(names, keyFile)
	}
	inTurn(len(names), func(i int, next func()) {
		s.step("no "+names[i], func() { s.dir.remove(names[i]) }, next)
	}, then)
}

// past is what the files tell.
func (d *dir) past() snapshots.Past {
	past, wrong := snapshots.PastOf(d.rec.destroying, len(d.rec.members), d.files[takeFile], d.files[logFile])
	if wrong != "" {
		d.s.w.fail("I6: the take of %v: %s", d.s, wrong)
	}
	return past
}

// newTag is one that no device has had.
func (w *world) newTag() uint64 {
	w.tags++
	return w.tags
}

// made has the kernel make a device with a tag.
func (w *world) made(d *device, tag uint64) {
	d.tag = tag
	w.kernel[tag] = d
}

// deleted has the kernel delete a device that no process serves, or only requests that are
// under way.
func (w *world) deleted(d *device) {
	delete(w.kernel, d.tag)
	d.tag = 0
}

// makePlace makes what storage n is to be, which is on record as being made.
func (s *snapshot) makePlace(n int, pl *storagePlace, then func()) {
	pin := func(then func()) {
		s.step("pin", func() { pl.pinned, s.dir.pins[n] = true, pl }, func() {
			s.put("who the storage is", func(r *snapRecord) { r.storage[n].place = pl }, then)
		})
	}
	if pl.fixed {
		pin(func() { s.keepNote(func() { s.writeHeader(pl, then) }) })
		return
	}
	s.put("hidden name", func(r *snapRecord) { r.storage[n].name = pl }, func() {
		s.keepNote(func() {
			s.step("file", func() { pl.name.set(hidden) }, func() {
				pin(func() { s.keepNote(func() { s.giveName(pl, then) }) })
			})
		})
	})
}

// giveName gives a file the name that it is to have, or none.
func (s *snapshot) giveName(pl *storagePlace, then func()) {
	s.step("name", func() {
		name := nameless
		if pl.wanted {
			name = named
		}
		pl.name.set(name)
	}, func() { s.step("sync the name", pl.name.sync, then) })
}

// writeHeader writes the header of a device that can be known again by it.
func (s *snapshot) writeHeader(pl *storagePlace, then func()) {
	if !pl.noted {
		then()
		return
	}
	s.step("header", func() { pl.header.set(true) }, func() { s.step("sync the header", pl.header.sync, then) })
}

// wipe gives storage n back with nothing left to read in it, at whatever step of its making,
// its use or its end it is.
func (s *snapshot) wipe(n int, then func()) {
	if s.dir.rec.storage[n].stage == storageGone {
		then()
		return
	}
	s.put("storage is leaving", func(r *snapRecord) { r.storage[n].stage = storageLeaving }, func() {
		end := func() {
			s.put("storage is gone", func(r *snapRecord) { r.storage[n] = storageRecord{stage: storageGone} }, then)
		}
		pl := s.dir.pins[n]
		if pl != nil {
			s.empty(n, pl, func() { s.unpin(n, pl, end) })
			return
		}
		if pl = s.dir.rec.storage[n].name; pl == nil {
			end()
			return
		}
		s.step("no hidden name", func() { pl.name.set(nameless) }, func() { // nothing was stored
			s.step("sync no hidden name", pl.name.sync, end)
		})
	})
}

// empty leaves nothing to read in a storage, under no name.
func (s *snapshot) empty(n int, pl *storagePlace, then func()) {
	if !pl.fixed {
		s.step("empty", func() {
			pl.file.Resize(0)
			pl.full.set(false)
		}, func() {
			s.step("sync empty", pl.full.sync, func() {
				s.step("no name", func() { pl.name.set(nameless) }, func() { s.step("sync no name", pl.name.sync, then) })
			})
		})
		return
	}
	to := int64(0)
	if log := s.dir.files[logFile]; log != nil {
		var err error
		if to, err = diffarea.Used(log, n); err != nil {
			s.w.fail("I10: %v does not know how much of %v it used: %v", s, pl, err)
		}
	}
	s.step("zeroes", func() {
		if _, err := pl.file.WriteAt(make([]byte, min(to, pl.file.Size())), 0); err != nil {
			panic(err)
		}
		pl.full.set(false)
	}, func() {
		s.step("sync zeroes", pl.full.sync, func() {
			s.step("no header", func() { pl.header.set(false) }, func() { s.step("sync no header", pl.header.sync, then) })
		})
	})
}

// unpin lets go of a storage.
func (s *snapshot) unpin(n int, pl *storagePlace, then func()) {
	s.step("unpin", func() {
		s.w.checkEmpty(s, pl)
		pl.pinned = false
		delete(s.dir.pins, n)
		s.w.retired[pl.file] = s.String()
	}, then)
}

// clear ends the snapshot, whose images are gone: its storage goes back, and its memory. A
// process that died may have begun that.
func (s *snapshot) clear(then func()) {
	s.put("destroying", func(r *snapRecord) { r.destroying = true }, func() {
		s.removeFiles(logFile, func() {
			inTurn(len(s.dir.rec.storage), s.wipe, func() {
				s.dropNote(func() {
					s.removeFiles("", func() {
						s.step("no directory", func() { s.w.removeDir(s.dir) }, then)
					})
				})
			})
		})
	})
}

func (w *world) removeDir(d *dir) {
	if len(d.pins) > 0 {
		w.fail("I10: the directory of %v goes, which keeps storage", d.s)
	}
	if d.key != nil {
		w.fail("I10: the directory of %v goes with its key", d.s)
	}
	w.tmpfs.dirs = slices.DeleteFunc(w.tmpfs.dirs, func(other *dir) bool { return other == d })
}

// checkEmpty is for a storage that is given back.
func (w *world) checkEmpty(s *snapshot, pl *storagePlace) {
	if pl.name.now() != nameless {
		w.fail("I10: %v gives %v back, which has a name", s, pl)
	}
	if pl.fixed && s.dir.rec.encrypted {
		return // the key is gone
	}
	end := min(w.written[pl.file], pl.file.Size())
	for _, b := range contentOf(pl.file, end) {
		if b != 0 {
			w.fail("I10: %v gives %v back, in which something can be read", s, pl)
		}
	}
}

// checkRecords is for a process that has taken over, and for one with nothing to do: all
// there is has a record that leads to it, what is on record is there, and so is what clients
// were told.
func (w *world) checkRecords() {
	led := make(map[uint64]bool)
	for i, r := range w.tmpfs.devices[:len(w.devices)] {
		switch {
		case r == nil || w.devices[i].tag != r.tag:
			w.fail("I6: the filter of disk%d is not on record, or is not there", i)
		case r.ends:
			w.fail("I6: the filter of disk%d is on record as one that ends", i)
		case w.tmpfs.maps[i] == nil:
			w.fail("I6: the filter of disk%d has no change map", i)
		}
		led[r.tag] = true
	}
	places := make(map[*storagePlace]bool)
	for _, d := range w.tmpfs.dirs {
		s := d.s
		if w.snaps[s.slot] != s {
			w.fail("I6: what is left of %v is on record", s)
		}
		if d.rec.pending || d.rec.destroying {
			w.fail("I6: %v is on record as one that shall end", s)
		}
		for i, m := range d.rec.members {
			if s.taken != (m.image != 0) || s.taken && s.images[i].device.tag != m.image {
				w.fail("I6: %v is taken: %v; the image of disk%d is on record: %v", s, s.taken, m.dev, m.image != 0)
			}
			led[m.image] = true
		}
		if (d.files[takeFile] != nil) != s.taken || d.files[freshTake] != nil || d.key == nil && d.rec.encrypted && !s.broken() {
			w.fail("I6: %v has other files than it should have", s)
		}
		for n, st := range d.rec.storage {
			if st.stage != storageUsed && st.stage != storageGone || (st.stage == storageUsed) != (d.pins[n] != nil) || st.stage == storageUsed && d.pins[n] != st.place {
				w.fail("I10: storage %d of %v is on record in stage %d, and kept: %v", n, s, st.stage, d.pins[n] != nil)
			}
			places[st.place] = true
		}
	}
	for tag, d := range w.kernel {
		if !led[tag] {
			w.fail("I10: no record leads to the device %s", d.name)
		}
	}
	for _, pl := range w.places {
		if pl.there() && !places[pl] {
			w.fail("I10: no record leads to %v", pl)
		}
	}
	for _, s := range w.snaps {
		if s != nil && s.told && !slices.Contains(w.tmpfs.dirs, s.dir) {
			w.fail("I6: %v is not on record", s)
		}
	}
}
