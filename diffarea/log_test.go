package diffarea_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

const chunk = 4 << 10

// bench is a log with one area over a disk in memory, whose chunk c is filled
// with the byte c+1.
type bench struct {
	t      *testing.T
	sched  *blockdevtest.Sched
	faults *blockdevtest.Faults
	w      *diffarea.Worker
	disk   *blockdevtest.Memory
	log    *diffarea.Log
	area   *diffarea.Area
	events []diffarea.Event
	woken  int
	// stores are the offsets and lengths written to a storage, in order.
	stores [][2]int64
}

func newBench(t *testing.T, chunks, slots, portion int64) *bench {
	b := &bench{t: t, sched: blockdevtest.NewSched(0), faults: &blockdevtest.Faults{}}
	b.sched.OnSubmit = func(_ *blockdevtest.SchedQueue, op *blockdev.Op) {
		if op.Kind == blockdev.Write && op.File != blockdev.File(b.disk) {
			b.stores = append(b.stores, [2]int64{op.Off, op.Len})
		}
	}
	b.w = diffarea.NewWorker(blockdevtest.NewFaulty(b.sched.NewQueue("q"), b.faults))
	b.disk = blockdevtest.NewMemoryDevice("disk", chunks*chunk)
	for c := range chunks {
		if _, err := b.disk.WriteAt(bytes.Repeat([]byte{byte(c + 1)}, chunk), c*chunk); err != nil {
			t.Fatal(err)
		}
	}
	pool := make([]byte, slots*chunk)
	var err error
	b.log, err = diffarea.NewLog(diffarea.LogConfig{
		ChunkSize: chunk,
		Pool:      diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)},
		State:     make([]byte, diffarea.LogStateSize),
		Portion:   portion,
		OnEvent:   func(e diffarea.Event) { b.events = append(b.events, e) },
	})
	if err != nil {
		t.Fatal(err)
	}
	b.area = diffarea.NewArea(diffarea.AreaConfig{
		Log: b.log, Orig: b.disk, Size: chunks * chunk, Device: 7,
		Words: make([]byte, diffarea.TableSize(diffarea.Chunk(chunks))),
	})
	return b
}

func (b *bench) append(s diffarea.Storage) error {
	var got error
	called := 0
	b.log.Append(b.w, s, func(err error) { got, called = err, called+1 })
	b.sched.Run()
	if called != 1 {
		b.t.Fatalf("append called back %d times", called)
	}
	return got
}

// protect asks for chunks [from, to) at once and returns how many it has to
// wait for.
func (b *bench) protect(from, to diffarea.Chunk) (waits int) {
	for c := from; c < to; c++ {
		if ok, _ := b.area.Protect(b.w, c, nil, func() { b.woken++ }); !ok {
			waits++
		}
	}
	return waits
}

// holds says that chunk c's old data is where its word points.
func (b *bench) holds(c diffarea.Chunk) bool {
	w := b.area.Load(c)
	if w.State() != diffarea.InMemory && w.State() != diffarea.Stored {
		return false
	}
	f, off := b.area.Locate(w, b.area.Start(c))
	got := make([]byte, chunk)
	if _, err := f.(*blockdevtest.Memory).ReadAt(got, off); err != nil {
		b.t.Fatal(err)
	}
	return bytes.Equal(got, bytes.Repeat([]byte{byte(c + 1)}, chunk))
}

func (b *bench) check() {
	b.t.Helper()
	if err := b.log.Check(); err != nil {
		b.t.Error(err)
	}
}

func TestCopiesLandAndAreStoredInOrder(t *testing.T) {
	b := newBench(t, 64, 16, 1<<20)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	if n := b.protect(0, 64); n != 64 {
		t.Fatalf("%d copies to wait for, want 64", n)
	}
	b.sched.Run()
	if b.woken != 64 {
		t.Fatalf("%d of 64 waiters woken", b.woken)
	}
	for c := range diffarea.Chunk(64) {
		if w := b.area.Load(c); w.State() != diffarea.Stored || !b.holds(c) {
			t.Fatalf("chunk %d: %v, its data is not there", c, w.State())
		}
	}
	next := int64(0)
	for _, s := range b.stores {
		if s[0] != next {
			t.Fatalf("stores %v are not one sequential stretch", b.stores)
		}
		next += s[1]
	}
	if len(b.stores) > 32 {
		t.Errorf("%d stores for 64 neighbouring chunks: they are not gathered", len(b.stores))
	}
	if n := b.protect(0, 64); n != 0 {
		t.Errorf("%d chunks copied a second time", n)
	}
	b.check()
}

