package diffarea_test

import (
	"errors"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// pinQueue is a queue with few places for buffers. An operation that names a
// place goes on with the memory alone.
type pinQueue struct {
	blockdev.Queue
	places []*byte
	used   map[int32]int // operations by place
}

func (q *pinQueue) Pin(mem []byte) (int32, error) {
	for i, p := range q.places {
		if p == nil {
			q.places[i] = &mem[0]
			return int32(i), nil
		}
	}
	return blockdev.NoIndex, errors.New("full")
}

func (q *pinQueue) Unpin(index int32) { q.places[index] = nil }

func (q *pinQueue) Submit(op *blockdev.Op) {
	q.used[op.Buf.Index]++
	op.Buf.Index = blockdev.NoIndex
	q.Queue.Submit(op)
}

// Copies and stores go through the pools that are pinned, those of the areas
// in use and no others; without a place they go all the same.
func TestUsePins(t *testing.T) {
	b, other := newBench(t, 8, 8, 8*chunk), newBench(t, 8, 8, 8*chunk)
	q := &pinQueue{Queue: b.sched.NewQueue("pins"), places: make([]*byte, 1), used: map[int32]int{}}
	b.w = diffarea.NewWorker(q)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryDevice("storage", 8*chunk), Size: 8 * chunk, Fixed: true}); err != nil {
		t.Fatal(err)
	}
	use := func(places int, areas ...*diffarea.Area) {
		t.Helper()
		b.w.Use(areas)
		b.sched.Run()
		n := 0
		for _, p := range q.places {
			if p != nil {
				n++
			}
		}
		if n != places {
			t.Fatalf("%d pools are pinned, want %d", n, places)
		}
	}
	copied := func(c diffarea.Chunk, index int32) {
		t.Helper()
		clear(q.used)
		b.protect(c, c+1)
		b.sched.Run()
		if b.area.Load(c).State() != diffarea.Stored || q.used[index] != 2 || len(q.used) != 1 {
			t.Fatalf("chunk %d is %v, operations by place: %v, want 2 at %d", c, b.area.Load(c).State(), q.used, index)
		}
	}
	use(1, b.area, other.area) // there is room for one
	copied(0, 0)
	use(1, other.area)
	copied(1, blockdev.NoIndex)
	use(1, b.area)
	copied(2, 0)
	use(0)
	copied(3, blockdev.NoIndex)
	for c := range diffarea.Chunk(4) {
		if !b.holds(c) {
			t.Errorf("chunk %d is lost", c)
		}
	}
}

// A queue that takes over areas pins their pools before it serves anything.
func TestUseFromStart(t *testing.T) {
	b := newBench(t, 8, 8, 8*chunk)
	q := &pinQueue{Queue: b.sched.NewQueue("pins"), places: make([]*byte, 1)}
	w := diffarea.NewWorker(q)
	w.UseFromStart(nil)
	w.UseFromStart([]*diffarea.Area{b.area})
	if q.places[0] != nil {
		t.Error("pinned on another thread")
	}
	b.sched.Run()
	if q.places[0] == nil {
		t.Error("not pinned")
	}
}
