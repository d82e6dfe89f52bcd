package sim

import (
	"fmt"
	"io"
	"runtime/debug"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// world is a simulated machine: disks, the kernel's side of the ublk devices,
// memory that outlives a process, one process at a time, and clients.
type world struct {
	c      Case
	sched  *blockdevtest.Sched
	client *blockdevtest.SchedQueue
	faults *blockdevtest.Faults
	trace  io.Writer // nil: none
	clock  moment

	origs    []*blockdevtest.Memory
	devices  []*device // the filter devices
	storages []*blockdevtest.Memory
	full     bool // storage cannot grow
	wasFull  bool // or could not at some time
	model    *model
	proc     *process
	snaps    [8]*snapshot // by Step.Snap

	requests    uint64 // ids handed out
	versions    Version
	outstanding int // requests under way
	steps       int // taken
	done        bool
	powerFailed bool                         // the power has failed
	waiting     bool                         // for everything before to complete
	onIdle      []func()                     // called when anything has ended
	changing    map[*blockdevtest.Memory]int // operations in flight that change an original
	fired       int                          // faults that hit something other than a client's own operation
	deaths      int
	tables      int    // chunk tables asked for
	bornAt      uint64 // steps of the scheduler when the process started
	points      int    // places to die passed since then
	retired     map[blockdev.File]string
	written     map[blockdev.File]int64 // up to where, bytes
	tmpfs       tmpfs                   // which outlives a process
	kernel      map[uint64]*device      // the ublk devices that there are, by tag
	tags        uint64                  // handed out
	places      []*storagePlace         // that there ever were
	takes       [maxDevices]taken       // the last of each disk
	answered    [maxDevices]taken       // the last of which somebody was told
	states      []*state                // of each disk, if there are write-intent logs
	zones       [maxDevices][]zoneModel // of the logs
	gaveUp      bool                    // a log that did not answer
	chance      blockdevtest.Random     // for what does not happen
	memory      [][]byte                // of snapshots, to be unmapped
	keys        uint64                  // handed out
	stats       Stats
}

// Stats is what a run has done.
type Stats struct {
	Requests uint64 // of clients, completed
	Steps    uint64 // of the scheduler
	Takes    int
	Tables   int // chunk tables asked for
	Storages int // that were written to
	Breaks   int // snapshots broken by faults or want of storage
	Deaths   int
	Faults   int
	TakeOver uint64 // steps of the scheduler that the last one took
}

// Failure is a violated invariant.
type Failure struct {
	Message string
	Step    int // of the workload, steps begun
	Stats   Stats
}

func (f *Failure) Error() string {
	return fmt.Sprintf("after %d steps: %s", f.Step, f.Message)
}

// violation is panicked by fail.
type violation string

// fail ends the run: an invariant does not hold.
func (w *world) fail(format string, args ...any) {
	panic(violation(fmt.Sprintf(format, args...)))
}

func (w *world) tracef(format string, args ...any) {
	if w.trace != nil {
		fmt.Fprintf(w.trace, "%6d %8d  ", w.sched.Steps(), w.clock)
		fmt.Fprintf(w.trace, format, args...)
		fmt.Fprintln(w.trace)
	}
}

// tick is the next moment.
func (w *world) tick() moment {
	w.clock++
	return w.clock
}

func (w *world) maxIO() int { return w.c.MaxIO * sectorSize }

// version is a new one.
func (w *world) version() Version {
	w.versions++
	return w.versions
}

func newWorld(c Case, trace io.Writer) *world {
	w := &world{
		c:        c,
		sched:    blockdevtest.NewSched(c.Order),
		trace:    trace,
		faults:   &blockdevtest.Faults{},
		versions: initial,
		chance:   blockdevtest.NewRandom(^c.Order),
		changing: make(map[*blockdevtest.Memory]int),
		retired:  make(map[blockdev.File]string),
		kernel:   make(map[uint64]*device),
		written:  make(map[blockdev.File]int64),
	}
	w.client = w.sched.NewQueue("client")
	w.sched.OnSubmit = w.onSubmit
	w.sched.OnEffect = w.onEffect
	w.sched.OnComplete = w.onComplete
	w.faults.OnFire = w.onFire
	w.model = &model{w: w}
	for i := 0; i < c.Devices; i++ {
		size := c.size(i)
		m := blockdevtest.NewMemoryDevice(fmt.Sprintf("disk%d", i), size)
		m.SetDiscards(blockdevtest.DiscardEffect(c.Discards))
		m.SetBlockSize(int64(max(c.Sector, 1)) * sectorSize)
		p := make([]byte, size)
		fill(p, initial, i, 0)
		if _, err := m.WriteAt(p, 0); err != nil {
			panic(err)
		}
		w.origs = append(w.origs, m)
		reg := newRegister(i, func(s int64) Version {
			if s >= size/sectorSize {
				return zeroes // the disk has grown
			}
			return initial
		})
		if c.PowerStep != 0 {
			m.LoseUnsynced()
			reg.volatile = true
		} else if c.Zone != 0 {
			m.LoseUnsynced()
		}
		w.devices = append(w.devices, newDevice(w, fmt.Sprintf("dev%d", i), i, size, c.Queues, c.Depth, reg))
		w.model.add(i)
		if c.Zone != 0 {
			w.states = append(w.states, w.newState(i))
		}
	}
	if c.FaultOn != 0 {
		f := blockdevtest.Fault{
			After: c.FaultAfter, Count: c.FaultCount,
			Err: unix.Errno(c.FaultErr), Effect: blockdevtest.Effect(c.FaultEffect),
		}
		for k := blockdev.Read; k <= blockdev.Allocate; k++ {
			if c.FaultKinds>>k&1 != 0 {
				f.Kinds = append(f.Kinds, k)
			}
		}
		f.Fits = func(op *blockdev.Op) bool {
			if w.isOrig(op.File) >= 0 {
				return c.FaultOn&2 != 0
			}
			return c.FaultOn&1 != 0
		}
		w.faults.Add(f)
	}
	return w
}

// isOrig is the number of the original disk that f is, or -1.
func (w *world) isOrig(f blockdev.File) int {
	for i, m := range w.origs {
		if f == m {
			return i
		}
	}
	return -1
}

func changes(k blockdev.Kind) bool {
	return k == blockdev.Write || k == blockdev.Discard || k == blockdev.WriteZeroes
}

// onSubmit looks at every operation that reaches a disk.
func (w *world) onSubmit(q *blockdevtest.SchedQueue, op *blockdev.Op) {
	if w.trace != nil {
		w.tracef("%s: submit %v %s %d+%d", q.Name(), op.Kind, op.File.Name(), op.Off/sectorSize, op.Len/sectorSize)
	}
	if name, ok := w.retired[op.File]; ok {
		w.fail("I10: %v of %s, which %s gave back", op.Kind, op.File.Name(), name)
	}
	w.checkEncrypted(op)
	w.checkThread(q, op)
	i := w.isOrig(op.File)
	if i < 0 || !changes(op.Kind) {
		return
	}
	if r := w.devices[i].tagOf(op.Buf); r != nil && r.fua && !op.FUA {
		w.fail("I2: a piece of %v of %s at sector %d+%d goes without FUA", r.op, r.d.name, op.Off/sectorSize, op.Len/sectorSize)
	}
	w.changing[w.origs[i]]++
	w.model.devs[i].checkMarked(op)
	w.oblige(i, op.Off, op.Len, len(w.model.devs[i].epochs)-1)
	for _, s := range w.snaps {
		if s == nil {
			continue
		}
		if c, ok := s.unprotected(i, op.Off, op.Len); ok {
			w.fail("I4: %v of disk%d at sector %d+%d submitted while chunk %d of snapshot %d is still NEW",
				op.Kind, i, op.Off/sectorSize, op.Len/sectorSize, c, s.slot)
		}
	}
}

// checkThread: a filter's ring has nothing under way to a storage, because a storage that
// hangs would keep the filter from the next process.
func (w *world) checkThread(q *blockdevtest.SchedQueue, op *blockdev.Op) {
	if w.proc == nil || !slices.ContainsFunc(w.storages, func(m *blockdevtest.Memory) bool { return op.File == m }) {
		return
	}
	for _, of := range w.proc.handlers {
		if slices.ContainsFunc(of, func(h handler) bool { return h.thread == q }) {
			w.fail("I5: %s has %v of %s under way", q.Name(), op.Kind, op.File.Name())
		}
	}
}

func (w *world) onEffect(q *blockdevtest.SchedQueue, op *blockdev.Op, off, n int64) {
	if w.trace != nil {
		w.tracef("%s: effect %v %s %d+%d", q.Name(), op.Kind, op.File.Name(), (op.Off+off)/sectorSize, n/sectorSize)
	}
	if name, ok := w.retired[op.File]; ok && changes(op.Kind) {
		w.fail("I10: %v of %s takes effect after %s gave it back", op.Kind, op.File.Name(), name)
	}
	if changes(op.Kind) {
		w.written[op.File] = max(w.written[op.File], op.Off+off+n)
		if at := slices.IndexFunc(w.places, func(pl *storagePlace) bool { return op.File == pl.file }); at >= 0 && w.c.Records != 0 {
			w.stored(w.places[at])
		}
	}
	if i := w.isOrig(op.File); i >= 0 && changes(op.Kind) {
		if op.Kind != blockdev.Discard || blockdevtest.DiscardEffect(w.c.Discards) != blockdevtest.DiscardKeep {
			w.model.devs[i].changed(op.Off+off, n)
		}
	}
}

func (w *world) onComplete(q *blockdevtest.SchedQueue, op *blockdev.Op) {
	if w.trace != nil {
		w.tracef("%s: complete %v %s %d+%d: %v", q.Name(), op.Kind, op.File.Name(), op.Off/sectorSize, op.Len/sectorSize, op.Err)
	}
	if i := w.isOrig(op.File); i >= 0 && changes(op.Kind) {
		w.changing[w.origs[i]]--
	}
}

// onFire is told which operation is about to fail. What a client asked for
// itself may fail; all else is the engine's to bear.
func (w *world) onFire(op *blockdev.Op) {
	w.stats.Faults++
	w.tracef("fault on %v %s %d+%d", op.Kind, op.File.Name(), op.Off/sectorSize, op.Len/sectorSize)
	if slices.ContainsFunc(w.stateFiles(), func(m *blockdevtest.Memory) bool { return op.File == m }) {
		return // which excuses nothing
	}
	if op.Kind == blockdev.Read || op.Kind == blockdev.Write {
		for _, d := range w.allDevices() {
			if r := d.tagOf(op.Buf); r != nil {
				r.spoilt = true
				r.doomed = d.image == nil
				if d.image == nil || op.Kind == blockdev.Read && !slices.ContainsFunc(w.storages, func(m *blockdevtest.Memory) bool { return op.File == m }) {
					return
				}
			}
		}
		w.fired++
		if op.Kind == blockdev.Write {
			// Zeroes come from a buffer of the engine's own.
			for _, d := range w.allDevices()[len(w.devices):] {
				d.spoil(ublk.OpWriteZeroes, 0, d.size)
			}
		}
		return
	}
	i := w.isOrig(op.File)
	if i < 0 {
		w.fired++
		return
	}
	var spoilt []*request
	switch d := w.devices[i]; op.Kind {
	case blockdev.Flush:
		spoilt = d.spoil(ublk.OpFlush, 0, d.size)
	case blockdev.Discard:
		d.spoil(ublk.OpDiscard, op.Off, op.Len)
	case blockdev.WriteZeroes:
		spoilt = d.spoil(ublk.OpWriteZeroes, op.Off, op.Len)
	}
	if len(spoilt) == 1 && (op.Kind != blockdev.Flush || w.c.Zone == 0) { // a log flushes, too
		spoilt[0].doomed = true
	}
}

// finished takes the result of a client's request; buf is the tag's buffer.
func (w *world) finished(r *request, buf []byte, errno unix.Errno) {
	now := w.tick()
	w.outstanding--
	w.stats.Requests++
	w.tracef("%s: %v %d+%d done: %v", r.d.name, r.op, r.from(), r.len/sectorSize, errno)
	w.model.finished(r, buf, errno, now)
	if r.done != nil {
		r.done(errno)
	}
	w.resume()
}

// step lets one thing happen; false when nothing is under way.
func (w *world) step() (more bool) {
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(death); !ok {
				panic(e)
			}
			more = true
			w.kill()
		}
	}()
	if w.proc != nil {
		age := w.sched.Steps() - w.bornAt
		if w.c.KillStep != 0 && w.deaths < w.c.Kills && age >= uint64(w.c.KillStep) ||
			w.c.KillAgain != 0 && w.deaths == 1 && age >= uint64(w.c.KillAgain) {
			w.kill()
		}
	}
	if w.c.PowerStep != 0 && w.sched.Steps() >= uint64(w.c.PowerStep) {
		w.powerFail()
		return false
	}
	if w.sched.Steps() > maxSteps {
		w.fail("I8: no end after %d steps: %s", maxSteps, w.whatHangs())
	}
	return w.sched.Step()
}