// A few regions wait for the copies behind them, to be stored together, unless
// somebody waits for their store.
func TestStoresWaitForCopies(t *testing.T) {
	for _, c := range []struct {
		name string
		wait func(b *bench, t *testing.T)
		want [][2]int64
	}{
		{"nobody waits", func(*bench, *testing.T) {}, nil},
		{"a region is waited for", func(b *bench, t *testing.T) {
			if b.area.AwaitStored(b.w, 2, func() { b.woken++ }) {
				t.Error("chunk 2 is stored")
			}
			b.woken--
		}, [][2]int64{{0, 4 * chunk}}},
		{"a slot is waited for", func(b *bench, _ *testing.T) {
			b.protect(16, 32)
			b.woken -= 15 // one slot is not to be had while chunk 9 is in the way
		}, [][2]int64{{0, 4 * chunk}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, 64, 16, 1<<20)
			if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
				t.Fatal(err)
			}
			b.protect(0, 4)
			var slow *diffarea.Copy
			filled := false
			for slow == nil && b.sched.Step() {
				if b.log.Usage().Regions == 4 {
					b.area.Fill(b.w, 9, func(c *diffarea.Copy) { slow = c }, func() { filled = true })
				}
			}
			b.sched.Run()
			if b.woken != 4 || slow == nil || filled {
				t.Fatalf("%d of 4 woken; the fifth is under way: %v, is over: %v", b.woken, slow != nil, filled)
			}
			c.wait(b, t)
			b.sched.Run()
			if b.woken != 4 || !slices.Equal(b.stores, c.want) {
				t.Fatalf("%d woken, want 4; stores %v, want %v", b.woken, b.stores, c.want)
			}
			mem, _, _ := slow.Slot()
			copy(mem, bytes.Repeat([]byte{10}, chunk))
			slow.Filled(0)
			b.sched.Run()
			if u := b.log.Usage(); !filled || u.Unstored != 0 {
				t.Fatalf("filled: %v, %d regions not stored", filled, u.Unstored)
			}
			b.check()
		})
	}
}

// Stores that become possible together leave in the order of the storage.
func TestFullStoresLeaveInOrder(t *testing.T) {
	b := newBench(t, 1024, 1024, 1<<30)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	var first *diffarea.Copy
	b.area.Fill(b.w, 0, func(c *diffarea.Copy) { first = c }, func() {})
	b.protect(1, 768)
	b.sched.Run()
	if first == nil || len(b.stores) != 0 {
		t.Fatalf("stores %v past a region that is being copied", b.stores)
	}
	mem, _, _ := first.Slot()
	copy(mem, bytes.Repeat([]byte{1}, chunk))
	first.Filled(0)
	b.sched.Run()
	if want := [][2]int64{{0, 1 << 20}, {1 << 20, 1 << 20}, {2 << 20, 1 << 20}}; !slices.Equal(b.stores, want) {
		t.Fatalf("stores %v, want %v", b.stores, want)
	}
	b.check()
}

func TestTwoWritersOfOneChunkShareItsCopy(t *testing.T) {
	b := newBench(t, 4, 4, 1<<20)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	if b.protect(1, 2)+b.protect(1, 2) != 2 {
		t.Fatal("a writer did not wait for the copy under way")
	}
	b.sched.Run()
	if b.woken != 2 || b.log.Usage().Regions != 1 {
		t.Fatalf("%d woken, %d regions, want 2 and 1", b.woken, b.log.Usage().Regions)
	}
	b.check()
}

