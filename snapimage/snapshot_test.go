package snapimage_test

import (
	"bytes"
	"fmt"
	"math/rand"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// world is one disk under a filter with two queues, in memory.
type world struct {
	t       *testing.T
	sched   *blockdevtest.Sched
	control *blockdevtest.SchedQueue
	disk    *blockdevtest.Memory
	filter  *filter.Filter
	queues  []*filter.Queue
	events  []diffarea.Event
	done    int
}

const diskSize = 1<<20 + 3*512

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, sched: blockdevtest.NewSched(seed)}
	w.control = w.sched.NewQueue("control")
	w.disk = blockdevtest.NewMemoryDevice("disk", diskSize)
	fill := make([]byte, diskSize)
	rand.New(rand.NewSource(int64(seed))).Read(fill)
	if _, err := w.disk.WriteAt(fill, 0); err != nil {
		t.Fatal(err)
	}
	m, err := cbtmap.NewMemory(diskSize, cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	w.filter = filter.New(filter.Config{Orig: w.disk, Size: diskSize, CBT: m, Queues: 2})
	for i := range 2 {
		w.queues = append(w.queues, w.filter.NewQueue(i, w.sched.NewQueue(fmt.Sprint("filter-", i))))
	}
	return w
}

// Completed plays the kernel: every request must end well.
func (w *world) Completed(r *ublk.Request, errno unix.Errno) {
	w.done++
	if errno != 0 {
		w.t.Errorf("%v %d+%d: %v", r.Op, r.Off, r.Len, errno)
	}
}

func (w *world) snapshot(chunk int64, poolSlots int64) *snapimage.Snapshot {
	pool := make([]byte, chunk*poolSlots)
	s, err := snapimage.New(snapimage.Config{
		ID: uuid.New(),
		Log: diffarea.LogConfig{
			ChunkSize: chunk,
			Pool:      diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)},
			State:     make([]byte, diffarea.LogStateSize),
			Portion:   256 << 10,
			OnEvent:   func(e diffarea.Event) { w.events = append(w.events, e) },
		},
		Memory: func(_ string, n int64) ([]byte, error) { return make([]byte, n), nil },
	}, w.control)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) content() []byte {
	b := make([]byte, diskSize)
	if _, err := w.disk.ReadAt(b, 0); err != nil {
		w.t.Fatal(err)
	}
	return b
}

// read is the whole of an image, in requests of all sizes.
func (w *world) read(im *snapimage.Image) []byte {
	q := im.NewQueue(w.sched.NewQueue("image"))
	b := make([]byte, diskSize)
	tag := 0
	for off := 0; off < diskSize; tag++ {
		n := min(512*(1+tag*37%300), diskSize-off)
		r := ublk.NewRequest(tag, w)
		r.Op, r.Off, r.Len = ublk.OpRead, int64(off), int64(n)
		r.Buf = blockdev.MemBuf(b[off : off+n])
		q.Handle(r)
		off += n
	}
	w.sched.Run()
	return b
}

func TestImageIsTheDiskAtTheCut(t *testing.T) {
	for seed := range uint64(40) {
		w := newWorld(t, seed)
		rnd := rand.New(rand.NewSource(int64(seed)))
		tag := [2]int{}
		write := func() {
			i := rnd.Intn(2)
			n := 512 * (1 + rnd.Intn(200))
			off := 512 * rnd.Intn((diskSize-n)/512)
			b := make([]byte, n)
			rnd.Read(b)
			r := ublk.NewRequest(tag[i], w)
			tag[i]++
			r.Op, r.Off, r.Len, r.Buf = ublk.OpWrite, int64(off), int64(n), blockdev.MemBuf(b)
			w.queues[i].Handle(r)
		}
		type held struct {
			s   *snapimage.Snapshot
			cut []byte
		}
		var snaps []*held
		chunks := []int64{4 << 10, 64 << 10, 16 << 10, 256 << 10}
		for k := range 3 {
			h := &held{s: w.snapshot(chunks[(int(seed)+k)%4], int64(1+rnd.Intn(8)))}
			if err := h.s.Add(w.filter, 1); err != nil {
				t.Fatal(err)
			}
			h.s.Append(diffarea.Storage{File: blockdevtest.NewMemoryFile("store", 1<<30)}, func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
			w.sched.Run()
			for range 5 {
				write()
			}
			h.s.Take(func() { h.cut = w.content() }, func(err error) {
				if err != nil {
					t.Error(err)
				}
			})
			for range 20 {
				write()
			}
			w.sched.Run()
			snaps = append(snaps, h)
		}
		sent := tag[0] + tag[1]
		if w.done != sent {
			t.Fatalf("seed %d: %d of %d writes completed", seed, w.done, sent)
		}
		for k, h := range snaps {
			if got := w.read(h.s.Image(0)); !bytes.Equal(got, h.cut) {
				t.Fatalf("seed %d: image %d differs from the cut", seed, k)
			}
			ended := false
			h.s.Destroy(func() { ended = true })
			w.sched.Run()
			if !ended {
				t.Fatalf("seed %d: destroy of %d did not end", seed, k)
			}
		}
		if len(w.events) > 0 {
			t.Fatalf("events: %v", w.events)
		}
	}
}
