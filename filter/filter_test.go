package filter_test

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

const (
	chunk    = 4 << 10
	diskSize = 64 * chunk
)

// rig is a filter with two queues over a disk in memory full of 0xaa.
type rig struct {
	t      *testing.T
	sched  *blockdevtest.Sched
	faults blockdevtest.Faults
	disk   *blockdevtest.Memory
	cbt    *cbtmap.Map
	f      *filter.Filter
	q      []*filter.Queue
	w      *diffarea.Worker
	sent   int
	done   map[*ublk.Request]unix.Errno
}

func newRig(t *testing.T) *rig {
	g := &rig{t: t, sched: blockdevtest.NewSched(0), done: map[*ublk.Request]unix.Errno{}}
	g.disk = blockdevtest.NewMemoryDevice("disk", diskSize)
	if _, err := g.disk.WriteAt(bytes.Repeat([]byte{0xaa}, diskSize), 0); err != nil {
		t.Fatal(err)
	}
	g.disk.SetDiscards(blockdevtest.DiscardZero)
	var err error
	if g.cbt, err = cbtmap.NewMemory(diskSize, cbtmap.DefaultParams()); err != nil {
		t.Fatal(err)
	}
	g.f = filter.New(filter.Config{Orig: g.disk, Size: diskSize, CBT: g.cbt, Queues: 2})
	for i := range 2 {
		g.q = append(g.q, g.f.NewQueue(i, blockdevtest.NewFaulty(g.sched.NewQueue(fmt.Sprint(i)), &g.faults)))
	}
	g.w = diffarea.NewWorker(g.sched.NewQueue("control"))
	return g
}

func (g *rig) Completed(r *ublk.Request, errno unix.Errno) {
	if _, twice := g.done[r]; twice {
		g.t.Errorf("%v %d+%d completed twice", r.Op, r.Off, r.Len)
	}
	g.done[r] = errno
}

func (g *rig) send(q int, op ublk.Op, off, n int64, fill byte) *ublk.Request {
	r := ublk.NewRequest(g.sent, g)
	g.sent++
	r.Op, r.Off, r.Len = op, off, n
	if op <= ublk.OpWrite {
		r.Buf = blockdev.MemBuf(bytes.Repeat([]byte{fill}, int(n)))
	}
	g.q[q].Handle(r)
	return r
}

func (g *rig) area(size int64) *diffarea.Area {
	pool := make([]byte, 8*size)
	l, err := diffarea.NewLog(diffarea.LogConfig{
		ChunkSize: size, Pool: diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)},
		State: make([]byte, diffarea.LogStateSize), Portion: 1 << 20, OnEvent: func(diffarea.Event) {},
	})
	if err != nil {
		g.t.Fatal(err)
	}
	l.Expect(g.w, diskSize)
	l.Append(g.w, diffarea.Storage{File: blockdevtest.NewMemoryFile("store", 1<<30)}, func(err error) {
		if err != nil {
			g.t.Error(err)
		}
	})
	g.sched.Run()
	n := diffarea.Chunks(diskSize, size)
	return diffarea.NewArea(diffarea.AreaConfig{Log: l, Orig: g.disk, Size: diskSize, Words: make([]byte, diffarea.TableSize(n))})
}

// cut installs an area.
func (g *rig) cut(a *diffarea.Area) {
	g.t.Helper()
	ok := false
	filter.StartCut([]*filter.Filter{g.f}, []*diffarea.Area{a}, func() {}, func(b bool) { ok = b })
	g.sched.Run()
	if !ok {
		g.t.Fatal("the cut did not happen")
	}
}

func (g *rig) at(off int64) byte {
	var b [1]byte
	if _, err := g.disk.ReadAt(b[:], off); err != nil {
		g.t.Fatal(err)
	}
	return b[0]
}

