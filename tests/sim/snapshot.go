package sim

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// snapshot is a snapshot as its owner knows it, with the memory that outlives
// the process.
type snapshot struct {
	w    *world
	slot int
	snap *snapimage.Snapshot
	devs []int

	chunkSize int64
	slots     int64 // of the pool
	dir       *dir  // what outlives the process
	poolFile  *blockdevtest.Memory
	cipher    *cipher // nil: it stores as it is

	appended []diffarea.Storage // and those that an Append is under way for; without a File if it failed
	takes    []cbtmap.Info      // of the devices, at the take
	believed []taken            // of the devices, the last takes before this one

	told        bool // its client knows of it
	heard       bool // its client knows that it is broken
	cut         bool // the instant was
	taken       bool // which its client may know
	aborted     bool // its end has begun
	brokeBefore bool // it was broken by then
	gone        bool // nobody uses it any more
	images      []*image
	corrupted   int // events
	noSpace     int
}

func (s *snapshot) String() string { return fmt.Sprintf("snapshot %d", s.slot) }

// broken says whether the snapshot has lost data, which it says itself.
func (s *snapshot) broken() bool { return s.snap.Log().Err() != 0 }

// waiting says whether original I/O waits for room in the snapshot.
func (s *snapshot) waiting() bool {
	if s.gone || s.snap == nil {
		return false
	}
	waits, _ := s.snap.Log().Waiting()
	return waits && !s.broken()
}

// area is the difference area of device dev, nil if the snapshot does not hold
// it.
func (s *snapshot) area(dev int) *diffarea.Area {
	for i, d := range s.devs {
		if d == dev && s.cut {
			return s.snap.Image(i).Area()
		}
	}
	return nil
}

// unprotected is a chunk of device dev that a write to the original would
// spoil.
func (s *snapshot) unprotected(dev int, off, n int64) (diffarea.Chunk, bool) {
	a := s.area(dev)
	if a == nil || s.gone || s.broken() {
		return 0, false
	}
	for c := a.Chunk(off); c <= a.Chunk(off+n-1); c++ {
		if a.Load(c).State() == diffarea.New {
			return c, true
		}
	}
	return 0, false
}

// memory is memory that outlives the process.
func (s *snapshot) memory(name string, size int64) ([]byte, error) {
	if s.w.tables++; s.w.tables == s.w.c.NoMemory {
		return nil, unix.ENOMEM
	}
	mem := s.w.words(size)
	s.dir.files[name] = mem
	return mem, nil
}

// words is memory that lasts until the end of the run.
func (w *world) words(size int64) []byte {
	mem := words(size)
	if mem != nil {
		w.memory = append(w.memory, mem)
	}
	return mem
}

// create makes the snapshot of a step and gives it its first storage.
func (w *world) create(st Step) {
	slot := int(st.Snap) % len(w.snaps)
	w.proc.do(fmt.Sprintf("create %d", slot), func(done func()) {
		if w.snaps[slot] != nil {
			done()
			return
		}
		s := &snapshot{w: w, slot: slot, chunkSize: diffarea.MinChunkSize << (st.Off % 9), slots: int64(1 + (st.Len-1)%64)}
		s.dir = &dir{s: s, files: make(map[string][]byte), pins: make(map[int]*storagePlace), note: newCached[*note](nil)}
		w.snaps[slot] = s
		s.make(w.c.Encrypt>>slot&1 != 0, func() {
			inTurn(len(w.devices), func(i int, next func()) {
				if st.Arg>>i&1 == 0 {
					next()
					return
				}
				s.add(i, func() { s.add(i, next) })
			}, func() {
				s.append(int(st.Queue), func() { s.created(st.FUA, done) })
			})
		})
	})
}

// make begins the snapshot's directory.
func (s *snapshot) make(encrypted bool, then func()) {
	s.step("directory", func() { s.w.tmpfs.dirs = append(s.w.tmpfs.dirs, s.dir) }, func() {
		s.put("begun", func(r *snapRecord) { r.pending, r.encrypted = true, encrypted }, func() { s.begin(then) })
	})
}

