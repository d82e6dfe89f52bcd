package cbtmap

import (
	"bytes"
	"math"
	"slices"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Whatever is found in a file is either refused or a map that works.
func FuzzAdopt(f *testing.F) {
	m := newMap(f, 10)
	f.Add(bytes.Clone(m.memory))
	m.Mark(512, 512)
	m.Switch()
	f.Add(bytes.Clone(m.memory))
	f.Add(m.memory[:len(m.memory)-64])
	f.Add(make([]byte, 640))
	f.Fuzz(func(t *testing.T, b []byte) {
		memory := alignedCopy(b)
		m, err := Adopt(memory)
		if err != nil {
			if !bytes.Equal(memory, b) {
				t.Fatal("refused memory is changed")
			}
			return
		}
		if slices.Max(m.active) > m.number+1 || slices.Max(m.readable) > m.number {
			t.Fatalf("marks above number %d", m.number)
		}
		corrupted := m.Corrupted()
		before := m.infoLocked()
		m.Mark(before.DeviceCapacity-1, 1)
		now := m.Switch()
		if (corrupted || before.ChangesNumber == maxNumber) != (now.GenerationID != before.GenerationID) {
			t.Fatalf("take led from %+v to %+v", before, now)
		}
		if now.ChangesNumber > 0 && !changedBlocks(t, m, now.GenerationID, before.ChangesNumber)[now.BlockCount-1] {
			t.Fatal("mark is lost")
		}
	})
}

func alignedCopy(b []byte) []byte {
	c := make([]byte, max(len(b), 4096))
	copy(c, b)
	return c[:len(b)]
}

// Whatever is found in a saved file is either refused, or loads to exactly what
// it says.
func FuzzLoad(f *testing.F) {
	m := newMap(f, 10)
	f.Add(m.encodeSavedLocked())
	m.Mark(512, 512)
	m.Switch()
	saved := m.encodeSavedLocked()
	f.Add(saved)
	f.Add(saved[:len(saved)-1])
	f.Add(saved[:savedHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		m := newMap(t, 10)
		before := bytes.Clone(m.memory)
		if m.loadLocked(b) != nil {
			if !bytes.Equal(before, m.memory) {
				t.Fatal("refused, but the map is changed")
			}
			return
		}
		// The sequence and the parameters are the map's own: all else is the file's.
		got := m.encodeSavedLocked()
		if got[8*3+3] != b[8*3+3] || !bytes.Equal(got[8*5:8*7], b[8*5:8*7]) {
			t.Fatal("loaded another number or generation than was saved")
		}
		if !bytes.Equal(got[savedHeader:len(got)-4], b[savedHeader:len(b)-4]) {
			t.Fatal("loaded another map than was saved")
		}
		if slices.Max(m.active) > m.number+1 || slices.Max(m.readable) > m.number {
			t.Fatalf("marks above number %d", m.number)
		}
	})
}

// Range arithmetic against the definition of "touches".
func FuzzMark(f *testing.F) {
	f.Add(int64(1), uint8(9), int64(0), int64(512))
	f.Add(int64(999), uint8(12), int64(4095), int64(2))
	f.Add(int64(999), uint8(31), int64(math.MaxInt64), int64(math.MaxInt64))
	f.Add(int64(64), uint8(9), int64(math.MinInt64), int64(math.MinInt64))
	f.Add(int64(64), uint8(9), int64(-1), int64(512*64))
	f.Add(int64(64), uint8(9), int64(512), int64(512*64))
	f.Fuzz(func(t *testing.T, sectors int64, shift uint8, off, length int64) {
		if sectors < 1 || sectors > 5000 || shift < minShift || shift > maxShift {
			return
		}
		p := Params{shift, shift, 1}
		a, err := NewMemory(sectors*sector.Size, p)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := NewMemory(sectors*sector.Size, p)
		b.Switch()
		size, block := sectors*sector.Size, int64(1)<<shift
		a.Mark(off, length)
		b.MarkBoth(off, length)

		onDevice := off >= 0 && length >= 0 && off <= size && length <= size-off
		if a.Corrupted() == onDevice {
			t.Errorf("corrupted %v by %d+%d of %d", !onDevice, off, length, size)
		}
		end := int64(math.MaxInt64) // of the range, as far as it matters
		if off <= 0 || length < math.MaxInt64-off {
			end = off + length
		}
		for i := range a.count {
			from, to := i*block, min((i+1)*block, size)
			touched := length > 0 && off < to && from < end
			if onDevice && (a.active[i] == 1) != touched {
				t.Errorf("mark %d+%d of %d: block %d has %d", off, length, size, i, a.active[i])
			}
			if (b.active[i] == 2) != touched || (b.readable[i] == 1) != touched {
				t.Errorf("image write %d+%d of %d: block %d has %d and %d", off, length, size, i, b.active[i], b.readable[i])
			}
		}
		if slices.Max(a.readable) != 0 {
			t.Error("mark changed the readable map")
		}
	})
}

func FuzzMarkDirty(f *testing.F) {
	f.Add(uint64(0), uint64(1), uint64(99), uint64(1))
	f.Add(uint64(0), uint64(1), uint64(100), uint64(1))
	f.Add(uint64(0), uint64(1), uint64(math.MaxUint64), uint64(1))
	f.Add(uint64(50), uint64(math.MaxUint64), uint64(1), uint64(1))
	f.Add(uint64(1<<55), uint64(1<<55), uint64(1), uint64(0))
	f.Fuzz(func(t *testing.T, first1, count1, first2, count2 uint64) {
		const sectors = 100
		m := newMap(t, sectors)
		m.Switch()
		ranges := []Sectors{{first1, count1}, {first2, count2}}
		want := make([]byte, sectors)
		valid := true
		for _, r := range ranges {
			if r.Count < 1 || r.Count > sectors || r.First >= sectors || r.First+r.Count > sectors {
				valid = false
				break
			}
			for s := r.First; s < r.First+r.Count; s++ {
				want[s] = 1
			}
		}
		if err := m.MarkDirty(ranges); (err == nil) != valid {
			t.Fatalf("%v: %v", ranges, err)
		}
		if !valid {
			clear(want)
		}
		if !slices.Equal(m.readable, want) {
			t.Errorf("%v: marked %v", ranges, m.readable)
		}
	})
}
