package ublk

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"os"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// ublkVM skips a test that needs the ublk driver where there is none.
func ublkVM(t testing.TB) {
	t.Helper()
	if os.Getenv("UBLK_BLKSNAP_VM") != "1" {
		t.Skip("needs root and ublk: make integration")
	}
}

func ublkContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), guest.Patience)
	t.Cleanup(cancel)
	return ctx
}

func ublkControl(t testing.TB) *ublk.Control {
	t.Helper()
	ublkVM(t)
	ctl, err := ublk.OpenControl()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ctl.Close)
	return ctl
}

// ublkModes are the payload modes that the driver has.
func ublkModes(ctl *ublk.Control) []ublk.Mode {
	modes := []ublk.Mode{ublk.ModeCopy}
	for _, p := range ctl.Probes() {
		if p.Name == "AUTO_BUF_REG" && p.Answer == ublk.Yes {
			modes = append(modes, ublk.ModeZeroCopy)
		}
	}
	return modes
}

// ublkCounts counts what a handler was asked.
type ublkCounts struct {
	ops     [8]atomic.Int64
	fua     atomic.Int64
	noUnmap atomic.Int64
}

// ublkMemory is a disk in memory: every request is the same operation on an
// anonymous file, which works whether or not payloads can be seen.
type ublkMemory struct {
	bq     blockdev.Queue
	ops    []blockdev.Op
	reqs   []*ublk.Request
	counts *ublkCounts
	hold   func(r *ublk.Request) bool // true: leave the request alone
}

func newUblkMemory(bq blockdev.Queue, file blockdev.File, depth int, counts *ublkCounts) *ublkMemory {
	h := &ublkMemory{bq: bq, ops: make([]blockdev.Op, depth), reqs: make([]*ublk.Request, depth), counts: counts}
	for tag := range h.ops {
		h.ops[tag] = blockdev.Op{File: file, Done: func(op *blockdev.Op) { h.reqs[tag].Complete(op.Err) }}
	}
	return h
}

func (h *ublkMemory) Handle(r *ublk.Request) {
	h.counts.ops[r.Op].Add(1)
	if r.FUA {
		h.counts.fua.Add(1)
	}
	if r.NoUnmap {
		h.counts.noUnmap.Add(1)
	}
	h.reqs[r.Tag] = r
	if h.hold != nil && h.hold(r) {
		return
	}
	h.start(r)
}

func (h *ublkMemory) start(r *ublk.Request) {
	op := &h.ops[r.Tag]
	op.Kind = [...]blockdev.Kind{blockdev.Read, blockdev.Write, blockdev.Flush, blockdev.Discard, blockdev.WriteZeroes}[r.Op]
	op.FUA = r.FUA
	op.Off, op.Len, op.Buf = r.Off, r.Len, r.Buf
	h.bq.Submit(op)
}

// ublkMemfd is an anonymous file of the given size.
func ublkMemfd(t testing.TB, size int64) *blockdev.OSFile {
	t.Helper()
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := blockdev.NewOSFile(fd, "memory")
	t.Cleanup(func() { f.Close() })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return f
}

const ublkSize = 64 << 20

func ublkGeometry(size int64) ublk.Geometry {
	return ublk.Geometry{
		Size: size, LogicalBlock: 512, PhysicalBlock: 4096,
		MaxDiscard: 1 << 40, DiscardGranularity: 4096, MaxWriteZeroes: 1 << 40,
		VolatileCache: true, FUA: true, DMAMask: 511,
	}
}

// ublkConfig is a disk in memory.
func ublkConfig(t testing.TB, mode ublk.Mode, queues, depth int) (ublk.Config, *ublkCounts) {
	t.Helper()
	file := ublkMemfd(t, ublkSize)
	counts := &ublkCounts{}
	return ublk.Config{
		Name: "test", Tag: ublk.NewTag('t'), ID: ublk.AnyID,
		Queues: queues, Depth: depth, MaxIO: ublk.DefaultMaxIO, Mode: mode,
		Geometry: ublkGeometry(ublkSize),
		Files:    []*blockdev.OSFile{file},
		OpenedBy: func(n blockdev.Num) string {
			if who := disk.Machine().Openers(n); len(who) > 0 {
				return who[0].String()
			}
			return ""
		},
		NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler {
			return newUblkMemory(bq, file, depth, counts)
		},
	}, counts
}

func ublkAdd(t testing.TB, ctl *ublk.Control, cfg ublk.Config) *ublk.Device {
	t.Helper()
	d, err := ublk.Add(ublkContext(t), ctl, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), guest.Patience)
		defer cancel()
		if err := d.Delete(ctx); err != nil {
			t.Errorf("delete: %v", err)
		}
	})
	return d
}