func TestFollowersShareTheRead(t *testing.T) {
	b := newBench(t, 32, 4, 1<<20)
	big, small := b.other(16*chunk), b.area
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	reads := 0
	old := b.sched.OnSubmit
	b.sched.OnSubmit = func(q *blockdevtest.SchedQueue, op *blockdev.Op) {
		if op.Kind == blockdev.Read && op.File == blockdev.File(b.disk) {
			reads++
		}
		old(q, op)
	}
	wake := func() { b.woken++ }
	_, lead := big.Protect(b.w, 0, nil, wake)
	for c := range diffarea.Chunk(4) {
		small.Protect(b.w, c, lead, wake)
	}
	b.sched.Run()
	if b.woken != 5 {
		t.Fatalf("%d of 5 woken", b.woken)
	}
	for c := range diffarea.Chunk(4) {
		if !b.holds(c) {
			t.Fatalf("chunk %d of the follower is wrong", c)
		}
	}
	if reads != 1 {
		t.Errorf("the original was read %d times, want once", reads)
	}
	b.check()
}

// other is an area over the same disk with a log of its own.
func (b *bench) other(size int64) *diffarea.Area {
	pool := make([]byte, 4*size)
	l, err := diffarea.NewLog(diffarea.LogConfig{
		ChunkSize: size,
		Pool:      diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool2", pool)},
		State:     make([]byte, diffarea.LogStateSize),
		Portion:   1 << 20,
		OnEvent:   func(diffarea.Event) {},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	l.Expect(b.w, b.area.Size())
	l.Append(b.w, diffarea.Storage{File: blockdevtest.NewMemoryFile("f2", 1<<30)}, func(err error) {
		if err != nil {
			b.t.Error(err)
		}
	})
	b.sched.Run()
	n := diffarea.Chunks(b.area.Size(), size)
	return diffarea.NewArea(diffarea.AreaConfig{Log: l, Orig: b.disk, Size: b.area.Size(), Words: make([]byte, diffarea.TableSize(n))})
}

func TestStorageGrowsInPortionsUpToItsLimit(t *testing.T) {
	b := newBench(t, 200, 8, 16*chunk)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30), Size: 40*chunk + 100}); err != nil {
		t.Fatal(err)
	}
	if got := b.log.Usage().Capacity; got != 16 {
		t.Fatalf("first portion of %d chunks, want 16", got)
	}
	b.protect(0, 40)
	b.sched.Run()
	if b.woken != 40 || b.log.Err() != 0 {
		t.Fatalf("%d woken, %v: the limit came early", b.woken, b.log.Err())
	}
	if len(b.events) != 1 || b.events[0].Kind != diffarea.LowFreeSpace {
		t.Fatalf("events %v, want one low_free_space", b.events)
	}
	b.protect(40, 41)
	b.sched.Run()
	want := []diffarea.Event{b.events[0], {Kind: diffarea.NoSpace}, {Kind: diffarea.Corrupted, Errno: unix.ENOSPC, Device: 7}}
	if len(b.events) != 3 || b.events[1] != want[1] || b.events[2] != want[2] {
		t.Fatalf("events %v, want %v", b.events, want)
	}
	if b.woken != 41 || !b.area.Protected(41) {
		t.Error("a write waits for a copy that never comes")
	}
	b.check()
}

// What is allocated, and asked for, follows what the disk can need and what the
// storage can hold, however large a portion may be.
func TestPortionsAndWarningsFollowDiskAndStorage(t *testing.T) {
	b := newBench(t, 24, 8, 1<<30)
	low := func(when string, used diffarea.Chunk, want ...int64) {
		t.Helper()
		b.protect(0, used)
		b.sched.Run()
		var got []int64
		for _, e := range b.events {
			if e.Kind != diffarea.LowFreeSpace {
				t.Fatalf("%s: event %v", when, e)
			}
			got = append(got, e.Sectors*sector.Size/chunk)
		}
		b.events = nil
		if !slices.Equal(got, want) {
			t.Errorf("%s: chunks asked for %v, want %v", when, got, want)
		}
	}
	capacity := func(when string, want int64) {
		t.Helper()
		if got := b.log.Usage().Capacity; got != want {
			t.Errorf("%s: storage for %d chunks, want %d", when, got, want)
		}
	}
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30), Size: 10 * chunk}); err != nil {
		t.Fatal(err)
	}
	capacity("with a limit", 10)
	low("with storage for 10", 7)
	low("with four fifths used", 8, 14)
	low("after that", 9)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryDevice("d", 8*chunk), Size: 8 * chunk, Fixed: true}); err != nil {
		t.Fatal(err)
	}
	low("with storage for 18", 14)
	low("with four fifths of that used", 15, 6)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("g", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	capacity("without a limit", 24)
	low("with storage for the whole disk", 24)
	capacity("at the end", 24)
	b.check()
}

