package blockdevtest

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// trace runs overlapping writes and tasks on two queues and tells the order of
// everything that happened, and what the disk holds at the end.
func trace(seed uint64) string {
	var b strings.Builder
	s := NewSched(seed)
	m := NewMemoryDevice("disk", 64*sector.Size)
	qs := []*SchedQueue{s.NewQueue("a"), s.NewQueue("b")}
	for i := 0; i < 8; i++ {
		q := qs[i%2]
		w := write(m, 0, sectors(byte(i+1), 8))
		w.Done = func(*blockdev.Op) { fmt.Fprintf(&b, "w%d ", i) }
		q.Submit(w)
		q.Post(&blockdev.Task{Run: func() { fmt.Fprintf(&b, "%s%d ", q.Name(), i) }})
	}
	s.Run()
	p := make([]byte, 8*sector.Size)
	m.ReadAt(p, 0)
	for i := 0; i < 8; i++ {
		fmt.Fprintf(&b, "%d", p[i*sector.Size])
	}
	return b.String()
}

func TestSchedRepeats(t *testing.T) {
	seen := make(map[string]bool)
	last := make(map[byte]bool)
	torn := false
	for seed := uint64(1); seed <= 50; seed++ {
		a := trace(seed)
		if b := trace(seed); a != b {
			t.Fatalf("seed %d: %q, then %q", seed, a, b)
		}
		seen[a] = true
		end := a[len(a)-8:]
		last[end[0]] = true
		torn = torn || end != strings.Repeat(end[:1], 8)
		for _, q := range []string{"a", "b"} {
			var order []string
			for _, f := range strings.Fields(a) {
				if strings.HasPrefix(f, q) {
					order = append(order, f)
				}
			}
			if len(order) != 4 || !slices.IsSorted(order) {
				t.Fatalf("seed %d: tasks of %s ran as %v", seed, q, order)
			}
		}
	}
	if len(seen) < 45 || len(last) < 6 || !torn {
		t.Errorf("little variety: %d orders, %d last writers, torn %v", len(seen), len(last), torn)
	}
	if got, want := trace(0), "a0 b1 a2 b3 a4 b5 a6 b7 w0 w1 w2 w3 w4 w5 w6 w7 88888888"; got != want {
		t.Errorf("in order: %q", got)
	}
}

func TestSchedKill(t *testing.T) {
	whole, part, never, late := 0, 0, 0, 0
	for seed := uint64(1); seed <= 100; seed++ {
		s := NewSched(seed)
		m := NewMemoryDevice("disk", 8*sector.Size)
		old, other := s.NewQueue("old"), s.NewQueue("other")
		w := write(m, 0, sectors(1, 8))
		w.Done = func(*blockdev.Op) { t.Error("a completion on a killed queue") }
		old.Submit(w)
		old.Post(&blockdev.Task{Run: func() { t.Error("a task on a killed queue") }})
		s.Kill(old)
		if s.InFlight() != 0 {
			t.Fatal("an orphan counts as in flight")
		}
		landedLate := false
		s.OnEffect = func(q *SchedQueue, op *blockdev.Op, off, n int64) { landedLate = landedLate || q == old && off+n > 0 }
		survivor := false
		other.Post(&blockdev.Task{Run: func() {
			survivor = true
			if !landedLate {
				late++
			}
		}})
		s.Run()
		if !survivor {
			t.Fatal("the other queue was killed too")
		}
		p := content(t, m, 0, 8*sector.Size)
		switch n := strings.Count(string(p), "\x01"); n {
		case 0:
			never++
		case len(p):
			whole++
		default:
			part++
		}
	}
	if whole == 0 || part == 0 || never == 0 || late == 0 {
		t.Errorf("whole %d, part %d, never %d, late %d", whole, part, never, late)
	}
}

