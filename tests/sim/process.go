package sim

import (
	"fmt"
	"slices"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/mutation"
)

// process is the daemon: the engine on simulated threads. Its control thread
// does one piece of control work at a time, as the real one does.
type process struct {
	w       *world
	threads []*blockdevtest.SchedQueue
	control *blockdevtest.SchedQueue
	stores  *blockdevtest.SchedQueue // writes to storages
	filters []*filter.Filter
	cbts    []*cbtmap.Map
	state   *blockdevtest.SchedQueue // writes the logs
	keepers []*keeper                // by device; none if there are no logs

	handlers [][]handler // by device and queue

	jobs    []job
	current string // the job under way, "" if none
	cutting bool   // it waits for a cut, and writes wait for that
	cancel  func() // what Cancel does to it, nil if it cannot be cancelled
}

// handler is a filter's queue and its thread.
type handler struct {
	thread  *blockdevtest.SchedQueue
	handler *filter.Queue
}

// job is a piece of control work; it calls done at its end.
type job struct {
	name string
	run  func(done func())
}

// thread starts a thread of the process.
func (p *process) thread(name string) *blockdevtest.SchedQueue {
	q := p.w.sched.NewQueue(name)
	p.threads = append(p.threads, q)
	return q
}

// queue is a thread's queue as the engine sees it: faults strike in between.
func (p *process) queue(q *blockdevtest.SchedQueue) blockdev.Queue {
	return blockdevtest.NewFaulty(q, p.w.faults)
}

func (p *process) idle() bool { return p.current == "" && len(p.jobs) == 0 }

// do queues a job.
func (p *process) do(name string, run func(done func())) {
	p.jobs = append(p.jobs, job{name, run})
	p.next()
}

func (p *process) next() {
	if p.current != "" || len(p.jobs) == 0 {
		return
	}
	j := p.jobs[0]
	p.jobs = p.jobs[1:]
	p.current = j.name
	ended := false
	p.control.After(0, func() {
		p.w.tracef("control: %s", j.name)
		j.run(func() {
			if ended {
				p.w.fail("%s calls back twice", j.name)
			}
			if p.w.sched.Thread() != p.control {
				p.w.fail("%s calls back on the wrong thread", j.name)
			}
			ended = true
			p.w.tracef("control: %s is over", j.name)
			p.current, p.cancel = "", nil
			p.next()
			p.w.resume()
		})
	})
}

// start makes a process without filters.
func (w *world) start() *process {
	p := &process{w: w}
	w.proc = p
	w.bornAt, w.points = w.sched.Steps(), 0
	p.control = p.thread("control")
	p.stores = p.thread("stores")
	if w.c.Zone != 0 {
		p.state = p.thread("state")
	}
	return p
}

// boot starts the first process.
func (w *world) boot() {
	p := w.start()
	for i, d := range w.devices {
		cbt, err := cbtmap.NewMemory(d.size, cbtmap.Params{
			MinimumShift: uint8(w.c.Block), MaximumShift: uint8(w.c.Block), MaximumCount: 1 << 30,
		})
		if err != nil {
			panic(err)
		}
		for n := 0; n < w.c.Earlier; n++ {
			cbt.Switch()
		}
		info, err := cbt.Info()
		if err != nil {
			panic(err)
		}
		w.model.devs[i].begin(info.GenerationID, info.ChangesNumber)
		w.tmpfs.maps[i] = cbt.Memory()
		w.tmpfs.devices[i] = &deviceRecord{tag: w.newTag()}
		w.made(d, w.tmpfs.devices[i].tag)
		p.cbts = append(p.cbts, cbt)
	}
	p.keepAll()
	p.filter()
	p.begin(func() {})
}

// keepAll makes the keepers, if there are logs.
func (p *process) keepAll() {
	if p.w.c.Zone == 0 {
		return
	}
	p.keepers = make([]*keeper, len(p.w.devices))
	for i, cbt := range p.cbts {
		if cbt != nil {
			p.keepers[i] = p.keep(i)
		}
	}
}

// away says whether a disk has no filter now.
func (p *process) away(dev int) bool {
	return p.filters[dev] == nil || p.keepers != nil && (p.keepers[dev] == nil || p.keepers[dev].away)
}

// living are the keepers that there are.
func (p *process) living() (all []*keeper) {
	for _, k := range p.keepers {
		if k != nil {
			all = append(all, k)
		}
	}
	return all
}

// begin lets the kernel's requests come to each filter once its log is on, if there are
// logs, and then calls done.
func (p *process) begin(done func()) {
	if p.keepers == nil {
		for i, f := range p.filters {
			if f != nil {
				p.serveOf(i)
			}
		}
		done()
		return
	}
	p.do("start the logs", func(end func()) {
		p.startAll(p.serveOf, func() {
			done()
			end()
		})
	})
}

// filter makes the filters of the originals; nobody serves them yet.
func (p *process) filter() {
	p.filters = make([]*filter.Filter, len(p.w.devices))
	p.handlers = make([][]handler, len(p.w.devices))
	for i, cbt := range p.cbts {
		if cbt != nil {
			p.filterOf(i)
		}
	}
}

