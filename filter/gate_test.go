package filter_test

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestGrow: the disk of a filter with snapshots grows at a cut. A write to the new part is
// marked, and needs no copy in the snapshots from before, also if it begins in the old part;
// a discard there goes to the disk. A snapshot from after it has the new part.
func TestGrow(t *testing.T) {
	g := newRig(t)
	small, large := g.area(chunk), g.area(4*chunk)
	g.cut(small)
	g.cut(large)
	const size = diskSize + 10*chunk + 512
	g.disk.Resize(size)
	next, err := g.cbt.Prepare(size)
	if err != nil {
		t.Fatal(err)
	}
	var early *ublk.Request
	filter.StartCut([]*filter.Filter{g.f}, nil, func() {
		early = g.send(1, ublk.OpWrite, size-512, 512, 4) // waits for the cut to be over
		if err := g.cbt.Replace(next); err != nil {
			t.Error(err)
		}
		g.f.Grow(size, nil)
	}, func(ok bool) {
		if !ok {
			t.Error("no cut")
		}
	})
	g.sched.Run()
	if errno, ok := g.done[early]; !ok || errno != 0 || g.at(size-1) != 4 {
		t.Errorf("the write that waited: %v, %v", errno, ok)
	}
	take := g.cbt.Switch()
	across := g.send(0, ublk.OpWrite, diskSize-512, 1024, 1)
	beyond := g.send(1, ublk.OpWrite, diskSize+3*chunk, chunk, 2)
	g.send(1, ublk.OpWrite, diskSize+chunk, chunk, 7)
	g.sched.Run()
	if g.at(diskSize-1) != 1 || g.at(diskSize+3*chunk) != 2 || g.at(diskSize+chunk) != 7 {
		t.Error("a write did not reach the disk")
	}
	gone := g.send(0, ublk.OpDiscard, diskSize-2*chunk, 4*chunk, 0)
	zeroes := g.send(1, ublk.OpWriteZeroes, diskSize+5*chunk, 5*chunk, 0)
	g.sched.Run()
	for _, r := range []*ublk.Request{across, beyond, gone, zeroes} {
		if errno, ok := g.done[r]; !ok || errno != 0 {
			t.Errorf("%v at %d: %v, done %v", r.Op, r.Off, errno, ok)
		}
	}
	if g.at(diskSize+chunk) != 0 {
		t.Error("a discard of the new part did not reach the disk")
	}
	for _, a := range []*diffarea.Area{small, large} {
		last := a.Chunk(diskSize - 1)
		if !a.Protected(last) {
			t.Errorf("%v: the last chunk that the disk had is not copied", a)
		}
		if a.Size() != diskSize {
			t.Errorf("%v has %d bytes", a, a.Size())
		}
	}
	g.cbt.Switch()
	for _, off := range []int64{diskSize - 512, diskSize, diskSize + 3*chunk, diskSize + 9*chunk} {
		found := false
		seq, err := g.cbt.Changes(take.GenerationID, uint64(take.ChangesNumber))
		if err != nil {
			t.Fatal(err)
		}
		for r, err := range seq {
			if err != nil {
				t.Fatal(err)
			}
			found = found || r.Offset <= off && off < r.Offset+r.Length
		}
		if !found {
			t.Errorf("the change at %d is not marked", off)
		}
	}
	if g.f.Size() != size {
		t.Errorf("the filter has %d bytes", g.f.Size())
	}
}