// begin makes a snapshot in fresh memory.
func (s *snapshot) begin(then func()) {
	w, d := s.w, s.dir
	s.step("log", func() { d.files[logFile] = w.words(diffarea.LogStateSize) }, func() {
		s.step("pool", func() {
			d.files[poolFile] = w.words(s.chunkSize * s.slots)
			s.poolFile = blockdevtest.MapMemory(fmt.Sprintf("pool%d", s.slot), d.files[poolFile])
		}, func() {
			s.makeKey(func() {
				snap, err := snapimage.New(s.config(s.cipher), w.proc.queue(w.proc.control))
				if err != nil {
					w.fail("create: %v", err)
				}
				s.snap = snap
				then()
			})
		})
	})
}

// makeKey makes the key of a snapshot that encrypts.
func (s *snapshot) makeKey(then func()) {
	if s.cipher = nil; !s.dir.rec.encrypted {
		then()
		return
	}
	s.step("key", func() {
		s.w.keys++
		s.cipher = newCipher(s.w.keys)
		s.dir.key = s.cipher
	}, then)
}

// created tells the client, which may have asked for a take in the same breath.
func (s *snapshot) created(take bool, done func()) {
	tell := func() {
		s.put("it is known", func(r *snapRecord) { r.pending = false }, func() {
			s.told = true
			done()
		})
	}
	if !take {
		tell()
		return
	}
	s.tryTake(func() {
		if s.taken {
			tell()
			return
		}
		s.end(done)
	})
}

// add gives the snapshot one more device. Job only.
func (s *snapshot) add(dev int, then func()) {
	switch {
	case s.taken:
		s.addTo(dev, snapimage.ErrTaken)
		then()
	case slices.Contains(s.devs, dev):
		s.addTo(dev, snapimage.ErrAdded)
		then()
	default:
		s.put("device", func(r *snapRecord) {
			r.members = append(r.members, memberRecord{dev: dev, size: s.w.devices[dev].size})
		}, func() {
			s.devs = append(s.devs, dev)
			s.addTo(dev, nil)
			then()
		})
	}
}

// addTo is add without the record.
func (s *snapshot) addTo(dev int, want error) {
	if err := s.snap.Add(s.w.proc.filters[dev], uint64(dev+1)); !errors.Is(err, want) {
		s.w.fail("add disk%d to %v: %v, want %v", dev, s, err, want)
	}
}

// config is what the snapshot is made of, for this process as for the next.
func (s *snapshot) config(c *cipher) snapimage.Config {
	return snapimage.Config{
		ID: uuid.NewSHA1(uuid.Nil, []byte(s.String())),
		Log: diffarea.LogConfig{
			ChunkSize: s.chunkSize,
			Pool:      diffarea.Pool{Mem: s.dir.files[poolFile], File: s.poolFile},
			State:     s.dir.files[logFile],
			Stores:    s.w.proc.queue(s.w.proc.stores),
			Seal:      s.seal(c),
			Portion:   int64(s.w.c.Portion) * sectorSize,
			OnEvent:   s.event,
		},
		Memory: s.memory,
	}
}

// reopen takes the snapshot over from a process that died.
func (s *snapshot) reopen(past snapshots.Past) {
	p := s.w.proc
	s.takes = past.Take
	var members []snapimage.Member
	for i, m := range s.dir.rec.members {
		words := s.dir.files[fmt.Sprintf("words-%d", i)]
		members = append(members, snapimage.Member{
			Filter: p.filters[m.dev], Device: uint64(m.dev + 1), Size: m.size,
			Words: words, Take: past.Take[i], Data: pages(words),
		})
	}
	for n, st := range s.dir.rec.storage {
		if st.stage == storageUsed && s.dir.pins[n] == nil {
			s.w.fail("I6: storage %d of %v is not there", n, s)
		}
	}
	if past.Broken != 0 {
		s.cipher = nil // the key may be gone
	} else if s.dir.rec.encrypted && s.cipher == nil {
		s.w.fail("I6: the key of %v is gone", s)
	}
	if s.cipher != nil {
		for _, wrong := range []*cipher{nil, newCipher(s.cipher.key + 1)} {
			if _, err := snapimage.Reopen(s.config(wrong), p.queue(p.control), members, s.appended); !errors.Is(err, diffarea.ErrState) {
				s.w.fail("%v is taken over with another key: %v", s, err)
			}
		}
	}
	snap, err := snapimage.Reopen(s.config(s.cipher), p.queue(p.control), members, s.appended)
	if err != nil {
		s.w.fail("I6: %v: %v", s, err)
	}
	s.snap = snap
	if past.Broken != 0 && !snapshots.NewTakePage(s.dir.files[takeFile]).BreakReported() {
		s.tell()
	}
}