func TestEveryOperationReachesTheOriginal(t *testing.T) {
	g := newRig(t)
	var kinds []blockdev.Kind
	var fua, noUnmap bool
	g.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		kinds = append(kinds, op.Kind)
		fua = fua || op.Kind == blockdev.Write && op.FUA
		noUnmap = noUnmap || op.Kind == blockdev.WriteZeroes && op.NoUnmap
	}
	w := ublk.NewRequest(100, g)
	w.Op, w.Off, w.Len, w.FUA, w.Buf = ublk.OpWrite, 512, 512, true, blockdev.MemBuf(bytes.Repeat([]byte{1}, 512))
	g.q[0].Handle(w)
	z := ublk.NewRequest(101, g)
	z.Op, z.Off, z.Len, z.NoUnmap = ublk.OpWriteZeroes, 1024, 512, true
	g.q[0].Handle(z)
	g.send(1, ublk.OpDiscard, 2048, 512, 0)
	g.send(1, ublk.OpFlush, 0, 0, 0)
	g.sched.Run()
	r := g.send(0, ublk.OpRead, 512, 512, 0)
	g.sched.Run()
	if want := "[write write-zeroes discard flush read]"; fmt.Sprint(kinds) != want || !fua || !noUnmap {
		t.Errorf("got %v, FUA %v, NoUnmap %v; want %v and both", kinds, fua, noUnmap, want)
	}
	if len(g.done) != 5 {
		t.Errorf("%d of 5 completed", len(g.done))
	}
	if b := r.Buf.Bytes(512); b[0] != 1 || b[511] != 1 {
		t.Error("read did not see the write")
	}
	if g.at(1024) != 0 || g.at(2048) != 0 || g.at(0) != 0xaa || g.at(1536) != 0xaa {
		t.Error("zeroes and discard are not where they should be")
	}
}

func TestErrorsAreThoseOfTheOriginal(t *testing.T) {
	g := newRig(t)
	g.faults.Add(blockdevtest.Fault{File: g.disk, Off: chunk, Len: 512, Err: unix.ENOLINK})
	bad := g.send(0, ublk.OpWrite, chunk, 512, 1)
	good := g.send(0, ublk.OpWrite, 2*chunk, 512, 1)
	g.sched.Run()
	if g.done[bad] != unix.ENOLINK || g.done[good] != 0 || g.f.Counters(0).Errors.Load() != 1 {
		t.Errorf("got %v and %v, %d errors counted", g.done[bad], g.done[good], g.f.Counters(0).Errors.Load())
	}
}

