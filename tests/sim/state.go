package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// state is what the daemon keeps of a disk on stable storage, so that the change map
// outlives a power failure and a clean end. Each of its files has a volatile cache.
//
//	name ──> record ──> log and base        while a filter is there
//	                ──> a saved map         after a clean end
//	                ──> nothing             nothing is to be believed
type state struct {
	w       *world
	dev     int
	name    *blockdevtest.Memory // one sector: the number of the record that it stands for
	records []record             // by number; 0 is nothing
	log     *blockdevtest.Memory // the file of the last keeper's log
	logs    []*blockdevtest.Memory

	gone    bool // the daemon says that a power failure now costs the history
	kept    bool // the map is kept over the time without a filter
	ends    bool // the filter was removed as it should be, and there is no other yet
	like    int  // changes when somebody else writes to the disk
	strange bool // he has, and there is no other filter yet
	nothing bool // the name stands for nothing, durably
}

// record is what the name stands for.
type record struct {
	log  *blockdevtest.Memory // nil: after a clean end
	file *blockdevtest.Memory // base or saved map
	size int64                // of what is in it
	disk int64                // bytes
	like int                  // what the disk was like
	at   moment               // when it was begun to be made
}

func (w *world) newState(dev int) *state {
	s := &state{w: w, dev: dev, records: make([]record, 1), gone: true, nothing: true}
	s.name = s.newFile("name", sectorSize)
	return s
}

// newFile makes a file of the state, with zeroes in it.
func (s *state) newFile(what string, size int64) *blockdevtest.Memory {
	m := blockdevtest.NewMemoryDevice(fmt.Sprintf("%s%d", what, s.dev), (size+sectorSize-1)/sectorSize*sectorSize)
	m.LoseUnsynced()
	return m
}

// isLog says whether a file is one of a log.
func (w *world) isLog(m *blockdevtest.Memory) bool {
	for _, s := range w.states {
		if slices.Contains(s.logs, m) {
			return true
		}
	}
	return false
}

// files are all that there ever were.
func (s *state) files() []*blockdevtest.Memory {
	files := append([]*blockdevtest.Memory{s.name}, s.logs...)
	for _, r := range s.records[1:] {
		files = append(files, r.file)
	}
	return files
}

// keeper is a process's part in it, for one disk. All of it runs on the process's state
// thread, where the log is written too.
type keeper struct {
	p       *process
	s       *state
	log     *intentlog.Log
	queue   blockdev.Queue // faults strike
	jobs    []func(done func())
	working bool
	away    bool // the filter goes, or has not come: nobody writes or marks
	starts  bool // the log is being started: nothing is believed on its account yet
}

// keep makes the keeper of a disk. Its log is off. It has a file of its own, which what a
// log of before may still have under way does not meet.
func (p *process) keep(dev int) *keeper {
	k := &keeper{p: p, s: p.w.states[dev], queue: p.queue(p.state), away: true}
	size := p.w.devices[dev].size
	length := intentlog.FileSize(size, uint8(p.w.c.Zone))
	k.s.log = k.s.newFile("log", length)
	k.s.logs = append(k.s.logs, k.s.log)
	l, err := intentlog.New(intentlog.Config{
		Size: size, ZoneShift: uint8(p.w.c.Zone), Orig: p.w.origs[dev], File: k.s.log, Queue: k.queue,
		Memory: make([]byte, length),
		Failed: func(err error) {
			p.w.tracef("log of disk%d failed: %v", dev, err)
			k.giveUp()
		},
	})
	if err != nil {
		panic(err)
	}
	k.log = l
	l.Follow(p.cbts[dev])
	return k
}

// do does one thing at a time with the name.
func (k *keeper) do(job func(done func())) {
	k.jobs = append(k.jobs, job)
	if !k.working {
		k.working = true
		k.next()
	}
}

