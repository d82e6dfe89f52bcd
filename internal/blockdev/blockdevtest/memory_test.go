package blockdevtest

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// do submits one operation and runs it to its end.
func do(t *testing.T, q *SchedQueue, op *blockdev.Op) unix.Errno {
	t.Helper()
	done := 0
	op.Done = func(*blockdev.Op) { done++ }
	q.Submit(op)
	if done != 0 {
		t.Fatal("done inside submit")
	}
	q.Run()
	if done != 1 {
		t.Fatalf("done %d times", done)
	}
	return op.Err
}

func sectors(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*sector.Size) }

func write(f blockdev.File, off int64, p []byte) *blockdev.Op {
	return &blockdev.Op{Kind: blockdev.Write, File: f, Off: off, Len: int64(len(p)), Buf: blockdev.MemBuf(p)}
}

func content(t *testing.T, m *Memory, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := m.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMemoryDevice(t *testing.T) {
	q := NewMemoryQueue()
	m := NewMemoryDevice("disk", 1<<40)
	p := append(sectors(1, 9), sectors(2, 9)...)
	at := int64(1<<40 - 18*sector.Size)
	if e := do(t, q, write(m, at, p)); e != 0 {
		t.Fatal(e)
	}
	got := make([]byte, len(p))
	if e := do(t, q, &blockdev.Op{Kind: blockdev.Read, File: m, Off: at, Len: int64(len(p)), Buf: blockdev.MemBuf(got)}); e != 0 || !bytes.Equal(got, p) {
		t.Fatalf("read back: %v, equal %v", e, bytes.Equal(got, p))
	}
	if e := do(t, q, &blockdev.Op{Kind: blockdev.WriteZeroes, File: m, Off: at + sector.Size, Len: 16 * sector.Size}); e != 0 {
		t.Fatal(e)
	}
	want := append(append(sectors(1, 1), sectors(0, 16)...), sectors(2, 1)...)
	if got := content(t, m, at, int64(len(p))); !bytes.Equal(got, want) {
		t.Fatal("zeroes did not fall where they should")
	}
	if n := len(m.pages); n > 4 {
		t.Errorf("%d pages for 18 sectors", n)
	}
	for _, c := range []struct {
		name string
		op   *blockdev.Op
		want unix.Errno
	}{
		{"read beyond", &blockdev.Op{Kind: blockdev.Read, File: m, Off: 1 << 40, Len: sector.Size, Buf: blockdev.MemBuf(got)}, unix.EIO},
		{"write beyond", write(m, 1<<40-sector.Size, sectors(3, 2)), unix.ENOSPC},
		{"unaligned", write(m, 7, sectors(3, 1)), unix.EINVAL},
		{"empty", &blockdev.Op{Kind: blockdev.Read, File: m}, unix.EINVAL},
		{"allocate", &blockdev.Op{Kind: blockdev.Allocate, File: m, Len: sector.Size}, unix.EOPNOTSUPP},
	} {
		if e := do(t, q, c.op); e != c.want {
			t.Errorf("%s: %v, want %v", c.name, e, c.want)
		}
	}
	if got := content(t, m, 1<<40-sector.Size, sector.Size); !bytes.Equal(got, sectors(2, 1)) {
		t.Error("a refused write left something behind")
	}
}

func TestMemoryFile(t *testing.T) {
	q := NewMemoryQueue()
	m := NewMemoryFile("file", 8*sector.Size)
	if e := do(t, q, &blockdev.Op{Kind: blockdev.Allocate, File: m, Len: 4 * sector.Size}); e != 0 || m.Size() != 4*sector.Size {
		t.Fatalf("allocate: %v, size %d", e, m.Size())
	}
	if e := do(t, q, &blockdev.Op{Kind: blockdev.Allocate, File: m, Off: 4 * sector.Size, Len: 5 * sector.Size}); e != unix.ENOSPC {
		t.Fatalf("allocate past the limit: %v", e)
	}
	if e := do(t, q, write(m, 7*sector.Size, sectors(7, 1))); e != 0 || m.Size() != 8*sector.Size {
		t.Fatalf("write that grows: %v, size %d", e, m.Size())
	}
	if e := do(t, q, &blockdev.Op{Kind: blockdev.Discard, File: m, Off: 7 * sector.Size, Len: sector.Size}); e != 0 {
		t.Fatal(e)
	}
	if !bytes.Equal(content(t, m, 0, 8*sector.Size), sectors(0, 8)) {
		t.Error("a hole does not read as zeroes")
	}
	cut := write(m, 7*sector.Size, sectors(7, 1))
	cut.MinSize = 8 * sector.Size
	m.Resize(4 * sector.Size)
	if e := do(t, q, cut); e != unix.EIO || m.Size() != 4*sector.Size {
		t.Errorf("write that would make a file grow again: %v, size %d", e, m.Size())
	}
	m.Resize(8 * sector.Size)
	m.SetLimit(16 * sector.Size)
	if e := do(t, q, &blockdev.Op{Kind: blockdev.Allocate, File: m, Off: 8 * sector.Size, Len: 8 * sector.Size}); e != 0 {
		t.Errorf("allocate below the raised limit: %v", e)
	}
}

func TestMemoryDiscard(t *testing.T) {
	for effect, want := range map[DiscardEffect]byte{DiscardZero: 0, DiscardKeep: 5, DiscardJunk: JunkByte} {
		q := NewMemoryQueue()
		m := NewMemoryDevice("disk", 4*sector.Size)
		m.SetDiscards(effect)
		do(t, q, write(m, 0, sectors(5, 4)))
		if e := do(t, q, &blockdev.Op{Kind: blockdev.Discard, File: m, Off: sector.Size, Len: sector.Size}); e != 0 {
			t.Fatal(e)
		}
		if got := content(t, m, 0, 4*sector.Size); got[sector.Size] != want || got[0] != 5 || got[2*sector.Size] != 5 {
			t.Errorf("effect %d: %#x, want %#x", effect, got[sector.Size], want)
		}
	}
}

func TestMapMemory(t *testing.T) {
	q := NewMemoryQueue()
	mem := make([]byte, 100)
	m := MapMemory("pool", mem)
	if e := do(t, q, write(m, 3, []byte("abc"))); e != 0 || string(mem[3:6]) != "abc" {
		t.Fatalf("%v %q", e, mem[:8])
	}
	copy(mem[10:], "xyz")
	if got := content(t, m, 10, 3); string(got) != "xyz" {
		t.Fatalf("%q", got)
	}
}

func TestMemoryClone(t *testing.T) {
	m := NewMemoryDevice("disk", 16*sector.Size)
	m.WriteAt(sectors(1, 16), 0)
	c := m.Clone()
	m.WriteAt(sectors(2, 2), 0)
	c.WriteAt(sectors(3, 2), 8*sector.Size)
	for _, x := range []struct {
		m    *Memory
		off  int64
		want byte
	}{{m, 0, 2}, {m, 8, 1}, {c, 0, 1}, {c, 8, 3}} {
		if got := content(t, x.m, x.off*sector.Size, sector.Size); got[0] != x.want {
			t.Errorf("sector %d: %d, want %d", x.off, got[0], x.want)
		}
	}
}

// outcomes is the set of contents of sector 0 after power failures of the disk
// that prepare left, over many choices.
func outcomes(t *testing.T, prepare func(q *SchedQueue, m *Memory)) map[byte]bool {
	t.Helper()
	seen := make(map[byte]bool)
	for seed := uint64(1); seed < 60; seed++ {
		s := NewSched(seed)
		q := s.NewQueue("q")
		m := NewMemoryDevice("disk", 4*sector.Size)
		m.WriteAt(sectors(9, 4), 0)
		m.LoseUnsynced()
		prepare(q, m)
		s.PowerFail(m)
		seen[content(t, m, 0, sector.Size)[0]] = true
	}
	return seen
}

func TestPowerFail(t *testing.T) {
	flush := func(m *Memory) *blockdev.Op { return &blockdev.Op{Kind: blockdev.Flush, File: m} }
	none := func(*blockdev.Op) {}
	for _, c := range []struct {
		name    string
		prepare func(q *SchedQueue, m *Memory)
		want    []byte
	}{
		{"unsynced", func(q *SchedQueue, m *Memory) {
			do(t, q, write(m, 0, sectors(1, 1)))
			do(t, q, write(m, 0, sectors(2, 1)))
		}, []byte{9, 1, 2}},
		{"flushed", func(q *SchedQueue, m *Memory) {
			do(t, q, write(m, 0, sectors(1, 1)))
			do(t, q, flush(m))
		}, []byte{1}},
		{"written after the flush", func(q *SchedQueue, m *Memory) {
			do(t, q, write(m, 0, sectors(1, 1)))
			do(t, q, flush(m))
			do(t, q, write(m, 0, sectors(2, 1)))
		}, []byte{1, 2}},
		{"flush submitted before the write completed", func(q *SchedQueue, m *Memory) {
			w, f := write(m, 0, sectors(1, 1)), flush(m)
			w.Done, f.Done = none, none
			q.Submit(w)
			q.Submit(f)
			q.Run()
		}, []byte{9, 1}},
		{"fua", func(q *SchedQueue, m *Memory) {
			do(t, q, write(m, 0, sectors(1, 1)))
			w := write(m, 0, sectors(2, 1))
			w.FUA = true
			do(t, q, w)
		}, []byte{2}},
		{"written after fua", func(q *SchedQueue, m *Memory) {
			w := write(m, 0, sectors(2, 1))
			w.FUA = true
			do(t, q, w)
			do(t, q, write(m, 0, sectors(3, 1)))
		}, []byte{2, 3}},
		{"in flight", func(q *SchedQueue, m *Memory) {
			w := write(m, 0, sectors(1, 1))
			w.Done = none
			q.Submit(w)
		}, []byte{9, 1}},
		{"zeroes", func(q *SchedQueue, m *Memory) {
			do(t, q, &blockdev.Op{Kind: blockdev.WriteZeroes, File: m, Len: sector.Size})
		}, []byte{9, 0}},
	} {
		seen := outcomes(t, c.prepare)
		if len(seen) != len(c.want) {
			t.Errorf("%s: outcomes %v, want %v", c.name, seen, c.want)
		}
		for _, b := range c.want {
			if !seen[b] {
				t.Errorf("%s: outcome %d never seen", c.name, b)
			}
		}
	}
}

func TestPowerFailTearsWrites(t *testing.T) {
	torn := 0
	for seed := uint64(1); seed < 40; seed++ {
		s := NewSched(seed)
		q := s.NewQueue("q")
		m := NewMemoryDevice("disk", 8*sector.Size)
		m.LoseUnsynced()
		w := write(m, 0, sectors(1, 8))
		w.Done = func(*blockdev.Op) {}
		q.Submit(w)
		s.PowerFail(m)
		got := content(t, m, 0, 8*sector.Size)
		n := 0
		for i := 0; i < 8; i++ {
			sector := got[i*sector.Size : (i+1)*sector.Size]
			if bytes.Equal(sector, sectors(1, 1)) {
				n++
			} else if !bytes.Equal(sector, sectors(0, 1)) {
				t.Fatal("a sector was torn")
			}
		}
		if n > 0 && n < 8 {
			torn++
		}
	}
	if torn == 0 {
		t.Error("no write was torn")
	}
}

func TestPowerFailSize(t *testing.T) {
	sizes := make(map[int64]bool)
	for seed := uint64(1); seed < 20; seed++ {
		q := NewSched(seed).NewQueue("q")
		m := NewMemoryFile("file", 1<<20)
		m.LoseUnsynced()
		do(t, q, &blockdev.Op{Kind: blockdev.Allocate, File: m, Len: 4 * sector.Size})
		do(t, q, &blockdev.Op{Kind: blockdev.Flush, File: m})
		do(t, q, &blockdev.Op{Kind: blockdev.Allocate, File: m, Len: 8 * sector.Size})
		q.Sched().PowerFail(m)
		sizes[m.Size()] = true
	}
	if len(sizes) != 2 || !sizes[4*sector.Size] || !sizes[8*sector.Size] {
		t.Errorf("sizes %v", sizes)
	}
}
