package blockdevtest

import (
	"sync"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

func TestMemoryThread(t *testing.T) {
	m := NewMemoryDevice("disk", 64*sector.Size)
	a, b := NewMemoryThread(1), NewMemoryThread(2)
	var all sync.WaitGroup
	for i := 0; i < 32; i++ {
		all.Add(1)
		q := []*MemoryThread{a, b}[i%2]
		q.Post(&blockdev.Task{Run: func() {
			w := write(m, int64(i)*sector.Size, sectors(byte(i+1), 1))
			w.Done = func(op *blockdev.Op) {
				if op.Err != 0 {
					t.Error(op.Err)
				}
				all.Done()
			}
			q.Submit(w)
		}})
	}
	all.Wait()
	a.Close()
	b.Close()
	for i := 0; i < 32; i++ {
		if got := content(t, m, int64(i)*sector.Size, 1)[0]; got != byte(i+1) {
			t.Errorf("sector %d: %d", i, got)
		}
	}
}
