package cbtmap

import (
	"slices"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// A map against the plainest model of it: every byte of both maps must be equal
// at every moment, also over wraps and adoptions.
func TestMapEqualsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sectors := rapid.Int64Range(1, 600).Draw(t, "sectors")
		p := Params{MinimumShift: 9, MaximumShift: rapid.Uint8Range(9, 13).Draw(t, "maximum shift"), MaximumCount: 70}
		m, err := NewMemory(sectors*sector.Size, p)
		if err != nil {
			t.Fatal(err)
		}
		i, _ := m.Info()
		active, readable := make([]byte, i.BlockCount), make([]byte, i.BlockCount)
		number, generation, takes := 0, i.GenerationID, 0
		touched := func(b int, off, length int64) bool {
			return off < int64(b+1)*i.BlockSize && int64(b)*i.BlockSize < off+length
		}
		mark := func(maps []byte, off, length int64, v int) {
			for b := range maps {
				if length > 0 && touched(b, off, length) {
					maps[b] = byte(v)
				}
			}
		}
		draw := func(t *rapid.T) (off, length int64) {
			off = rapid.Int64Range(0, sectors*sector.Size).Draw(t, "offset")
			return off, rapid.Int64Range(0, sectors*sector.Size-off).Draw(t, "length")
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				off, length := draw(t)
				m.Mark(off, length)
				mark(active, off, length, number+1)
			},
			"imageWrite": func(t *rapid.T) {
				off, length := draw(t)
				m.MarkBoth(off, length)
				mark(active, off, length, number+1)
				mark(readable, off, length, number)
			},
			"dirty": func(t *rapid.T) {
				first := rapid.Int64Range(0, sectors-1).Draw(t, "first")
				count := rapid.Int64Range(1, sectors-first).Draw(t, "count")
				if err := m.MarkDirty([]Sectors{{0, 1}, {uint64(first), uint64(count)}}); err != nil {
					t.Fatal(err)
				}
				for _, r := range [][2]int64{{0, 1}, {first, count}} {
					mark(active, r[0]*sector.Size, r[1]*sector.Size, number+1)
					mark(readable, r[0]*sector.Size, r[1]*sector.Size, number)
				}
			},
			"takes": func(t *rapid.T) {
				for range rapid.SampledFrom([]int{1, 1, 1, 2, 100, 253}).Draw(t, "takes") {
					m.Switch()
					if takes++; takes%255 == 0 {
						number = 0
						clear(active)
						clear(readable)
						if g := m.header.generation; g == generation {
							t.Fatal("no new generation at the wrap")
						} else {
							generation = g
						}
						continue
					}
					number++
					copy(readable, active)
				}
			},
			"adopt": func(t *rapid.T) {
				if m, err = Adopt(m.Memory()); err != nil {
					t.Fatal(err)
				}
			},
			"": func(t *rapid.T) {
				now, err := m.Info()
				if err != nil || int(now.ChangesNumber) != number || now.GenerationID != generation {
					t.Fatalf("info %+v, %v; want number %d of %v", now, err, number, generation)
				}
				if !slices.Equal(m.active, active) {
					t.Fatalf("active map %v, want %v", m.active, active)
				}
				got := make([]byte, i.BlockCount)
				if _, err := m.ReadMap(generation, got, 0); err != nil || !slices.Equal(got, readable) {
					t.Fatalf("readable map %v, %v, want %v", got, err, readable)
				}
			},
		})
	})
}

// backup is what a backup program keeps: a base and what it copied.
type backup struct {
	generation uuid.UUID
	number     uint8
	content    []int
}

// world is a disk of one-sector blocks, the image of its last take, and backups.
// Content is the number of the write that made it.
type world struct {
	m           *Map
	disk, image []int
	writes      int
	bases       []backup // of images before the present one, any of them may be the base
	latest      []backup // of the present image
	takes       int
}

func (w *world) write(block, count int, image bool) {
	w.writes++
	content := w.disk
	if image {
		content = w.image
		w.m.MarkBoth(int64(block)*512, int64(count)*512)
	} else {
		w.m.Mark(int64(block)*512, int64(count)*512)
	}
	for b := block; b < min(block+count, len(content)); b++ {
		content[b] = w.writes
	}
}

func (w *world) take() Info {
	i := w.m.Switch()
	w.taken()
	return i
}

