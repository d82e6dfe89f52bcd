package cbtmap

import (
	"cmp"
	"slices"
)

// Sectors is a range of a device in sectors of 512 bytes.
type Sectors struct {
	First uint64
	Count uint64
}

// Merge makes of ranges the fewest that hold the same sectors, in order, in the
// memory of ranges. None of them may be empty, or end beyond 64 bits.
func Merge(ranges []Sectors) []Sectors {
	slices.SortFunc(ranges, func(a, b Sectors) int { return cmp.Compare(a.First, b.First) })
	n := 0
	for _, r := range ranges {
		if n > 0 && r.First <= ranges[n-1].First+ranges[n-1].Count {
			last := &ranges[n-1]
			last.Count = max(last.Count, r.First-last.First+r.Count)
			continue
		}
		ranges[n] = r
		n++
	}
	return ranges[:n]
}
