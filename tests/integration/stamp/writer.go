package stamp

import (
	"context"
	"math/rand"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// Mix is what random writers do.
type Mix struct {
	Block   int64 // logical block in bytes; SectorSize if 0
	Writers int   // per disk
	Zeroes  bool  // also write zeroes without a payload
	Largest int64 // bytes; direct.BufferSize if 0
	// Pause is the longest that each rests after each step, half of it in the mean.
	Pause time.Duration
}

// StartWriters has writers write random pieces to the disks at paths until stopped, and read
// back what they have written. stop waits for them and returns what failed.
//
// Each writer has stripes of its own, so that no two write the same sector at a
// time; their borders lie in the midst of chunks of any size, so that they do
// write the same chunk.
func (w *World) StartWriters(t testing.TB, seed int64, m Mix, paths ...string) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	errs := make(chan error, len(paths)*m.Writers)
	var wg sync.WaitGroup
	for i, path := range paths {
		for n := range m.Writers {
			f := direct.MustOpen(t, path, unix.O_RDWR)
			r := NewWriter(w.Disks[i], f, m, n, seed<<16+int64(i<<8+n))
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer f.Close()
				for ctx.Err() == nil {
					if err := r.Step(); err != nil {
						errs <- err
						return
					}
					Rest(r.Rand, m.Pause)
				}
			}()
		}
	}
	var once sync.Once
	var err error
	stop = func() error {
		once.Do(func() {
			cancel()
			wg.Wait()
			close(errs)
			for e := range errs {
				if err == nil {
					err = e
				}
			}
		})
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

// Rest waits for up to the longest pause.
func Rest(rnd *rand.Rand, longest time.Duration) {
	if longest > 0 {
		time.Sleep(time.Duration(rnd.Int63n(int64(longest))))
	}
}

// Writer writes at random in its stripes of a disk.
type Writer struct {
	d    *Disk
	f    *direct.File
	m    Mix
	n    int64      // of the writers
	Rand *rand.Rand // all chance is of it
}

// NewWriter is the n-th of the writers of a disk that is open as f, for who
// wants to call it step by step.
func NewWriter(d *Disk, f *direct.File, m Mix, n int, seed int64) *Writer {
	m.Block = max(m.Block, SectorSize)
	if m.Largest == 0 {
		m.Largest = direct.BufferSize
	}
	return &Writer{d: d, f: f, m: m, n: int64(n), Rand: rand.New(rand.NewSource(seed))}
}

// Place picks a random piece of one of the writer's stripes, in sectors. Small
// ones are as frequent as large ones.
func (r *Writer) Place() (from, to int64) {
	block := r.m.Block / SectorSize
	stripe := (direct.BufferSize/SectorSize + 8*17) / block * block // sectors
	total := r.d.sectors / block * block
	count := (total + stripe - 1) / stripe
	mine := (count - r.n + int64(r.m.Writers) - 1) / int64(r.m.Writers)
	if mine < 1 {
		panic("disk too small for so many writers")
	}
	k := r.n + int64(r.m.Writers)*r.Rand.Int63n(mine)
	lo := k * stripe
	hi := min(lo+stripe, total)
	longest := min(hi-lo, r.m.Largest/SectorSize) / block
	size := int64(1)
	for size < longest && r.Rand.Intn(8) != 0 {
		size *= 2
	}
	size = (1 + r.Rand.Int63n(min(size, longest))) * block
	from = lo + r.Rand.Int63n((hi-lo-size)/block+1)*block
	return from, from + size
}

// Step does one thing at random: a write, of zeroes too if the mix says so, or a
// read of what was written.
func (r *Writer) Step() error {
	from, to := r.Place()
	buf := direct.Buffers.Get().(*[]byte)
	defer direct.Buffers.Put(buf)
	p := (*buf)[:(to-from)*SectorSize]
	switch k := r.Rand.Intn(16); {
	case k == 0:
		if err := r.f.ReadAt(p, from*SectorSize); err != nil {
			return err
		}
		r.d.w.reads.Add(1)
		return r.d.Compare(p, from)
	case k == 1 && r.m.Zeroes:
		x := r.d.Begin(from, to, true)
		if err := r.f.Zero(from*SectorSize, (to-from)*SectorSize, r.Rand.Intn(2) == 0); err != nil {
			return err
		}
		x.Done()
	default:
		x := r.d.Begin(from, to, false)
		Fill(p, x.Version, r.d.number, from)
		if err := r.f.WriteAt(p, from*SectorSize); err != nil {
			return err
		}
		x.Done()
	}
	return nil
}

// More waits until the writers have written n times more.
func (w *World) More(t testing.TB, n int64) {
	t.Helper()
	n += w.Writes.Load()
	guest.WaitFor(t, "writes to go on", func() bool { return w.Writes.Load() >= n })
}

// Fill writes all of the disks once, so that no sector is zeroes any more.
func (w *World) Fill(paths ...string) error {
	for i, path := range paths {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		buf := direct.Buffers.Get().(*[]byte)
		defer direct.Buffers.Put(buf)
		d := w.Disks[i]
		for from := int64(0); from < d.sectors; from += direct.BufferSize / SectorSize {
			to := min(from+direct.BufferSize/SectorSize, d.sectors)
			p := (*buf)[:(to-from)*SectorSize]
			x := d.Begin(from, to, false)
			Fill(p, x.Version, i, from)
			if _, err := f.WriteAt(p, from*SectorSize); err != nil {
				return err
			}
			x.Done()
		}
	}
	return nil
}