func (w *world) taken() {
	w.image = slices.Clone(w.disk)
	w.bases = append(w.bases, w.latest...)
	w.bases = w.bases[max(0, len(w.bases)-300):]
	w.latest = nil
	w.takes++
}

// note keeps what a backup of the present image made now would keep.
func (w *world) note() {
	if i, err := w.m.Info(); err == nil && w.takes > 0 {
		w.latest = append(w.latest, backup{i.GenerationID, i.ChangesNumber, slices.Clone(w.image)})
	}
}

type fataler interface{ Fatalf(string, ...any) }

// check makes an increment since every base and demands that it leads from what
// the base copied to the present image. It returns how many were not full copies.
func (w *world) check(t fataler) (increments int) {
	i, err := w.m.Info()
	if err != nil {
		return 0
	}
	for _, base := range w.bases {
		if base.generation != i.GenerationID {
			continue // a full copy is always right
		}
		increments++
		seq, err := w.m.Changes(base.generation, uint64(base.number))
		if err != nil {
			t.Fatalf("increment from %d to %d: %v", base.number, i.ChangesNumber, err)
		}
		restored := slices.Clone(base.content)
		for r, err := range seq {
			if err != nil {
				t.Fatalf("increment from %d to %d: %v", base.number, i.ChangesNumber, err)
			}
			from, to := r.Offset/512, (r.Offset+r.Length)/512
			copy(restored[from:to], w.image[from:to])
		}
		if !slices.Equal(restored, w.image) {
			t.Fatalf("increment from %d to %d of %v: restored %v, image %v",
				base.number, i.ChangesNumber, i.GenerationID, restored, w.image)
		}
	}
	return increments
}

// A chain of takes over the wrap, every increment between any two of them.
func TestIncrementsOf300TakesEqualTheImages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 20
		m, err := NewMemory(blocks*512, sectorBlocks)
		if err != nil {
			t.Fatal(err)
		}
		w := &world{m: m, disk: make([]int, blocks)}
		writes := rapid.SliceOfN(rapid.IntRange(0, 4*blocks-1), 300, 300).Draw(t, "writes")
		increments := 0
		for i, x := range writes {
			if x < 2*blocks { // half of the takes find one write, or an image write
				w.write(x%blocks, 1, x >= blocks && i > 0)
			}
			w.take()
			w.note()
			if i%13 == 0 || i > 250 && i < 260 || i == 299 {
				increments += w.check(t)
			}
		}
		if increments < 1000 {
			t.Fatalf("only %d increments were checked", increments)
		}
	})
}

// However much is asked to be marked, a take waits for one part of it at most,
// and may fall anywhere into it: nothing of it is lost to those who have a take
// from before.
func TestTakesWhileRangesAreMarked(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 4*maxHeld + 77
		m, err := NewMemory(blocks*512, sectorBlocks)
		if err != nil {
			t.Fatal(err)
		}
		base := m.Switch()
		m.Switch()
		var ranges []Sectors
		want := make([]bool, blocks)
		for range rapid.IntRange(1, 8).Draw(t, "ranges") {
			first := rapid.IntRange(0, blocks-1).Draw(t, "first")
			count := rapid.IntRange(1, blocks-first).Draw(t, "count")
			ranges = append(ranges, Sectors{uint64(first), uint64(count)})
			for b := first; b < first+count; b++ {
				want[b] = true
			}
		}
		takes := rapid.SliceOfN(rapid.IntRange(0, 2), 8, 8).Draw(t, "takes")
		took, since := 0, slices.Clone(m.readable)
		m.onRelease = func() {
			marked := 0
			for b, was := range since {
				if m.readable[b] != was {
					marked++
					if m.readable[b] != m.number || m.active[b] != m.number+1 {
						t.Fatalf("block %d has %d and %d at take %d", b, m.readable[b], m.active[b], m.number)
					}
				}
			}
			if marked > maxHeld {
				t.Fatalf("a take had to wait until %d blocks were marked", marked)
			}
			if took < len(takes) {
				for range takes[took] {
					m.Switch()
				}
			}
			took++
			since = slices.Clone(m.readable)
		}
		if err := m.MarkDirty(ranges); err != nil {
			t.Fatal(err)
		}
		m.onRelease = nil
		changes := func() (set []bool) {
			set = make([]bool, blocks)
			seq, err := m.Changes(base.GenerationID, uint64(base.ChangesNumber))
			if err != nil {
				t.Fatal(err)
			}
			for r, err := range seq {
				if err != nil {
					t.Fatal(err)
				}
				for b := r.Offset / 512; b < (r.Offset+r.Length)/512; b++ {
					set[b] = true
				}
			}
			return set
		}
		if !slices.Equal(changes(), want) {
			t.Fatal("what was marked is not shown at once")
		}
		m.Switch()
		if !slices.Equal(changes(), want) {
			t.Fatal("what was marked is not shown after the next take")
		}
	})
}