// Storage that comes before the disk is known grows when it is.
func TestStorageBeforeTheDisk(t *testing.T) {
	b := newBench(t, 0, 8, 128*chunk)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int64{1, 33, 161} { // all of the first disk, a portion for the second
		if got := b.log.Usage().Capacity; got != want {
			t.Errorf("storage for %d chunks, want %d", got, want)
		}
		b.log.Expect(b.w, map[int64]int64{1: 33, 33: 1000}[want]*chunk-100)
		b.sched.Run()
	}
	b.check()
}

func TestStorageAppendedInTimeAvoidsTheOverflow(t *testing.T) {
	b := newBench(t, 64, 8, 8*chunk)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryDevice("d", 20*chunk), Size: 20 * chunk, Fixed: true}); err != nil {
		t.Fatal(err)
	}
	b.protect(0, 18)
	b.sched.Run()
	if len(b.events) != 1 || b.events[0].Kind != diffarea.LowFreeSpace {
		t.Fatalf("events %v, want low_free_space", b.events)
	}
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	b.protect(18, 64)
	b.sched.Run()
	if b.woken != 64 || b.log.Err() != 0 {
		t.Fatalf("%d of 64 woken, %v", b.woken, b.log.Err())
	}
	for c := range diffarea.Chunk(64) {
		if !b.holds(c) {
			t.Fatalf("chunk %d is wrong across the border of two storages", c)
		}
	}
	b.check()
}

func TestFullFilesystemGivesItsLastChunk(t *testing.T) {
	b := newBench(t, 64, 8, 16*chunk)
	// 21 chunks: a portion of 16, then what is left of a full filesystem.
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 21*chunk)}); err != nil {
		t.Fatal(err)
	}
	b.protect(0, 21)
	b.sched.Run()
	if b.log.Err() != 0 {
		t.Fatalf("broke with %v before the filesystem was full", b.log.Err())
	}
	b.protect(21, 22)
	b.sched.Run()
	if b.log.Err() != unix.ENOSPC || b.woken != 22 {
		t.Fatalf("%v, %d woken; want ENOSPC and 22", b.log.Err(), b.woken)
	}
	b.check()
}

// A quota that is used up is as a filesystem that is full.
func TestQuotaGivesItsLastChunk(t *testing.T) {
	b := newBench(t, 8, 4, 16*chunk)
	b.faults.Add(blockdevtest.Fault{
		Kinds: []blockdev.Kind{blockdev.Allocate}, Err: unix.EDQUOT,
		Fits: func(op *blockdev.Op) bool { return op.Off+op.Len > 5*chunk },
	})
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 64*chunk)}); err != nil {
		t.Fatal(err)
	}
	b.protect(0, 5)
	b.sched.Run()
	if b.log.Err() != 0 {
		t.Fatalf("broke with %v before the quota was used up", b.log.Err())
	}
	b.check()
}

func TestAppendFailure(t *testing.T) {
	b := newBench(t, 8, 4, 16*chunk)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", chunk/2)}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("append of a full filesystem: %v, want ENOSPC", err)
	}
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryDevice("d", 512), Size: 512, Fixed: true}); err == nil {
		t.Error("storage smaller than a chunk was taken")
	}
	if got := b.log.Usage().Capacity; got != 0 {
		t.Errorf("capacity %d of storages that failed", got)
	}
}