// seal is the encryption with a cipher.
func (s *snapshot) seal(c *cipher) *diffarea.Seal {
	if c == nil {
		return nil
	}
	return &diffarea.Seal{Cipher: c, Memory: s.w.words(diffarea.SealMemory)}
}

// pages is what a sparse file of mem has data in, page by page.
func pages(mem []byte) func(yield func(from, to int64)) {
	return func(yield func(from, to int64)) {
		for at := 0; at < len(mem); at += 4096 {
			end := min(at+4096, len(mem))
			for _, b := range mem[at:end] {
				if b != 0 {
					yield(int64(at), int64(end))
					break
				}
			}
		}
	}
}

// show makes the devices of the images, or serves those that there are.
func (s *snapshot) show(then func()) {
	inTurn(len(s.images), func(i int, next func()) {
		d, tag := s.images[i].device, s.dir.rec.members[i].image
		if d.tag != 0 && d.tag == tag {
			s.serve(i)
			next()
			return
		}
		tag = s.w.newTag()
		s.put("image", func(r *snapRecord) { r.members[i].image = tag }, func() {
			s.step("device of the image", func() {
				s.w.made(d, tag)
				s.serve(i)
			}, next)
		})
	}, func() {
		s.taken = true
		then()
	})
}

// serve serves an image.
func (s *snapshot) serve(i int) {
	p, d := s.w.proc, s.images[i].device
	for n, h := range d.queues {
		thread := p.thread(fmt.Sprintf("%s.%d", d.name, n))
		h.serve(thread, s.snap.Image(i).NewQueue(p.queue(thread)))
	}
}

// destroy ends the snapshot, images first.
func (s *snapshot) destroy() {
	w := s.w
	w.proc.do(fmt.Sprintf("destroy %d", s.slot), func(done func()) {
		if w.snaps[s.slot] != s {
			done()
			return
		}
		s.end(done)
	})
}

// end ends the snapshot. Job only.
func (s *snapshot) end(done func()) {
	w := s.w
	s.aborted, s.brokeBefore = true, s.broken()
	s.snap.Abort()
	w.proc.control.After(0, func() {
		s.put("destroying", func(r *snapRecord) { r.destroying = true }, func() {
			s.hide(func() { s.destroyIdle(done) })
		})
	})
}

// hide has the kernel delete the devices of the images.
func (s *snapshot) hide(then func()) {
	inTurn(len(s.images), func(i int, next func()) {
		if s.dir.rec.members[i].image == 0 {
			next()
			return
		}
		d := s.images[i].device
		s.step("no device of the image", func() {
			d.remove()
			if s.gone {
				d.abort() // nobody serves it
			}
			s.w.deleted(d)
		}, func() {
			s.put("no image", func(r *snapRecord) { r.members[i].image = 0 }, next)
		})
	}, then)
}

// destroyIdle goes on when no image is under I/O any more.
func (s *snapshot) destroyIdle(done func()) {
	w := s.w
	for _, im := range s.images {
		if im.device.busy() {
			w.onIdle = append(w.onIdle, func() { w.proc.control.After(0, func() { s.destroyIdle(done) }) })
			return
		}
	}
	s.gone = true
	s.snap.Destroy(func() {
		s.checkReported(s.brokeBefore)
		s.checkUsed()
		s.clear(func() {
			w.snaps[s.slot] = nil
			done()
		})
	})
}

// request issues a step's request to the image of a device, if there is one.
func (s *snapshot) request(st Step, op ublk.Op) {
	w := s.w
	if !s.taken || s.gone {
		return
	}
	im := s.images[int(st.Dev)%len(s.images)]
	if op == ublk.OpWriteZeroes && s.dir.rec.encrypted {
		op = ublk.OpWrite // as the kernel does, because the image refuses the other
	}
	w.issue(im.device, st, op)
}

// readAll reads a whole image through its device.
func (im *image) readAll() {
	w := im.snap.w
	for off := int64(0); off < im.device.size; {
		b := int64(max(w.c.Sector, 1)) * sectorSize
		n := min((int64(1+w.sched.Random().Intn(w.c.MaxIO))*sectorSize+b-1)/b*b, im.device.size-off)
		im.device.submit(w.sched.Random().Intn(math.MaxInt16), &request{op: ublk.OpRead, off: off, len: n}, nil)
		off += n
	}
}