// A reader takes as little of the lock, and what it is told while takes go on
// leaves nothing out.
func TestTakesWhileChangesAreRead(t *testing.T) {
	const blocks = 3*maxHeld + 5
	m, err := NewMemory(blocks*512, sectorBlocks)
	if err != nil {
		t.Fatal(err)
	}
	base := m.Switch()
	m.Mark(0, blocks*512)
	m.Switch()
	held := 0
	m.onRelease = func() { held++; m.Switch() }
	seq, err := m.Changes(base.GenerationID, uint64(base.ChangesNumber))
	if err != nil {
		t.Fatal(err)
	}
	for r, err := range seq {
		if err != nil || r != (Range{0, blocks * 512}) {
			t.Errorf("%v, %v", r, err)
		}
	}
	if held != 4 {
		t.Errorf("read under %d holds of the lock", held)
	}
	all := make([]byte, blocks)
	if n, err := m.ReadMap(base.GenerationID, all, 0); n != blocks || err != nil || slices.Min(all) == 0 {
		t.Errorf("read %d blocks, %v", n, err)
	}
	if held != 8 {
		t.Errorf("the map was read under %d holds of the lock", held-4)
	}
}

// Everything a map may go through, with bases noted at any time: whatever is
// offered as an increment leads to the image (I3).
func TestIncrementsAreNeverTooSmall(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 24
		m, err := NewMemory(blocks*512, sectorBlocks)
		if err != nil {
			t.Fatal(err)
		}
		w := &world{m: m, disk: make([]int, blocks), image: make([]int, blocks)}
		block := func(t *rapid.T) (first, count int) {
			first = rapid.IntRange(0, len(w.disk)-1).Draw(t, "block")
			return first, rapid.IntRange(1, len(w.disk)-first).Draw(t, "count")
		}
		t.Repeat(map[string]func(*rapid.T){
			"write":      func(t *rapid.T) { b, n := block(t); w.write(b, n, false) },
			"imageWrite": func(t *rapid.T) { b, n := block(t); w.write(b, n, true) },
			"dirty": func(t *rapid.T) {
				b, n := block(t)
				_ = w.m.MarkDirty([]Sectors{{uint64(b), uint64(n)}}) // refused if corrupted
			},
			"take":     func(*rapid.T) { w.take() },
			"takeNote": func(*rapid.T) { w.take(); w.note() },
			"takes": func(t *rapid.T) {
				for range rapid.IntRange(200, 256).Draw(t, "takes") {
					w.take()
				}
			},
			"note": func(*rapid.T) { w.note() },
			"voidTake": func(t *rapid.T) {
				before, _ := w.m.Info()
				if rapid.Bool().Draw(t, "switched") {
					w.m.Switch()
					w.note() // by a reader of the image before
				}
				w.m.Void(before)
			},
			"newGeneration": func(*rapid.T) { w.m.NewGeneration() },
			"corrupt":       func(*rapid.T) { w.m.SetCorrupted() },
			"adopt": func(t *rapid.T) {
				if w.m, err = Adopt(w.m.Memory()); err != nil {
					t.Fatal(err)
				}
			},
			"saveLoad": func(t *rapid.T) {
				if w.m.Corrupted() {
					return
				}
				saved, err := w.m.Save()
				if err != nil {
					t.Fatal(err)
				}
				w.m, err = NewMemory(int64(len(w.disk))*512, sectorBlocks)
				if err != nil {
					t.Fatal(err)
				}
				b, n := block(t)
				w.write(b, n, false)
				if err := w.m.Load(saved); err != nil {
					t.Fatal(err)
				}
			},
			"": func(t *rapid.T) {
				w.check(t)
			},
		})
	})
}