func TestStoreErrorBreaksTheLogOnly(t *testing.T) {
	b := newBench(t, 64, 4, 1<<20)
	f := blockdevtest.NewMemoryFile("f", 1<<30)
	if err := b.append(diffarea.Storage{File: f}); err != nil {
		t.Fatal(err)
	}
	b.faults.Add(blockdevtest.Fault{Kinds: []blockdev.Kind{blockdev.Write}, File: f, After: 2, Err: unix.EIO})
	b.protect(0, 64)
	b.sched.Run()
	if b.log.Err() != unix.EIO || b.woken != 64 {
		t.Fatalf("%v, %d of 64 woken; want EIO and all", b.log.Err(), b.woken)
	}
	closed := false
	b.log.Close(b.w, func() { closed = true })
	b.sched.Run()
	if !closed {
		t.Error("a broken log does not close")
	}
	b.check()
}

func TestCopyErrorBreaksTheLogOnly(t *testing.T) {
	b := newBench(t, 8, 4, 1<<20)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	b.faults.Add(blockdevtest.Fault{Kinds: []blockdev.Kind{blockdev.Read}, File: b.disk, Off: 3 * chunk, Len: 1, Err: unix.EIO})
	b.protect(0, 8)
	b.sched.Run()
	if b.woken != 8 || b.log.Err() != unix.EIO || b.area.Load(3).State() != diffarea.Failed {
		t.Fatalf("%d woken, %v, chunk 3 %v; want 8, EIO, FAILED", b.woken, b.log.Err(), b.area.Load(3).State())
	}
	b.check()
}

func TestCloseUnderWay(t *testing.T) {
	b := newBench(t, 64, 2, 1<<20)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	b.protect(0, 64)
	closed := 0
	b.log.Close(b.w, func() { closed++ })
	if closed != 0 {
		t.Fatal("closed with copies under way")
	}
	b.sched.Run()
	if closed != 1 || b.woken != 64 || len(b.events) != 0 {
		t.Fatalf("closed %d times, %d of 64 woken, events %v", closed, b.woken, b.events)
	}
}

// A snapshot can be given up while its storage hangs: who waits for room in the
// pool goes on at once.
func TestAbortWithStuckStorage(t *testing.T) {
	t.Run("abort", func(t *testing.T) { testStuckStorage(t, (*diffarea.Log).Abort) })
	t.Run("give up", func(t *testing.T) {
		testStuckStorage(t, func(l *diffarea.Log, w *diffarea.Worker) { l.Break(w, unix.ETIMEDOUT) },
			diffarea.Event{Kind: diffarea.Corrupted, Device: 7, Errno: unix.ETIMEDOUT})
	})
}

func testStuckStorage(t *testing.T, end func(*diffarea.Log, *diffarea.Worker), want ...diffarea.Event) {
	b := newBench(t, 64, 4, 1<<20)
	f := blockdevtest.NewMemoryFile("f", 1<<30)
	if err := b.append(diffarea.Storage{File: f}); err != nil {
		t.Fatal(err)
	}
	b.sched.Stick(f)
	b.protect(0, 64)
	stored := 0
	if b.area.AwaitStored(b.w, 0, func() { stored++ }) {
		stored++ // not even in memory yet
	}
	b.sched.Run()
	if waits, _ := b.log.Waiting(); b.woken == 64 || !waits {
		t.Fatalf("%d of 64 woken; somebody waits: %v", b.woken, waits)
	}
	end(b.log, b.w)
	b.sched.Run()
	if b.woken != 64 || stored != 1 || !slices.Equal(b.events, want) {
		t.Fatalf("%d of 64 woken, %d waits for the storage ended, events %v", b.woken, stored, b.events)
	}
	if waits, _ := b.log.Waiting(); waits {
		t.Fatal("somebody still waits")
	}
	end(b.log, b.w) // once is enough
	if !slices.Equal(b.events, want) {
		t.Fatalf("events %v", b.events)
	}
	closed := 0
	b.log.Close(b.w, func() { closed++ })
	b.sched.Run()
	if closed != 0 {
		t.Fatal("closed with a store under way")
	}
	b.sched.Unstick(f)
	b.sched.Run()
	if closed != 1 {
		t.Fatalf("closed %d times", closed)
	}
}

