package diffarea

import "testing"

// FuzzExtents grows a log's storage piece by piece and compares with a plain
// list: where each region lies, and that a process that takes over accepts it.
// Two bytes are a piece: the source, and how many regions less one; it begins
// where the source ends, or with the highest bit set some regions further on.
func FuzzExtents(f *testing.F) {
	f.Add([]byte{0, 0})
	f.Add([]byte{0, 7, 0, 7, 1, 3, 0, 1, 0x81, 9})
	f.Add([]byte{2, 255, 2, 255, 0x82, 0, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, pieces []byte) {
		const shift = 12
		s := newLogState(make([]byte, LogStateSize))
		s.format(shift, 8, 0)
		type place struct {
			source uint64
			off    int64
		}
		var regions []place
		var ends [4]int64
		for i := 0; i+1 < len(pieces) && len(regions) < 1<<16; i += 2 {
			source, n := uint64(pieces[i]%4), Region(pieces[i+1])+1
			if pieces[i]&0x80 != 0 {
				ends[source] += 3 << shift
			}
			before := s.extents()
			if !s.add(source, ends[source], n, shift) {
				if before < maxExtents {
					t.Fatalf("no room for an extent after %d of %d", before, maxExtents)
				}
				break
			}
			for range n {
				regions = append(regions, place{source, ends[source]})
				ends[source] += 1 << shift
			}
		}
		if got := s.capacity(); got != Region(len(regions)) {
			t.Fatalf("capacity %d, want %d", got, len(regions))
		}
		for r, want := range regions {
			x := s.find(Region(r))
			got := place{x.source, x.off + (int64(r)-int64(x.first))<<shift}
			if got != want || Region(r) < x.first || Region(r) >= x.first+x.count {
				t.Fatalf("region %d at %+v by extent %+v, want %+v", r, got, x, want)
			}
		}
		if err := s.check(4); err != nil {
			t.Error(err)
		}
	})
}
