package ublk

import (
	"context"
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// openControl opens the driver's control device.
func openControl(t testing.TB) *ublk.Control {
	t.Helper()
	guest.Need(t)
	ctl, err := ublk.OpenControl()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ctl.Close)
	return ctl
}

// payloadModes are the payload modes that the driver has.
func payloadModes(ctl *ublk.Control) []ublk.Mode {
	modes := []ublk.Mode{ublk.ModeCopy}
	for _, p := range ctl.Probes() {
		if p.Name == "AUTO_BUF_REG" && p.Answer == ublk.Yes {
			modes = append(modes, ublk.ModeZeroCopy)
		}
	}
	return modes
}

// requestCounts counts what a handler was asked.
type requestCounts struct {
	ops     [8]atomic.Int64
	fua     atomic.Int64
	noUnmap atomic.Int64
}

// memoryDisk is a disk in memory: every request is the same operation on an
// anonymous file, which works whether or not payloads can be seen.
type memoryDisk struct {
	bq     blockdev.Queue
	ops    []blockdev.Op
	reqs   []*ublk.Request
	counts *requestCounts
	hold   func(r *ublk.Request) bool // true: leave the request alone
}

func newMemoryDisk(bq blockdev.Queue, file blockdev.File, depth int, counts *requestCounts) *memoryDisk {
	h := &memoryDisk{bq: bq, ops: make([]blockdev.Op, depth), reqs: make([]*ublk.Request, depth), counts: counts}
	for tag := range h.ops {
		h.ops[tag] = blockdev.Op{File: file, Done: func(op *blockdev.Op) { h.reqs[tag].Complete(op.Err) }}
	}
	return h
}

func (h *memoryDisk) Handle(r *ublk.Request) {
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

func (h *memoryDisk) start(r *ublk.Request) {
	op := &h.ops[r.Tag]
	op.Kind = [...]blockdev.Kind{blockdev.Read, blockdev.Write, blockdev.Flush, blockdev.Discard, blockdev.WriteZeroes}[r.Op]
	op.FUA = r.FUA
	op.Off, op.Len, op.Buf = r.Off, r.Len, r.Buf
	h.bq.Submit(op)
}

// memfd is an anonymous file of the given size.
func memfd(t testing.TB, size int64) *blockdev.OSFile {
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

// diskSize is the size of the disks here, in bytes.
const diskSize = 64 << 20

func geometry(size int64) ublk.Geometry {
	return ublk.Geometry{
		Size: size, LogicalBlock: 512, PhysicalBlock: 4096,
		MaxDiscard: 1 << 40, DiscardGranularity: 4096, MaxWriteZeroes: 1 << 40,
		VolatileCache: true, FUA: true, DMAMask: 511,
	}
}

// memoryConfig is a disk in memory.
func memoryConfig(t testing.TB, mode ublk.Mode, queues, depth int) (ublk.Config, *requestCounts) {
	t.Helper()
	file := memfd(t, diskSize)
	counts := &requestCounts{}
	return ublk.Config{
		Name: "test", Tag: ublk.NewTag('t'), ID: ublk.AnyID,
		Queues: queues, Depth: depth, MaxIO: ublk.DefaultMaxIO, Mode: mode,
		Geometry: geometry(diskSize),
		Files:    []*blockdev.OSFile{file},
		OpenedBy: func(n blockdev.Num) string {
			if who := disk.Machine().Openers(n); len(who) > 0 {
				return who[0].String()
			}
			return ""
		},
		NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler {
			return newMemoryDisk(bq, file, depth, counts)
		},
	}, counts
}

// add makes a device that the test's end deletes.
func add(t testing.TB, ctl *ublk.Control, cfg ublk.Config) *ublk.Device {
	t.Helper()
	d, err := ublk.Add(guest.Context(t), ctl, cfg)
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

// openDisk opens a disk without the page cache.
func openDisk(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// claim opens a disk as a mount or a device on it does.
func claim(t testing.TB, path string) *blockdev.OSFile {
	t.Helper()
	f, err := blockdev.OpenExclusive(path, path, unix.O_RDWR|unix.O_DIRECT)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
