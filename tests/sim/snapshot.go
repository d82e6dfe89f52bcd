package sim

import (
	"bytes"
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
	pool      []byte
	poolFile  *blockdevtest.Memory
	state     []byte
	words     [][]byte
	cipher    *cipher // nil: it stores as it is

	appended []diffarea.Storage // and those that an Append is under way for; without a File if it failed
	before   []cbtmap.Info      // of the devices, before the take
	takes    []cbtmap.Info      // of the devices, at the take

	cut         bool // the instant was: this is the record on which recovery relies
	taken       bool // and Take has said so
	aborted     bool // its end has begun
	brokeBefore bool // it was broken by then
	leaving     bool // which is on record: its images go, Destroy follows
	gone        bool // Destroy has begun
	images      []*image
	corrupted   int // events
	noSpace     int
}

func (s *snapshot) String() string { return fmt.Sprintf("snapshot %d", s.slot) }

// broken says whether the snapshot has lost data, which it says itself.
func (s *snapshot) broken() bool { return s.snap.Log().Err() != 0 }

// waiting says whether original I/O waits for room in the snapshot.
func (s *snapshot) waiting() bool {
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
	s.words = append(s.words, mem)
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
		s := &snapshot{w: w, slot: slot, chunkSize: diffarea.MinChunkSize << (st.Off % 9)}
		s.pool = w.words(s.chunkSize * int64(1+(st.Len-1)%64))
		s.poolFile = blockdevtest.MapMemory(fmt.Sprintf("pool%d", slot), s.pool)
		s.state = w.words(diffarea.LogStateSize)
		if w.c.Encrypt>>slot&1 != 0 {
			w.keys++
			s.cipher = newCipher(w.keys)
		}
		p := w.proc
		snap, err := snapimage.New(s.config(s.cipher), p.queue(p.control))
		if err != nil {
			w.fail("create: %v", err)
		}
		s.snap = snap
		for i := range w.devices {
			if st.Arg>>i&1 == 0 {
				continue
			}
			s.add(i)
			s.add(i)
		}
		w.snaps[slot] = s
		s.append(int(st.Queue), done)
	})
}

// add gives the snapshot one more device. Job only.
func (s *snapshot) add(dev int) {
	var want error
	switch {
	case s.taken:
		want = snapimage.ErrTaken
	case slices.Contains(s.devs, dev):
		want = snapimage.ErrAdded
	default:
		s.devs = append(s.devs, dev)
	}
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
			Pool:      diffarea.Pool{Mem: s.pool, File: s.poolFile},
			State:     s.state,
			Stores:    s.w.proc.queue(s.w.proc.stores),
			Seal:      s.seal(c),
			Portion:   int64(s.w.c.Portion) * sectorSize,
			OnEvent:   s.event,
		},
		Memory: s.memory,
	}
}

// reopen takes the snapshot over from a process that died.
func (s *snapshot) reopen() {
	p := s.w.proc
	var members []snapimage.Member
	for i, dev := range s.devs {
		members = append(members, snapimage.Member{
			Filter: p.filters[dev], Device: uint64(dev + 1), Size: s.images[i].device.size,
			Words: s.words[i], Take: s.takes[i], Data: pages(s.words[i]),
		})
	}
	if s.cipher != nil && diffarea.Dead(s.state) == 0 {
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

// void is for a take that the last process did not bring to an end. Somebody may
// have believed in it, and asks for what changed since: but has only what was
// there at the take before.
func (s *snapshot) void() {
	if s.cut {
		return
	}
	w := s.w
	for i, before := range s.before {
		cbt, last := w.proc.cbts[s.devs[i]], &w.takes[s.devs[i]]
		if now, err := cbt.Info(); err == nil && now != before && last.disk != nil {
			last.info = now
		}
		cbt.Void(before)
	}
}

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
	fired := w.fired
	s.appended = append(s.appended, st)
	s.snap.Append(st, func(err error) {
		if err != nil && w.fired == fired && !errors.Is(err, unix.ENOSPC) && size-st.Start >= s.chunkSize && !s.broken() {
			w.fail("append: %v", err)
		}
		if err != nil {
			s.appended[st.Index] = diffarea.Storage{}
		}
		done()
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

// take makes the cut.
func (s *snapshot) take() {
	w := s.w
	w.proc.do(fmt.Sprintf("take %d", s.slot), func(done func()) {
		if w.snaps[s.slot] != s {
			done()
			return
		}
		before := s.taken
		if !s.cut {
			s.before = nil
			for _, dev := range s.devs {
				info, _ := w.proc.cbts[dev].Info()
				s.before = append(s.before, info)
			}
		}
		w.proc.cancel = s.snap.Cancel
		cut := false
		s.snap.Take(func() {
			cut = true
			s.atCut()
		}, func(err error) {
			switch {
			case err == nil && !cut:
				w.fail("I7: take of %v is over without a cut", s)
			case err != nil && cut:
				w.fail("I7: take of %v fails after the cut: %v", s, err)
			case err == nil:
				s.taken = true
				w.stats.Takes++
				s.show()
				s.answer(done)
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
			done()
		})
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
	for i, dev := range s.devs {
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

// show serves the images.
func (s *snapshot) show() {
	p := s.w.proc
	for i, im := range s.images {
		for n, h := range im.device.queues {
			thread := p.thread(fmt.Sprintf("%s.%d", im.device.name, n))
			h.serve(thread, s.snap.Image(i).NewQueue(p.queue(thread)))
		}
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
		s.aborted, s.brokeBefore = true, s.broken()
		s.snap.Abort()
		w.proc.control.After(0, func() {
			s.leaving = true
			for _, im := range s.images {
				im.device.remove()
			}
			s.destroyIdle(done)
		})
	})
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
		s.giveBack()
		w.snaps[s.slot] = nil
		done()
	})
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

// giveBack takes back the snapshot's memory and storage: nobody may use them
// any more.
func (s *snapshot) giveBack() {
	w := s.w
	for _, st := range s.appended {
		if st.File == nil {
			continue
		}
		w.retired[st.File] = s.String()
	}
	w.retired[s.poolFile] = s.String()
	for _, mem := range append(s.words, s.pool, s.state) {
		if err := unix.Mprotect(mem, unix.PROT_NONE); err != nil {
			panic(err)
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

// request issues a step's request to the image of a device, if there is one.
func (s *snapshot) request(st Step, op ublk.Op) {
	w := s.w
	if !s.taken || s.gone {
		return
	}
	im := s.images[int(st.Dev)%len(s.images)]
	if op == ublk.OpWriteZeroes && s.cipher != nil {
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
