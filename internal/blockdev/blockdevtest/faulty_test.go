package blockdevtest

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

func TestFaulty(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault Fault
		errs  [4]unix.Errno // of four writes of two sectors, one after the other
		left  [4]int        // how many of their sectors are on the disk
	}{
		{"second write", Fault{Kinds: []blockdev.Kind{blockdev.Write}, After: 1, Count: 1, Err: unix.EIO},
			[4]unix.Errno{0, unix.EIO, 0, 0}, [4]int{2, 0, 2, 2}},
		{"all from the third", Fault{After: 2, Err: unix.ENOSPC},
			[4]unix.Errno{0, 0, unix.ENOSPC, unix.ENOSPC}, [4]int{2, 2, 0, 0}},
		{"half", Fault{Count: 1, Err: unix.EIO, Effect: PartEffect},
			[4]unix.Errno{unix.EIO, 0, 0, 0}, [4]int{1, 2, 2, 2}},
		{"whole", Fault{Count: 1, Err: unix.ENOMEM, Effect: FullEffect},
			[4]unix.Errno{unix.ENOMEM, 0, 0, 0}, [4]int{2, 2, 2, 2}},
		{"range", Fault{Off: 5 * sector.Size, Len: sector.Size, Err: unix.EIO},
			[4]unix.Errno{0, 0, unix.EIO, 0}, [4]int{2, 2, 0, 2}},
		{"other kind", Fault{Kinds: []blockdev.Kind{blockdev.Read, blockdev.Flush}, Err: unix.EIO}, [4]unix.Errno{}, [4]int{2, 2, 2, 2}},
		{"other file", Fault{File: NewMemoryDevice("b", 0), Err: unix.EIO}, [4]unix.Errno{}, [4]int{2, 2, 2, 2}},
	} {
		sq := NewMemoryQueue()
		m := NewMemoryDevice("a", 8*sector.Size)
		var faults Faults
		faults.Add(c.fault)
		q := NewFaulty(sq, &faults)
		fired := 0
		for i := range c.errs {
			w := write(m, int64(2*i)*sector.Size, sectors(1, 2))
			done := 0
			w.Done = func(op *blockdev.Op) {
				done++
				if op != w {
					t.Errorf("%s: completed with another operation", c.name)
				}
			}
			q.Submit(w)
			if done != 0 {
				t.Fatalf("%s: done inside submit", c.name)
			}
			sq.Run()
			if done != 1 || w.Err != c.errs[i] {
				t.Errorf("%s: write %d: done %d times, %v, want %v", c.name, i, done, w.Err, c.errs[i])
			}
			if w.Err != 0 {
				fired++
			}
			if got := bytes.Count(content(t, m, int64(2*i)*sector.Size, 2*sector.Size), []byte{1}) / sector.Size; got != c.left[i] {
				t.Errorf("%s: write %d left %d sectors, want %d", c.name, i, got, c.left[i])
			}
		}
		if faults.Fired() != fired {
			t.Errorf("%s: fired %d, seen %d", c.name, faults.Fired(), fired)
		}
	}
}

func TestFaultsClear(t *testing.T) {
	var faults Faults
	faults.Add(Fault{Err: unix.EIO})
	faults.Clear()
	sq := NewMemoryQueue()
	w := write(NewMemoryDevice("a", sector.Size), 0, sectors(1, 1))
	w.Done = func(*blockdev.Op) {}
	NewFaulty(sq, &faults).Submit(w)
	sq.Run()
	if w.Err != 0 {
		t.Error(w.Err)
	}
}