// maxSteps is far more than any case needs.
const maxSteps = 3000000

// powerFail ends the world: the originals are all that is left.
func (w *world) powerFail() {
	w.tracef("POWER FAILURE")
	w.powerFailed = true
	w.faults.Clear()
	w.sched.PowerFail(append(w.stateFiles(), w.origs...)...)
	for i, d := range w.devices {
		w.model.checkLost(d)
		if w.c.Zone != 0 {
			h, r, err := w.states[i].recovered(asItIs)
			w.checkHistory(i, h, r, err)
			if err == nil {
				w.checkBackup(i, h, w.origs[i])
			}
		}
	}
	if w.c.Records != 0 {
		w.clearLost()
	}
	if w.c.Zone != 0 {
		w.reboots()
	}
}

func (w *world) allDevices() []*device {
	ds := append([]*device(nil), w.devices...)
	for _, s := range w.snaps {
		if s != nil {
			for _, im := range s.images {
				ds = append(ds, im.device)
			}
		}
	}
	return ds
}

// files are the disks that can be stuck or slow.
func (w *world) files() []*blockdevtest.Memory {
	files := append(append([]*blockdevtest.Memory(nil), w.origs...), w.storages...)
	for _, s := range w.states {
		files = append(files, s.logs...)
	}
	return files
}