// Who waits for the room that reads of its own disk take does not wait for
// another: the end of the snapshot would not help.
func TestWaitingForOthers(t *testing.T) {
	b := newBench(t, 16, 4, 1<<20)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}); err != nil {
		t.Fatal(err)
	}
	disk := blockdevtest.NewMemoryDevice("other", 16*chunk)
	other := diffarea.NewArea(diffarea.AreaConfig{
		Log: b.log, Orig: disk, Size: 16 * chunk, Device: 8, Words: make([]byte, diffarea.TableSize(16)),
	})
	b.sched.Stick(b.disk)
	b.protect(0, 8)
	b.sched.Run()
	if waits, _ := b.log.Waiting(); waits || b.woken != 0 {
		t.Fatalf("waits %v, %d woken; want to wait for the own disk alone", waits, b.woken)
	}
	if names := b.log.UnderWay(); !slices.Equal(names, []string{"disk"}) {
		t.Fatalf("under way: %v", names)
	}
	woken := 0
	if ok, _ := other.Protect(b.w, 0, nil, func() { woken++ }); ok {
		t.Fatal("protected for no reason")
	}
	b.sched.Run()
	if waits, _ := b.log.Waiting(); !waits || woken != 0 {
		t.Fatalf("waits %v, %d woken; want the other device to wait for this one's disk", waits, woken)
	}
	b.log.Break(b.w, unix.ETIMEDOUT)
	b.sched.Run()
	if want := (diffarea.Event{Kind: diffarea.Corrupted, Device: 8, Errno: unix.ETIMEDOUT}); woken != 1 || len(b.events) != 1 || b.events[0] != want {
		t.Fatalf("%d woken, events %v", woken, b.events)
	}
	b.sched.Unstick(b.disk)
	b.sched.Run()
	if b.woken != 8 {
		t.Fatalf("%d of 8 woken", b.woken)
	}
	if names := b.log.UnderWay(); names != nil {
		t.Fatalf("under way after all: %v", names)
	}
}

// A storage that hangs is named, whether it is written or grows.
func TestUnderWay(t *testing.T) {
	b := newBench(t, 16, 4, 1<<20)
	store := blockdevtest.NewMemoryFile("f", 1<<30)
	if err := b.append(diffarea.Storage{File: store}); err != nil {
		t.Fatal(err)
	}
	b.sched.Stick(store)
	b.protect(0, 2)
	b.sched.Run()
	if names := b.log.UnderWay(); !slices.Equal(names, []string{"f"}) {
		t.Fatalf("under way: %v", names)
	}
	b.sched.Unstick(store)
	b.sched.Run()
	more := blockdevtest.NewMemoryFile("more", 1<<30)
	b.sched.Stick(more)
	b.log.Append(b.w, diffarea.Storage{File: more}, func(error) {})
	b.sched.Run()
	if names := b.log.UnderWay(); !slices.Equal(names, []string{"more"}) {
		t.Fatalf("under way: %v", names)
	}
}