// TestDiscardKeepsWhatASnapshotNeeds is the regression test for a trim that
// was copied like a write and overflowed the storage.
func TestDiscardKeepsWhatASnapshotNeeds(t *testing.T) {
	g := newRig(t)
	a := g.area(chunk)
	g.cut(a)
	g.send(0, ublk.OpWrite, 5*chunk+512, 3*chunk, 1) // copies chunks 5 to 8
	g.sched.Run()
	regions := a.Log().Usage().Regions
	g.send(0, ublk.OpDiscard, 512, diskSize-1024, 0)
	g.sched.Run()
	if got := a.Log().Usage().Regions; got != regions || regions != 4 {
		t.Errorf("discard copied %d chunks, the write %d, want 0 and 4", got-regions, regions)
	}
	for c := range int64(64) {
		want := byte(0xaa)
		if c >= 5 && c <= 8 {
			want = 0
		}
		if got := g.at(c*chunk + chunk/2); got != want {
			t.Errorf("chunk %d reads %#x, want %#x", c, got, want)
		}
	}
	if got := g.f.Counters(0).Skipped.Load(); got != diskSize-1024-4*chunk {
		t.Errorf("%d bytes counted as skipped, want %d", got, diskSize-1024-4*chunk)
	}
	info := g.cbt.Switch()
	changed := int64(0)
	for r, err := range must(g.cbt.Changes(info.GenerationID, 0)) {
		if err != nil {
			t.Fatal(err)
		}
		changed += r.Length
	}
	if changed != diskSize {
		t.Errorf("the map has %d changed bytes, want all %d", changed, diskSize)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestWriteZeroesIsCopied(t *testing.T) {
	g := newRig(t)
	a := g.area(chunk)
	g.cut(a)
	z := g.send(0, ublk.OpWriteZeroes, chunk/2, 20*chunk, 0)
	g.sched.Run()
	if g.done[z] != 0 || a.Log().Usage().Regions != 21 {
		t.Fatalf("%v, %d chunks copied, want 21", g.done[z], a.Log().Usage().Regions)
	}
	if g.at(0) != 0xaa || g.at(chunk/2) != 0 || g.at(20*chunk+chunk/2-1) != 0 || g.at(20*chunk+chunk/2) != 0xaa {
		t.Error("zeroes are not where they should be")
	}
}

// TestOldDataIsReadOnce has three snapshots of different chunk sizes wait for
// one write.
func TestOldDataIsReadOnce(t *testing.T) {
	g := newRig(t)
	for _, size := range []int64{chunk, 4 * chunk, 4 * chunk, 2 * chunk} {
		g.cut(g.area(size))
	}
	var reads int64
	g.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		if op.Kind == blockdev.Read && op.File == blockdev.File(g.disk) {
			reads += op.Len
		}
	}
	g.send(0, ublk.OpWrite, 0, 8*chunk, 1)
	g.sched.Run()
	if reads != 8*chunk {
		t.Errorf("%d bytes read from the original, want %d", reads, 8*chunk)
	}
}

func TestCutWaitsForWritesAndHoldsNewOnes(t *testing.T) {
	g := newRig(t)
	g.sched.Stick(g.disk)
	first := g.send(0, ublk.OpWrite, 0, 512, 1)
	at, done := false, false
	filter.StartCut([]*filter.Filter{g.f}, []*diffarea.Area{g.area(chunk)}, func() {
		at = true
		if _, ok := g.done[first]; !ok {
			t.Error("cut with a write in flight")
		}
		if g.at(0) != 1 || g.at(chunk) != 0xaa {
			t.Error("the disk at the cut is not what it should be")
		}
	}, func(bool) { done = true })
	g.sched.Run()
	held := g.send(1, ublk.OpWrite, chunk, 512, 2)
	g.sched.Run()
	if at {
		t.Fatal("the cut did not wait")
	}
	g.sched.Unstick(g.disk)
	g.sched.Run()
	if _, ok := g.done[held]; !at || !done || !ok || g.at(chunk) != 2 {
		t.Errorf("cut %v, over %v, held write done %v", at, done, ok)
	}
}

func TestCancelledCutChangesNothing(t *testing.T) {
	g := newRig(t)
	g.sched.Stick(g.disk)
	g.send(0, ublk.OpWrite, 0, 512, 1)
	result := make([]bool, 0, 1)
	c := filter.StartCut([]*filter.Filter{g.f}, []*diffarea.Area{g.area(chunk)}, func() { t.Error("cut") },
		func(ok bool) { result = append(result, ok) })
	g.sched.Run()
	held := g.send(1, ublk.OpWrite, chunk, 512, 2)
	if !c.Cancel() || c.Cancel() {
		t.Fatal("a cut is cancelled once")
	}
	g.sched.Run()
	g.sched.Unstick(g.disk)
	g.sched.Run()
	if len(result) != 1 || result[0] || g.f.Held() {
		t.Errorf("called back %v, held %v; want one false, not held", result, g.f.Held())
	}
	if errno, ok := g.done[held]; !ok || errno != 0 {
		t.Error("the held write was forgotten")
	}
	g.cut(g.area(chunk)) // and a new one works
}

func TestNoAllocationPerRequest(t *testing.T) {
	f := filter.New(filter.Config{Orig: blockdevtest.NewMemoryDevice("disk", diskSize), Size: diskSize, CBT: must(cbtmap.NewMemory(diskSize, cbtmap.DefaultParams())), Queues: 1})
	in := &instant{}
	q := f.NewQueue(0, in)
	noAllocation(t, q, in, ublk.NewRequest(0, ignore{}))
}

// noAllocation serves a request of each kind, of which none may allocate.
func noAllocation(t *testing.T, q *filter.Queue, in *instant, r *ublk.Request) {
	t.Helper()
	buf := blockdev.MemBuf(make([]byte, chunk))
	one := func() {
		for op := ublk.OpRead; op <= ublk.OpWriteZeroes; op++ {
			r.Op, r.Off, r.Len, r.Buf = op, 3*chunk, chunk, buf
			q.Handle(r)
			in.op.Done(in.op)
		}
	}
	if n := testing.AllocsPerRun(100, one); n != 0 {
		t.Errorf("%v allocations for one request of each kind", n)
	}
}

type ignore struct{}

func (ignore) Completed(*ublk.Request, unix.Errno) {}

type instant struct{ op *blockdev.Op }

func (q *instant) Submit(op *blockdev.Op) { op.Err = 0; q.op = op }
func (q *instant) Post(*blockdev.Task)    {}

// BenchmarkWrite is what the filter itself costs a write that is not copied.
func BenchmarkWrite(b *testing.B) {
	f := filter.New(filter.Config{Orig: blockdevtest.NewMemoryDevice("disk", diskSize), Size: diskSize, CBT: must(cbtmap.NewMemory(diskSize, cbtmap.DefaultParams())), Queues: 1})
	in := &instant{}
	q := f.NewQueue(0, in)
	r := ublk.NewRequest(0, ignore{})
	r.Op, r.Off, r.Len, r.Buf = ublk.OpWrite, 3*chunk, chunk, blockdev.MemBuf(make([]byte, chunk))
	for range b.N {
		q.Handle(r)
		in.op.Done(in.op)
	}
}

// TestNeighboursAreReadTogether: one read brings all new chunks of a write,
// unless their slots lie at both ends of the pool or a copied chunk is between.
func TestNeighboursAreReadTogether(t *testing.T) {
	g := newRig(t)
	for c := range int64(diskSize / chunk) {
		if _, err := g.disk.WriteAt(bytes.Repeat([]byte{byte(c)}, chunk), c*chunk); err != nil {
			t.Fatal(err)
		}
	}
	a := g.area(chunk) // 8 slots
	g.cut(a)
	var reads []string
	g.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		if op.Kind == blockdev.Read && op.File == g.disk {
			reads = append(reads, fmt.Sprintf("%d+%d", op.Off/chunk, op.Len/chunk))
		}
	}
	for _, step := range []struct {
		first, n int64
		want     string
	}{
		{10, 5, "[10+5]"},
		{20, 6, "[20+3 23+3]"}, // slots 5 6 7, 0 1 2
		{12, 5, "[15+2]"},
		{21, 8, "[26+3]"}, // slots 5 6 7
		{30, 1, "[30+1]"},
		{29, 3, "[29+1 31+1]"}, // slots 1 2
	} {
		reads = nil
		// From the middle of the first chunk to the middle of the last.
		g.send(0, ublk.OpWrite, step.first*chunk+512, step.n*chunk-1024, 0xee)
		g.sched.Run()
		if fmt.Sprint(reads) != step.want {
			t.Errorf("write of %d chunks at %d: read %v, want %s", step.n, step.first, reads, step.want)
		}
	}
	reads = nil
	for c := range int64(3) { // requests of one turn
		g.send(0, ublk.OpWrite, (40+c)*chunk, chunk, 0xee)
	}
	g.sched.Run()
	if want := "[40+3]"; fmt.Sprint(reads) != want {
		t.Errorf("three writes at 40: read %v, want %s", reads, want)
	}
	for c := range a.Chunk(diskSize) {
		w := a.Load(c)
		f, off := a.Locate(w, a.Start(c))
		var b [chunk]byte
		if _, err := f.(*blockdevtest.Memory).ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[:], bytes.Repeat([]byte{byte(c)}, chunk)) {
			t.Errorf("chunk %d: the image has %#x", c, b[0])
		}
	}
}
