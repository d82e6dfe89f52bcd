package stamp

import (
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
)

// These tests prove that the model finds what it is for.

func TestStamp(t *testing.T) {
	p := make([]byte, 4*SectorSize)
	Fill(p, 7, 1, 100)
	for i := range int64(4) {
		s := p[i*SectorSize:][:SectorSize]
		if v, ok := Of(s, 1, 100+i); v != 7 || !ok {
			t.Errorf("sector %d: version %d, %v", i, v, ok)
		}
		if _, ok := Of(s, 0, 100+i); ok {
			t.Errorf("sector %d: taken for that of another disk", i)
		}
		if _, ok := Of(s, 1, 101+i); ok {
			t.Errorf("sector %d: taken for the next", i)
		}
	}
	binary.LittleEndian.PutUint64(p[300&^7:], 1)
	if _, ok := Of(p, 1, 100); ok {
		t.Error("torn sector taken for whole")
	}
	Fill(p, Zeroes, 1, 100)
	if v, ok := Of(p, 1, 100); v != Zeroes || !ok {
		t.Errorf("zeroes: version %d, %v", v, ok)
	}
	p[511] = 1
	if _, ok := Of(p, 1, 100); ok {
		t.Error("torn zeroes taken for whole")
	}
}

// TestCut plays takes over two disks of three sectors and looks at images that
// are cuts and at such that are not.
func TestCut(t *testing.T) {
	type state [2][3]Version
	image := func(win *Window, s state) error {
		win.after, win.until, win.findings = 0, math.MaxUint64, nil
		clear(win.seen)
		for d := range s {
			for i, v := range s[d] {
				p := make([]byte, SectorSize)
				Fill(p, v, d, int64(i))
				win.See(d, int64(i), p)
			}
		}
		return win.Err()
	}
	w := NewWorld(3*SectorSize, 3*SectorSize)
	a, b := w.Disks[0], w.Disks[1]
	a.Begin(0, 3, false).Done()       // 1
	before := a.Begin(0, 1, false)    // 2, under way at the start
	win := w.Open()                   //
	x := a.Begin(1, 2, false)         // 3
	x.Done()                          //
	y := b.Begin(0, 2, false)         // 4, after 3
	y.Done()                          //
	unfinished := b.Begin(2, 3, true) // 5
	win.Close()
	for _, c := range []struct {
		name  string
		image state
		good  bool
	}{
		{"start", state{{1, 1, 1}, {0, 0, 0}}, true},
		{"end", state{{2, 3, 1}, {4, 4, 0}}, true},
		{"unfinished at the start, alone", state{{2, 1, 1}, {0, 0, 0}}, true},
		{"the first only", state{{1, 3, 1}, {0, 0, 0}}, true},
		{"the second without the first", state{{1, 1, 1}, {4, 4, 0}}, false},
		{"half of the second", state{{1, 3, 1}, {4, 0, 0}}, true}, // as the write was under way
		{"half of the second without the first", state{{1, 1, 1}, {4, 0, 0}}, false},
		{"older than the start", state{{0, 1, 1}, {0, 0, 0}}, false},
		{"never written", state{{9, 1, 1}, {0, 0, 0}}, false},
	} {
		if err := image(win, c.image); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := image(win, state{{1, 1, 1}, {0, 0, 0}}); err != nil {
		t.Error(err)
	}
	p := make([]byte, 3*SectorSize)
	Fill(p, 2, 0, 0)
	if win.See(0, 0, p[:SectorSize]); win.Err() == nil {
		t.Error("an image that changes is not noticed")
	}
	before.Done()
	unfinished.Done()
	if a.now[0] != before.Version || b.now[2] != Zeroes {
		t.Errorf("now %v %v", a.now, b.now)
	}
	Fill(p[:512], 2, 0, 0)
	Fill(p[512:1024], 3, 0, 1)
	Fill(p[1024:], 1, 0, 2)
	if err := a.Compare(p, 0); err != nil {
		t.Error(err)
	}
	Fill(p[1024:], 3, 0, 2)
	if err := a.Compare(p, 0); err == nil {
		t.Error("wrong sector not noticed")
	}
}

// TestRandomPlaces looks at where writers write: only in their own stripes, and
// everywhere.
func TestRandomPlaces(t *testing.T) {
	const size = 6<<20 + 7*SectorSize
	for _, block := range []int64{512, 4096} {
		d := NewWorld(size).Disks[0]
		owner := make([]int64, d.sectors)
		for n := range int64(3) {
			r := NewWriter(d, nil, Mix{Block: block, Writers: 3}, int(n), 1)
			for range 20000 {
				from, to := r.Place()
				if from < 0 || to > d.sectors || from >= to || to-from > direct.BufferSize/SectorSize || from*SectorSize%block != 0 || to*SectorSize%block != 0 {
					t.Fatalf("sectors %d to %d", from, to)
				}
				for s := from; s < to; s++ {
					if owner[s] != 0 && owner[s] != n+1 {
						t.Fatalf("sector %d is written by %d and %d", s, owner[s], n+1)
					}
					owner[s] = n + 1
				}
			}
		}
		if i := slices.Index(owner[:d.sectors*SectorSize/block*block/SectorSize], 0); i >= 0 {
			t.Errorf("sector %d is never written", i)
		}
	}
}
