package cbtmap

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestMerge(t *testing.T) {
	if got := Merge([]Sectors{{math.MaxUint64 - 1, 1}, {0, math.MaxUint64 - 1}, {5, 5}}); !slices.Equal(got, []Sectors{{0, math.MaxUint64}}) {
		t.Errorf("to the end of all sectors: %v", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		const sectors = 100
		var want [sectors]bool
		var ranges []Sectors
		for range rapid.IntRange(0, 12).Draw(t, "ranges") {
			first := rapid.IntRange(0, sectors-1).Draw(t, "first")
			count := rapid.IntRange(1, sectors-first).Draw(t, "count")
			ranges = append(ranges, Sectors{uint64(first), uint64(count)})
			for s := first; s < first+count; s++ {
				want[s] = true
			}
		}
		var got [sectors]bool
		end := uint64(0)
		for i, r := range Merge(ranges) {
			if r.Count == 0 || i > 0 && r.First <= end {
				t.Fatalf("range %v after one that ends at %d", r, end)
			}
			end = r.First + r.Count
			for s := r.First; s < end; s++ {
				got[s] = true
			}
		}
		if got != want {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}