// ublkOpen opens a disk without the page cache.
func ublkOpen(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// ublkClaim opens a disk as a mount or a device on it does.
func ublkClaim(t testing.TB, path string) *blockdev.OSFile {
	t.Helper()
	f, err := blockdev.OpenExclusive(path, path, unix.O_RDWR|unix.O_DIRECT)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// ublkVerify writes and reads random pieces with several writers, each in its
// own part of the disk, and compares with what it wrote.
func ublkVerify(t testing.TB, path string, writers, rounds int) {
	t.Helper()
	part := ublkSize / writers &^ 4095
	noise := make([]byte, 2<<20) // any 1 MiB of it is unlike any other
	rand.New(rand.NewSource(99)).Read(noise)
	var wg sync.WaitGroup
	errs := make(chan error, writers)
	for w := range writers {
		f := ublkOpen(t, path, 0)
		buf := direct.Pages(t, 1<<20)
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewSource(int64(w)))
			shadow := make([]byte, part)
			base := int64(w) * int64(part)
			for range rounds {
				n := (1 + rnd.Intn(256)) * 512
				if rnd.Intn(16) == 0 {
					n = 1 << 20 // longer than a request
				}
				off := rnd.Intn((part-n)/512+1) * 512
				if rnd.Intn(2) == 0 {
					copy(buf[:n], noise[rnd.Intn(1<<20):])
					copy(shadow[off:], buf[:n])
					if _, err := f.WriteAt(buf[:n], base+int64(off)); err != nil {
						errs <- err
						return
					}
				}
				clear(buf[:n])
				if _, err := f.ReadAt(buf[:n], base+int64(off)); err != nil {
					errs <- err
					return
				}
				if !bytes.Equal(buf[:n], shadow[off:off+n]) {
					errs <- fmt.Errorf("writer %d: %d bytes at %d differ", w, n, off)
					return
				}
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

func TestUblkData(t *testing.T) {
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		for _, shape := range []struct{ queues, depth int }{{1, 1}, {1, 128}, {2, 32}} {
			t.Run(fmt.Sprintf("%s/%dx%d", mode, shape.queues, shape.depth), func(t *testing.T) {
				cfg, counts := ublkConfig(t, mode, shape.queues, shape.depth)
				d := ublkAdd(t, ctl, cfg)
				if d.Mode != mode {
					t.Fatalf("mode %s, want %s", d.Mode, mode)
				}
				ublkVerify(t, d.Path, 8, 60)
				if counts.ops[ublk.OpRead].Load() == 0 || counts.ops[ublk.OpWrite].Load() == 0 {
					t.Error("no requests counted")
				}
				if n := d.Unregistered(); n != 0 {
					t.Errorf("%d payloads not registered", n)
				}
			})
		}
	}
}

// TestUblkRegistration has the kernel fail to register payloads with their
// requests, for the place is taken: they are registered later, by a command,
// and no request fails of it.
func TestUblkRegistration(t *testing.T) {
	ctl := ublkControl(t)
	if !slices.Contains(ublkModes(ctl), ublk.ModeZeroCopy) {
		t.Skip("needs kernel 6.16: no zero copy")
	}
	cfg, _ := ublkConfig(t, ublk.ModeZeroCopy, 1, 1)
	newHandler := cfg.NewHandler
	var queue blockdev.Queue
	cfg.NewHandler = func(i int, bq blockdev.Queue) ublk.Handler {
		queue = bq
		return newHandler(i, bq)
	}
	d := ublkAdd(t, ctl, cfg)
	// No other package has business with the ring's table of buffers.
	ring := (*uring.Ring)(reflect.ValueOf(queue).Elem().FieldByName("ring").UnsafePointer())
	own := direct.Pages(t, 4096)
	place := func(mem []byte) {
		done := make(chan error)
		queue.Post(&blockdev.Task{Run: func() { done <- ring.UpdateBuffers(0, [][]byte{mem}) }})
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	f := ublkOpen(t, d.Path, 0)
	buf, back := direct.Pages(t, 8192), direct.Pages(t, 8192)
	for i := range 50 {
		for j := range buf {
			buf[j] = byte(i + j>>9)
		}
		for _, io := range []func() (int, error){
			func() (int, error) { return f.WriteAt(buf, int64(i)*8192) },
			func() (int, error) { return f.ReadAt(back, int64(i)*8192) },
		} {
			place(own)
			ended := make(chan error)
			go func() {
				_, err := io()
				ended <- err
			}()
			select {
			case err := <-ended:
				t.Fatalf("request ended without a payload: %v", err)
			case <-time.After(5 * time.Millisecond):
			}
			place(nil)
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(buf, back) {
			t.Fatalf("round %d: what was read differs", i)
		}
	}
	if n := d.Unregistered(); n != 0 {
		t.Errorf("%d requests failed", n)
	}
	clear(buf)
	for i := range 50 {
		if _, err := f.WriteAt(buf, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	ublkVerify(t, d.Path, 4, 20) // as ever
}