func (k *keeper) next() {
	if len(k.jobs) == 0 {
		k.working = false
		return
	}
	job := k.jobs[0]
	k.jobs = k.jobs[1:]
	k.p.state.After(0, func() { job(k.next) })
}

// op is an operation on a file; then is told how it went.
func (k *keeper) op(q blockdev.Queue, kind blockdev.Kind, m *blockdevtest.Memory, content []byte, then func(unix.Errno)) {
	op := &blockdev.Op{Kind: kind, File: m, Len: int64(len(content)), Done: func(op *blockdev.Op) { then(op.Err) }}
	if kind == blockdev.Write {
		op.Buf = blockdev.MemBuf(content)
	}
	q.Submit(op)
}

// write writes a file and syncs it.
func (k *keeper) write(q blockdev.Queue, m *blockdevtest.Memory, content []byte, then func(unix.Errno)) {
	content = append(slices.Clone(content), make([]byte, m.Size()-int64(len(content)))...)
	k.op(q, blockdev.Write, m, content, func(errno unix.Errno) {
		if errno != 0 {
			then(errno)
			return
		}
		k.op(q, blockdev.Flush, m, nil, then)
	})
}

// rename makes the name stand for a record, durably. The record is whole by then.
func (k *keeper) rename(q blockdev.Queue, r record, then func(unix.Errno)) {
	n := 0
	if r.file != nil {
		k.s.kept = false
		n = len(k.s.records)
		k.s.records = append(k.s.records, r)
		k.s.nothing = false // even if it fails
	}
	k.write(q, k.s.name, binary.LittleEndian.AppendUint64(nil, uint64(n)), then)
}

// makeBase makes a base and has it count. Job only.
func (k *keeper) makeBase(then func(ok bool)) {
	w := k.p.w
	at := w.tick()
	var base []byte
	var err error
	w.meanwhile(func() { base, err = k.log.Base(k.p.cbts[k.s.dev]) })
	if err != nil {
		then(false)
		return
	}
	r := record{log: k.s.log, file: k.s.newFile("base", int64(len(base))), size: int64(len(base)), at: at}
	k.write(k.queue, r.file, base, func(errno unix.Errno) {
		if errno != 0 || k.log.State() != intentlog.On {
			then(false)
			return
		}
		k.rename(k.queue, r, func(errno unix.Errno) {
			if errno != 0 {
				then(false)
				return
			}
			w.tracef("disk%d has a base", k.s.dev)
			k.s.gone = false
			w.whatIfAnswered(k.s.dev)
			then(k.log.Committed(base) == nil)
		})
	})
}

// start switches the log on, with a base. Job only.
func (k *keeper) start(then func(ok bool)) {
	switch {
	case k.log.State() == intentlog.On:
		k.makeBase(then)
		return
	case !k.log.Idle():
		then(false)
		return
	}
	k.starts = true
	k.log.Start(uuid.New(), func(err error) {
		k.starts = false
		if err != nil {
			k.p.w.tracef("log of disk%d: %v", k.s.dev, err)
			then(false)
			return
		}
		k.makeBase(then)
	})
}

// checkpoint makes a new base, or tries again to switch the log on.
func (k *keeper) checkpoint() {
	if k.away {
		return
	}
	k.do(func(done func()) {
		k.start(func(bool) { done() })
	})
}

// giveUp is for a log that has failed or does not answer.
func (k *keeper) giveUp() {
	if k.s.nothing || k.starts {
		k.log.GiveUp() // which may be what a job waits for
		return
	}
	k.do(k.forget)
}

// forget has nothing believed any more, and then lets all go. The name does not fail.
func (k *keeper) forget(done func()) {
	k.s.gone = true
	k.rename(k.p.state, record{}, func(unix.Errno) {
		k.s.nothing = true
		k.log.GiveUp()
		done()
	})
}