func TestSchedSettle(t *testing.T) {
	for seed := uint64(1); seed <= 50; seed++ {
		s := NewSched(seed)
		m, other := NewMemoryDevice("disk", 8*sector.Size), NewMemoryDevice("other", 8*sector.Size)
		old := s.NewQueue("old")
		for _, f := range []*Memory{m, other} {
			w := write(f, 0, sectors(1, 8))
			w.Done = func(*blockdev.Op) {}
			old.Submit(w)
		}
		s.Kill(old)
		s.Settle(func(f *Memory) bool { return f == m })
		s.OnEffect = func(_ *SchedQueue, op *blockdev.Op, _, _ int64) {
			if op.File == m {
				t.Fatalf("seed %d: an effect on a settled file", seed)
			}
		}
		s.Run()
	}
}

// TestSchedKilledDurable: a flush of the next process covers what the killed one wrote, at
// whatever moment that one died.
func TestSchedKilledDurable(t *testing.T) {
	for seed := uint64(1); seed <= 400; seed++ {
		s := NewSched(seed)
		m := NewMemoryDevice("disk", 8*sector.Size)
		m.LoseUnsynced()
		old, fresh := s.NewQueue("old"), s.NewQueue("fresh")
		w := write(m, 0, sectors(1, 8))
		w.Done = func(*blockdev.Op) {}
		old.Submit(w)
		for n := seed % 4; n > 0 && s.Step(); n-- {
		}
		s.Kill(old)
		if seed/4%2 == 0 {
			s.Run()
		}
		s.Settle(nil)
		now := content(t, m, 0, 8*sector.Size)
		do(t, fresh, &blockdev.Op{Kind: blockdev.Flush, File: m})
		s.PowerFail(m)
		if !bytes.Equal(content(t, m, 0, 8*sector.Size), now) {
			t.Fatalf("seed %d: a power failure takes back what was there at the flush", seed)
		}
	}
}

func TestSchedStick(t *testing.T) {
	s := NewSched(1)
	q := s.NewQueue("q")
	m := NewMemoryDevice("disk", 8*sector.Size)
	done := false
	w := write(m, 0, sectors(1, 1))
	w.Done = func(*blockdev.Op) { done = true }
	s.Stick(m)
	q.Submit(w)
	s.Run()
	if done {
		t.Fatal("a stuck disk completed a write")
	}
	s.Unstick(m)
	s.Run()
	if !done || content(t, m, 0, 1)[0] != 1 {
		t.Fatal("the disk stayed stuck")
	}
}

func TestSchedPause(t *testing.T) {
	s := NewSched(3)
	q, other := s.NewQueue("q"), s.NewQueue("other")
	q.Pause(12)
	var order []string
	for i := 0; i < 3; i++ {
		q.Post(&blockdev.Task{Run: func() { order = append(order, fmt.Sprint("q", i)) }})
	}
	other.Post(&blockdev.Task{Run: func() { order = append(order, "other") }})
	s.Run()
	if got := strings.Join(order, " "); got != "other q0 q1 q2" {
		t.Error(got)
	}
}

func TestSchedKeepsTheContract(t *testing.T) {
	panics := func(name string, f func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s: accepted", name)
			}
		}()
		f()
	}
	q := NewMemoryQueue()
	m := NewMemoryDevice("disk", 8*sector.Size)
	panics("submitted twice", func() {
		w := write(m, 0, sectors(1, 1))
		w.Done = func(*blockdev.Op) {}
		q.Submit(w)
		q.Submit(w)
	})
	panics("submitted from another thread", func() {
		other := q.Sched().NewQueue("other")
		other.Post(&blockdev.Task{Run: func() { q.Submit(write(m, 0, sectors(1, 1))) }})
		q.Run()
	})
	q = NewMemoryQueue()
	panics("changed in flight", func() {
		w := write(m, 0, sectors(1, 1))
		w.Done = func(*blockdev.Op) {}
		q.Submit(w)
		w.Off = sector.Size
		q.Run()
	})
}