func (p *process) filterOf(dev int) {
	d := p.w.devices[dev]
	c := filter.Config{Orig: p.w.origs[dev], Size: d.size, CBT: p.cbts[dev], Queues: len(d.queues)}
	if p.keepers != nil {
		c.Intent = p.keepers[dev].log
	}
	f := filter.New(c)
	p.filters[dev] = f
	p.handlers[dev] = nil
	for n := range d.queues {
		thread := p.thread(fmt.Sprintf("%s.%d", d.name, n))
		p.handlers[dev] = append(p.handlers[dev], handler{thread, f.NewQueue(n, p.queue(thread))})
	}
}

// serveOf lets the kernel's requests come to a filter.
func (p *process) serveOf(dev int) {
	for n, h := range p.w.devices[dev].queues {
		server := p.handlers[dev][n]
		h.serve(server.thread, server.handler)
	}
}

// kill is the death of the process, as by SIGKILL: its threads stop where they
// are, what they have begun on the disks goes on, memory mapped shared stays.
func (w *world) kill() {
	p := w.proc
	if p == nil {
		return
	}
	w.tracef("KILLED during %q", p.current)
	w.deaths++
	w.proc = nil
	w.sched.Kill(p.threads...)
	for _, d := range w.allDevices() {
		d.abandon()
	}
	for _, d := range w.allDevices() {
		if d.gone {
			d.abort()
		}
	}
	clear(w.changing)
	w.onIdle = nil
	w.client.After(8, w.recover)
}

// recover starts the next process. What the last one had begun on the disks
// has come to its end by now, one way or the other: it waits for that, by the
// devices and the storages that it claims. It does not wait for the logs: it begins new
// ones, in other files.
func (w *world) recover() {
	w.sched.Settle(func(m *blockdevtest.Memory) bool { return !w.isLog(m) })
	w.tracef("recovery")
	w.strangers()
	p := w.start()
	p.cbts = make([]*cbtmap.Map, len(w.devices))
	for i := range w.devices {
		p.adopt(i)
	}
	p.keepAll()
	p.filters = make([]*filter.Filter, len(w.devices)) // there are none yet
	left := slices.Clone(w.tmpfs.dirs)
	for _, s := range w.snaps {
		if s != nil && !slices.Contains(left, s.dir) {
			if s.told && !s.aborted {
				w.fail("I6: %v is not on record", s)
			}
			w.snaps[s.slot] = nil
		}
	}
	for _, d := range left {
		d.believe()
	}
	p.current = "take over"
	inTurn(len(left), func(i int, next func()) { left[i].void(next) }, func() {
		later := p.jobs
		p.current, p.jobs = "", nil
		p.goOn(left)
		p.jobs = append(p.jobs, later...)
	})
}

// goOn goes on with what a dead process left, when the takes that it did not bring to an end
// are void.
func (p *process) goOn(left []*dir) {
	w := p.w
	p.filter()
	var rest []func(done func())
	for _, d := range left {
		rest = append(rest, d.takeOver())
	}
	for i, cbt := range p.cbts {
		if cbt == nil {
			continue
		}
		if info, err := cbt.Info(); err == nil {
			w.model.devs[i].renew(info)
		}
	}
	p.begin(w.resume)
	for i := range w.devices {
		if p.filters[i] == nil {
			p.do(fmt.Sprintf("add %d again", i), func(done func()) { p.again(i, done) })
		}
	}
	p.do("go on", func(done func()) {
		inTurn(len(rest), func(i int, next func()) { rest[i](next) }, done)
	})
	for _, d := range left {
		if s := d.s; s.cut && !s.gone && w.c.Zone != 0 {
			// Whoever asked for it may be told then.
			p.do("answer", func(done func()) { s.answer(done) })
		}
	}
	p.do("look", func(done func()) {
		w.stats.TakeOver = w.sched.Steps() - w.bornAt
		w.checkRecords()
		done()
	})
}

// checkAdopted compares a change map taken over from a dead process with its
// disk, which may have been about to grow.
func (w *world) checkAdopted(dev int, cbt *cbtmap.Map) {
	size := w.devices[dev].size
	info, _ := cbt.Info()
	if info.DeviceCapacity == size {
		return
	}
	if info.DeviceCapacity > size {
		w.fail("I6: the change map of disk%d is for %d bytes, the disk has %d", dev, info.DeviceCapacity, size)
	}
	if err := cbt.Resize(size); err != nil {
		w.fail("I6: resize: %v", err)
	}
	w.tmpfs.maps[dev] = cbt.Memory()
	w.model.devs[dev].resize(size)
}

// death is panicked at a place where the process is to die.
type death struct{}

// dieAtPoint makes the process die at the case's KillPoint, until end. Only a build with the copies of package bugs has
// places to die.
func (w *world) dieAtPoint() (end func()) {
	mutation.OnPoint(func() {
		if w.proc == nil || w.sched.Thread() == nil || w.c.KillPoint == 0 || w.deaths >= w.c.Kills {
			return
		}
		if w.points++; w.points == w.c.KillPoint {
			panic(death{})
		}
	})
	return func() { mutation.OnPoint(nil) }
}