// TestTakeOver kills the process, as far as a log is concerned, with copies in
// every state, and takes over from its memory.
func TestTakeOver(t *testing.T) {
	for steps := range 60 {
		disk := blockdevtest.NewMemoryDevice("disk", 32*chunk)
		for c := range int64(32) {
			if _, err := disk.WriteAt(bytes.Repeat([]byte{byte(c + 1)}, chunk), c*chunk); err != nil {
				t.Fatal(err)
			}
		}
		pool, state := make([]byte, 8*chunk), make([]byte, diffarea.LogStateSize)
		words := make([]byte, diffarea.TableSize(32))
		store := blockdevtest.NewMemoryFile("f", 1<<30)
		cfg := diffarea.LogConfig{
			ChunkSize: chunk, Pool: diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)},
			State: state, Portion: 64 * chunk, OnEvent: func(diffarea.Event) {},
		}
		area := diffarea.AreaConfig{Orig: disk, Size: 32 * chunk, Words: words}
		s := blockdevtest.NewSched(uint64(steps + 1))
		q := s.NewQueue("first")
		w := diffarea.NewWorker(q)
		l, err := diffarea.NewLog(cfg)
		if err != nil {
			t.Fatal(err)
		}
		l.Append(w, diffarea.Storage{File: store}, func(error) {})
		s.Run()
		area.Log = l
		a := diffarea.NewArea(area)
		for c := range diffarea.Chunk(24) {
			a.Protect(w, c, nil, func() {})
		}
		for range steps {
			s.Step()
		}
		landed := map[diffarea.Chunk]bool{}
		for c := range diffarea.Chunk(32) {
			landed[c] = a.Load(c) != 0
		}
		s.Kill(q)
		s.Settle(func(*blockdevtest.Memory) bool { return true })

		q = s.NewQueue("second")
		w = diffarea.NewWorker(q)
		b := &bench{t: t, sched: s, w: w, disk: disk}
		if b.log, err = diffarea.OpenLog(cfg, []diffarea.Storage{{File: store}}); err != nil {
			t.Fatalf("after %d steps: %v", steps, err)
		}
		area.Log = b.log
		if b.area, err = diffarea.OpenArea(area, nil); err != nil {
			t.Fatalf("after %d steps: %v", steps, err)
		}
		b.log.Resume(w)
		for c := range diffarea.Chunk(32) {
			if landed[c] != (b.area.Load(c) != 0) {
				t.Fatalf("after %d steps: chunk %d: copied %v before the death, %v after", steps, c, landed[c], !landed[c])
			}
		}
		b.protect(0, 32)
		s.Run()
		for c := range diffarea.Chunk(32) {
			if b.area.Load(c).State() != diffarea.Stored || !b.holds(c) {
				t.Fatalf("after %d steps: chunk %d is %v and wrong", steps, c, b.area.Load(c).State())
			}
		}
		b.check()
	}
}

func TestOpenLogRefusesForeignState(t *testing.T) {
	good := func() (diffarea.LogConfig, []byte) {
		b := newBench(t, 8, 4, 1<<20)
		_ = b
		state := make([]byte, diffarea.LogStateSize)
		pool := make([]byte, 4*chunk)
		c := diffarea.LogConfig{ChunkSize: chunk, Pool: diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("p", pool)}, State: state, Portion: 1 << 20}
		if _, err := diffarea.NewLog(c); err != nil {
			t.Fatal(err)
		}
		return c, state
	}
	c, _ := good()
	if _, err := diffarea.OpenLog(c, nil); err != nil {
		t.Fatalf("its own state: %v", err)
	}
	for at := 0; at < 48; at += 8 {
		if at == 24 {
			continue // the errno may be anything
		}
		c, state := good()
		state[at] ^= 0x55
		if _, err := diffarea.OpenLog(c, nil); !errors.Is(err, diffarea.ErrState) {
			t.Errorf("state with byte %d changed: %v, want ErrState", at, err)
		}
	}
}

func TestNoAllocationPerCopy(t *testing.T) {
	const chunks = 3000
	b := newBench(t, chunks, 64, 64<<20)
	b.sched.OnSubmit = nil
	q := &instant{}
	w := diffarea.NewWorker(q)
	b.log.Append(w, diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30)}, func(error) {})
	q.run()
	wake := func() { b.woken++ }
	c := diffarea.Chunk(0)
	copyTen := func() {
		for range 10 {
			b.area.Protect(w, c, nil, wake)
			c++
		}
		q.run()
	}
	for range 20 {
		copyTen()
	}
	if n := testing.AllocsPerRun(200, copyTen); n != 0 {
		t.Errorf("%v allocations for ten copies and their stores", n)
	}
	if b.woken != int(c) {
		t.Fatalf("%d of %d copies landed", b.woken, c)
	}
}

// instant is a queue that does nothing, successfully, and allocates nothing.
type instant struct {
	ops   []*blockdev.Op
	tasks []*blockdev.Task
}

func (q *instant) Submit(op *blockdev.Op) { op.Err = 0; q.ops = append(q.ops, op) }
func (q *instant) Post(t *blockdev.Task)  { q.tasks = append(q.tasks, t) }
func (q *instant) run() {
	for len(q.ops)+len(q.tasks) > 0 {
		for i := 0; i < len(q.tasks); i++ {
			q.tasks[i].Run()
		}
		q.tasks = q.tasks[:0]
		for i := 0; i < len(q.ops); i++ {
			q.ops[i].Done(q.ops[i])
		}
		q.ops = q.ops[:0]
	}
}