func (s Stats) String() string {
	return fmt.Sprintf("%d requests in %d steps, %d takes, %d snapshots broken, %d deaths, %d faults",
		s.Requests, s.Steps, s.Takes, s.Breaks, s.Deaths, s.Faults)
}

// add counts another run.
func (s *Stats) add(t Stats) {
	s.Requests += t.Requests
	s.Steps += t.Steps
	s.Takes += t.Takes
	s.Breaks += t.Breaks
	s.Deaths += t.Deaths
	s.Faults += t.Faults
}

// Run runs a case; nil when no invariant was violated. trace gets a line for
// everything that happens; it may be nil.
func Run(c Case, trace io.Writer) (stats Stats, failure *Failure) {
	w := newWorld(c, trace)
	defer func() {
		stats = w.stats
		stats.Steps = w.sched.Steps()
		stats.Deaths, stats.Tables = w.deaths, w.tables
		for _, m := range w.storages {
			if w.written[m] > 0 {
				stats.Storages++
			}
		}
		if e := recover(); e != nil {
			failure = &Failure{Step: w.steps, Stats: stats}
			if v, ok := e.(violation); ok {
				failure.Message = string(v)
			} else {
				failure.Message = fmt.Sprintf("panic: %v\n%s", e, debug.Stack())
			}
			w.tracef("FAILED: %s", failure.Message)
		}
	}()
	// Memory that a snapshot has given back cannot be touched.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { unmap(w.memory...) }()
	defer w.dieAtPoint()()
	w.boot()
	w.client.After(0, w.next)
	w.settle()
	if !w.powerFailed {
		w.finish()
	}
	return
}