// taken makes a take durable; then is called on the control thread when it may be told.
func (k *keeper) taken(info cbtmap.Info, then func()) {
	answer := func() { k.p.control.After(0, then) }
	k.log.Taken(info, func(err error) {
		if !errors.Is(err, intentlog.ErrGeneration) {
			answer()
			return
		}
		k.do(func(done func()) {
			k.makeBase(func(ok bool) {
				if ok {
					answer()
					done()
					return
				}
				k.forget(func() {
					answer()
					done()
				})
			})
		})
	})
}

// marked calls then when what was marked by hand may be told.
func (k *keeper) marked(off, n int64, then func()) {
	wait := new(intentlog.Wait)
	wait.Init(k.queue, then)
	if !k.log.Hold(wait, off, n) {
		then()
	}
}

// startAll switches the logs on, for disks that nobody writes to yet, calls serve for each
// disk and then done, on the control thread.
func (p *process) startAll(serve func(dev int), done func()) {
	all := p.living()
	left := len(all)
	if left == 0 {
		done()
	}
	for _, k := range all {
		k.do(func(end func()) {
			k.come(func() {
				end()
				p.control.After(0, func() {
					k.away = false
					serve(k.s.dev)
					if left--; left == 0 {
						done()
					}
				})
			})
		})
	}
}

// leave keeps the map over the time without a filter: nothing is under way on the disk, and
// nothing comes any more. Job only.
func (k *keeper) leave(done func()) {
	s := k.s
	at := s.w.tick()
	saved, err := k.p.cbts[s.dev].Save()
	if err != nil {
		k.forget(done)
		return
	}
	failed := func(unix.Errno) { k.forget(done) }
	k.op(k.queue, blockdev.Flush, s.w.origs[s.dev], nil, func(errno unix.Errno) {
		if errno != 0 {
			failed(errno)
			return
		}
		r := record{file: s.newFile("saved", int64(len(saved))), size: int64(len(saved)), disk: s.w.devices[s.dev].size, like: s.like, at: at}
		k.write(k.queue, r.file, saved, func(errno unix.Errno) {
			if errno != 0 {
				failed(errno)
				return
			}
			k.rename(k.queue, r, func(errno unix.Errno) {
				if errno != 0 {
					failed(errno)
					return
				}
				s.gone, s.kept = false, true
				k.log.GiveUp()
				done()
			})
		})
	})
}

// load gives a new map what was kept.
func (k *keeper) load() {
	s := k.s
	r := s.records[s.number(s.name)]
	if s.kept && r.file == nil {
		s.w.fail("I6: the map of disk%d that was kept is forgotten", s.dev)
	}
	if s.ends && !s.strange && (r.file == nil || r.log != nil) && s.w.stats.Faults == 0 && !s.w.gaveUp {
		s.w.fail("I6: the map of disk%d is lost, whose filter was removed as it should be", s.dev)
	}
	s.kept, s.ends = false, false
	if r.file != nil && r.log == nil && r.disk == s.w.devices[s.dev].size && r.like == s.like {
		if err := k.p.cbts[s.dev].Load(contentOf(r.file, r.size)); err != nil {
			s.w.fail("I6: the map of disk%d that was kept: %v", s.dev, err)
		}
		s.w.tmpfs.maps[s.dev] = k.p.cbts[s.dev].Memory()
	}
	k.p.begun(s.dev)
}

// come is for a disk that nobody writes to yet. Its log is on and has a base before the
// first write; if not, what was believed until now is forgotten first. Job only.
func (k *keeper) come(done func()) {
	k.start(func(ok bool) {
		if ok {
			done()
			return
		}
		k.forget(done)
	})
}

// number is that of the record that a name stands for.
func (s *state) number(name *blockdevtest.Memory) uint64 {
	return binary.LittleEndian.Uint64(contentOf(name, 8))
}

func contentOf(m *blockdevtest.Memory, n int64) []byte {
	p := make([]byte, n)
	if _, err := m.ReadAt(p, 0); err != nil {
		panic(err)
	}
	return p
}
