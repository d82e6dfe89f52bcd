package intentlog_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

const (
	zone     = 1 << zoneBits
	zoneBits = 16
	size     = 300*zone - 512
)

// world is a log over a disk, with its map and its file.
type world struct {
	t      *testing.T
	sched  *blockdevtest.Sched
	orig   *blockdevtest.Memory
	file   *blockdevtest.Memory
	faults *blockdevtest.Faults
	queue  *blockdevtest.SchedQueue // of the log
	writer *blockdevtest.SchedQueue
	cbt    *cbtmap.Map
	log    *intentlog.Log
	failed []error
	base   []byte // the durable one
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, sched: blockdevtest.NewSched(0), faults: &blockdevtest.Faults{}}
	w.orig = blockdevtest.NewMemoryDevice("disk", size)
	w.file = blockdevtest.NewMemoryDevice("log", intentlog.FileSize(size, zoneBits))
	w.file.SetBlockSize(4096)
	w.file.LoseUnsynced()
	w.queue, w.writer = w.sched.NewQueue("log"), w.sched.NewQueue("writer")
	cbt, err := cbtmap.NewMemory(size, cbtmap.Params{MinimumShift: 12, MaximumShift: 12, MaximumCount: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	w.cbt = cbt
	l, err := intentlog.New(intentlog.Config{
		Size: size, ZoneShift: zoneBits, Orig: w.orig, File: w.file,
		Queue:  blockdevtest.NewFaulty(w.queue, w.faults),
		Memory: make([]byte, intentlog.FileSize(size, zoneBits)),
		Failed: func(err error) { w.failed = append(w.failed, err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	w.log = l
	l.Follow(w.cbt)
	return w
}

// start switches the log on and makes a base.
func (w *world) start() {
	w.t.Helper()
	result := errors.New("start never ended")
	w.log.Start(uuid.New(), func(err error) { result = err })
	w.sched.Run()
	if result != nil {
		w.t.Fatal(result)
	}
	w.checkpoint()
}

func (w *world) checkpoint() {
	w.t.Helper()
	base, err := w.log.Base(w.cbt)
	if err != nil {
		w.t.Fatal(err)
	}
	w.base = base
	if err := w.log.Committed(base); err != nil {
		w.t.Fatal(err)
	}
}

// begin begins a write; ended is whether it may go on.
func (w *world) begin(off, length int64) (ended *bool) {
	ended = new(bool)
	wait := new(intentlog.Wait)
	wait.Init(w.writer, func() {
		if w.sched.Thread() != w.writer {
			w.t.Error("woken on the thread of another queue")
		}
		*ended = true
	})
	w.cbt.Mark(off, length)
	if !w.log.Hold(wait, off, length) {
		*ended = true
	}
	return ended
}

// write writes, and says whether it had to wait.
func (w *world) write(off, length int64) (waited bool) {
	w.t.Helper()
	ended := w.begin(off, length)
	if *ended {
		return false
	}
	w.sched.Run()
	if !*ended {
		w.t.Fatal("a write waits without end")
	}
	return true
}

// take makes a take, durable or not.
func (w *world) take() (cbtmap.Info, error) {
	info := w.cbt.Switch()
	result := errors.New("the take never ended")
	w.log.Taken(info, func(err error) { result = err })
	w.sched.Run()
	return info, result
}

func (w *world) mustTake() cbtmap.Info {
	w.t.Helper()
	info, err := w.take()
	if err != nil {
		w.t.Fatal(err)
	}
	return info
}

func (w *world) content() []byte {
	p := make([]byte, w.file.Size())
	if _, err := w.file.ReadAt(p, 0); err != nil {
		w.t.Fatal(err)
	}
	return p
}

// recovered is what a power failure leaves of the map.
func (w *world) recovered() cbtmap.History {
	w.t.Helper()
	w.file.PowerFail(func(int) int { return 0 })
	h, err := intentlog.Recover(w.base, w.content())
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

// is checks the marks of what was recovered, by zone: the rest is zero.
func is(t *testing.T, h cbtmap.History, marks map[int]byte) {
	t.Helper()
	for b, m := range h.Marks {
		if want := marks[b*4096/zone]; m != want {
			t.Fatalf("block %d in zone %d is marked with %d, want %d", b, b*4096/zone, m, want)
		}
	}
}

func TestFirstWriteToAZoneWaits(t *testing.T) {
	w := newWorld(t)
	if w.write(0, 512) {
		t.Error("a write waits for a log that is off")
	}
	w.start()
	for range 2 {
		for _, s := range []struct {
			off, length int64
			waits       bool
		}{
			{5 * zone, 512, true}, {5 * zone, zone, false}, {6*zone - 512, 1024, true}, {6 * zone, 512, false},
			{100 * zone, 200*zone - 512, true}, {size - 512, 512, false}, {99 * zone, zone, true},
		} {
			if got := w.write(s.off, s.length); got != s.waits {
				t.Errorf("write of %d+%d waits: %v", s.off, s.length, got)
			}
		}
		w.mustTake()
	}
	w.write(5*zone, 512)
	w.checkpoint()
	if !w.write(5*zone, 512) {
		t.Error("after a new base the first write does not wait")
	}
}

func TestRecover(t *testing.T) {
	w := newWorld(t)
	w.start()
	one := w.mustTake()
	w.write(3*zone, 512)
	w.write(7*zone, 512)
	two := w.mustTake()
	w.write(7*zone+4096, 512)
	w.write(size-512, 512)
	h := w.recovered()
	if h.Info != two || two.ChangesNumber != one.ChangesNumber+1 {
		t.Errorf("recovered %v, want %v", h.Info, two)
	}
	is(t, h, map[int]byte{3: 2, 7: 3, 299: 3})

	// A base says it block by block.
	w.checkpoint()
	w.write(9*zone, 512)
	h = w.recovered()
	for b, m := range h.Marks {
		want := map[int]byte{3 * 16: 2, 7 * 16: 2, 7*16 + 1: 3, 299*16 + 15: 3}[b]
		if b/16 == 9 {
			want = 3
		}
		if m != want {
			t.Errorf("block %d is marked with %d, want %d", b, m, want)
		}
	}

	// It goes on from there.
	m, err := cbtmap.NewMemory(size, cbtmap.Params{MinimumShift: 12, MaximumShift: 12, MaximumCount: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Restore(h); err != nil {
		t.Fatal(err)
	}
	if i := m.Switch(); i.GenerationID != two.GenerationID || i.ChangesNumber != 3 {
		t.Errorf("the take after it is %v", i)
	}
}

// TestTakeThatDidNotHappen: until its number is durable a take has not happened, and
// what was written after it belongs to the take before.
func TestTakeThatDidNotHappen(t *testing.T) {
	w := newWorld(t)
	w.start()
	one := w.mustTake()
	w.cbt.Switch()
	w.write(3*zone, 512)
	h := w.recovered()
	if h.Info != one {
		t.Errorf("recovered %v, want %v", h.Info, one)
	}
	is(t, h, map[int]byte{3: 2})
}

// TestTakeFlushes: what a take's images show must not be lost after it.
func TestTakeFlushes(t *testing.T) {
	w := newWorld(t)
	w.orig.LoseUnsynced()
	w.start()
	mem := bytes.Repeat([]byte{7}, 512)
	w.writer.Submit(&blockdev.Op{Kind: blockdev.Write, File: w.orig, Len: 512, Buf: blockdev.MemBuf(mem), Done: func(*blockdev.Op) {}})
	w.sched.Run()
	w.mustTake()
	w.orig.PowerFail(func(int) int { return 0 })
	got := make([]byte, 512)
	if _, err := w.orig.ReadAt(got, 0); err != nil || !bytes.Equal(got, mem) {
		t.Errorf("the disk has lost what the take shows, %v", err)
	}
}

// TestNewGeneration: until it has a base, the old one counts, and everything written
// since is changed in it.
func TestNewGeneration(t *testing.T) {
	w := newWorld(t)
	w.start()
	for range 254 {
		w.mustTake()
	}
	w.write(3*zone, 512)
	w.checkpoint()
	last, _ := w.cbt.Info()
	info, err := w.take()
	if !errors.Is(err, intentlog.ErrGeneration) || info.GenerationID == last.GenerationID {
		t.Fatalf("take %v: %v", info, err)
	}
	w.write(8*zone, 512)
	h := w.recovered()
	if h.Info != last {
		t.Errorf("recovered %v, want %v", h.Info, last)
	}
	if h.Marks[8*16+5] != 255 || h.Marks[3*16] != 255 || h.Marks[3*16+1] != 0 {
		t.Errorf("marks %d, %d, %d", h.Marks[8*16+5], h.Marks[3*16], h.Marks[3*16+1])
	}
	w.checkpoint()
	h = w.recovered()
	if h.Info != info {
		t.Errorf("recovered %v, want %v", h.Info, info)
	}
	if next := w.mustTake(); w.recovered().Info != next {
		t.Errorf("recovered %v, want %v", w.recovered().Info, next)
	}
}

func TestFails(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.write(0, 512)
	w.faults.Add(blockdevtest.Fault{File: w.file, Err: unix.EIO, Count: 1})
	held := w.begin(3*zone, 512)
	w.sched.Run()
	later := w.begin(4*zone, 512)
	w.sched.Run()
	if *held || *later || len(w.failed) != 1 || !errors.Is(w.failed[0], unix.EIO) {
		t.Fatalf("after an error: writes go on: %v, %v; told %v", *held, *later, w.failed)
	}
	if w.write(10, 512) {
		t.Error("a write that has its entry waits")
	}
	var taken error
	w.log.Taken(w.cbt.Switch(), func(err error) { taken = err })
	w.sched.Run()
	if waits, _ := w.log.Waiting(); !waits || taken != nil {
		t.Errorf("nobody waits, take: %v", taken)
	}
	w.log.GiveUp()
	w.sched.Run()
	if !*held || !*later || !errors.Is(taken, intentlog.ErrOff) {
		t.Errorf("given up, yet they wait: %v, %v, take: %v", !*held, !*later, taken)
	}
	if w.write(200*zone, 512) || !w.log.Idle() {
		t.Error("a log that was given up is in use")
	}
	w.start()
	if !w.write(200*zone, 512) || w.log.Status().State != intentlog.On {
		t.Error("it does not start again")
	}
}

// TestGivenUpWhileWritten: a log that does not answer is given up, and is not used again
// until it has answered.
func TestGivenUpWhileWritten(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.sched.Stick(w.file)
	held := w.begin(3*zone, 512)
	w.sched.Run()
	waits, ended := w.log.Waiting()
	if *held || !waits {
		t.Fatal("a write goes on while the log does not answer")
	}
	w.log.GiveUp()
	w.sched.Run()
	if !*held || w.log.Idle() {
		t.Errorf("held %v, idle %v", !*held, w.log.Idle())
	}
	var err error
	w.log.Start(uuid.New(), func(e error) { err = e })
	if !errors.Is(err, intentlog.ErrBusy) {
		t.Errorf("start while a write of the log is under way: %v", err)
	}
	w.sched.Unstick(w.file)
	w.sched.Run()
	if _, now := w.log.Waiting(); now != ended+1 || len(w.failed) > 0 {
		t.Errorf("%d writes of the log, %d before, failed %v", now, ended, w.failed)
	}
	w.start()
}

// TestIdle: a log that is off is in use until the disk has answered it.
func TestIdle(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.sched.Stick(w.orig)
	var taken error
	w.log.Taken(w.cbt.Switch(), func(err error) { taken = err })
	w.sched.Run()
	w.log.GiveUp()
	w.sched.Run()
	if taken != nil || w.log.Idle() {
		t.Errorf("while the disk does not answer: take %v, idle %v", taken, w.log.Idle())
	}
	w.sched.Unstick(w.orig)
	w.sched.Run()
	if !errors.Is(taken, intentlog.ErrOff) || !w.log.Idle() {
		t.Errorf("take %v, idle %v", taken, w.log.Idle())
	}
}

// TestOneWriteForAll: writes that come while the log is written wait for the next write
// of it together.
func TestOneWriteForAll(t *testing.T) {
	w := newWorld(t)
	w.start()
	writes := 0
	w.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		if !op.FUA {
			t.Error("the log is written without FUA")
		}
		writes++
	}
	var ended []*bool
	for z := range int64(20) {
		ended = append(ended, w.begin(z*zone, 512))
	}
	w.sched.Run()
	for i, e := range ended {
		if !*e {
			t.Errorf("write %d waits", i)
		}
	}
	if writes > 2 {
		t.Errorf("%d writes of the log for 20 zones in one sector", writes)
	}
}

func TestCorruptedMap(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.cbt.Mark(size, 512)
	w.sched.Run()
	if len(w.failed) != 1 || !errors.Is(w.failed[0], cbtmap.ErrCorrupted) {
		t.Errorf("told %v", w.failed)
	}
}
