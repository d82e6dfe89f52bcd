package filter_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

const zoneShift = 14 // zones of 4 chunks

// logged puts a write-intent log, which is on, into a rig.
func (g *rig) logged() (l *intentlog.Log, file *blockdevtest.Memory) {
	g.t.Helper()
	file = blockdevtest.NewMemoryDevice("log", intentlog.FileSize(diskSize, zoneShift))
	l = newLog(g.t, g.cbt, g.disk, file, g.sched.NewQueue("log"))
	g.sched.Run()
	if _, err := l.Base(g.cbt); err != nil {
		g.t.Fatal(err)
	}
	g.f = filter.New(filter.Config{Orig: g.disk, Size: diskSize, CBT: g.cbt, Intent: l, Queues: 2})
	for i := range 2 {
		g.q[i] = g.f.NewQueue(i, g.sched.NewQueue(fmt.Sprint("logged", i)))
	}
	return l, file
}

func newLog(t testing.TB, cbt *cbtmap.Map, orig, file blockdev.File, q blockdev.Queue) *intentlog.Log {
	l, err := intentlog.New(intentlog.Config{
		Size: diskSize, ZoneShift: zoneShift, Orig: orig, File: file, Queue: q,
		Memory: make([]byte, intentlog.FileSize(diskSize, zoneShift)), Failed: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	l.Follow(cbt)
	l.Start(uuid.New(), func(err error) {
		if err != nil {
			t.Error(err)
		}
	})
	return l
}

// TestWritesWaitForTheLog: nothing that changes the disk is sent before its zone is in the
// log, all else is, and what waits for the log is in flight for a cut.
func TestWritesWaitForTheLog(t *testing.T) {
	g := newRig(t)
	l, file := g.logged()
	var sent []string
	g.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		if op.File == g.disk {
			sent = append(sent, fmt.Sprintf("%v %d+%d", op.Kind, op.Off/chunk, op.Len/chunk))
		}
	}
	expect := func(want ...string) {
		t.Helper()
		g.sched.Run()
		if !slices.Equal(sent, want) {
			t.Errorf("sent %q, want %q", sent, want)
		}
		sent = nil
	}
	g.send(0, ublk.OpWrite, 0, chunk, 1)
	expect("write 0+1")
	g.sched.Stick(file)
	g.send(0, ublk.OpWrite, 1*chunk, chunk, 1) // its zone is in the log
	g.send(0, ublk.OpRead, 5*chunk, chunk, 1)
	g.send(1, ublk.OpFlush, 0, 0, 0)
	held := []*ublk.Request{
		g.send(0, ublk.OpWrite, 5*chunk, chunk, 1),
		g.send(1, ublk.OpDiscard, 8*chunk, 2*chunk, 0),
		g.send(1, ublk.OpWriteZeroes, 0, diskSize, 0),
	}
	expect("write 1+1", "read 5+1", "flush 0+0")

	// A cut waits for them, and can be cancelled.
	var result []bool
	c := filter.StartCut([]*filter.Filter{g.f}, nil, func() { t.Error("cut while writes wait for the log") }, func(ok bool) { result = append(result, ok) })
	expect()
	later := g.send(1, ublk.OpWrite, 20*chunk, chunk, 1)
	if !c.Cancel() {
		t.Error("the cut was faster")
	}
	expect()
	if !slices.Equal(result, []bool{false}) {
		t.Errorf("the cut ends with %v", result)
	}
	g.sched.Unstick(file)
	g.sched.Run()
	for _, r := range append(held, later) {
		if errno, ok := g.done[r]; !ok || errno != 0 {
			t.Errorf("%v of chunk %d: done %v, %v", r.Op, r.Off/chunk, ok, errno)
		}
	}
	sent = nil

	// After a take every zone waits once more.
	g.cut(g.area(chunk))
	g.cbt.Switch()
	g.sched.Stick(file)
	r := g.send(0, ublk.OpWrite, 0, chunk, 2)
	expect()
	l.GiveUp()
	g.sched.Run()
	if errno, ok := g.done[r]; !ok || errno != 0 {
		t.Errorf("given up, yet a write waits: %v, %v", ok, errno)
	}
}

// loggedQueue is a queue of a filter with a write-intent log that has every zone.
func loggedQueue(t testing.TB) (q *filter.Queue, in *instant, r *ublk.Request) {
	cbt := must(cbtmap.NewMemory(diskSize, cbtmap.DefaultParams()))
	disk := blockdevtest.NewMemoryDevice("disk", diskSize)
	log := blockdevtest.NewMemoryQueue()
	l := newLog(t, cbt, disk, blockdevtest.NewMemoryDevice("log", intentlog.FileSize(diskSize, zoneShift)), log)
	w := new(intentlog.Wait)
	w.Init(log, func() {})
	if !l.Hold(w, 0, diskSize) {
		t.Error("the log is off")
	}
	log.Run()
	in = &instant{}
	q = filter.New(filter.Config{Orig: disk, Size: diskSize, CBT: cbt, Intent: l, Queues: 1}).NewQueue(0, in)
	return q, in, ublk.NewRequest(0, ignore{})
}

func TestNoAllocationWithALog(t *testing.T) {
	q, in, r := loggedQueue(t)
	noAllocation(t, q, in, r)
}

// BenchmarkWriteLogged is BenchmarkWrite with a write-intent log that has the zone.
func BenchmarkWriteLogged(b *testing.B) {
	q, in, r := loggedQueue(b)
	r.Op, r.Off, r.Len, r.Buf = ublk.OpWrite, 3*chunk, chunk, blockdev.MemBuf(make([]byte, chunk))
	for range b.N {
		q.Handle(r)
		in.op.Done(in.op)
	}
}
