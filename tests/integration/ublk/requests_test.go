package ublk

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestUblkGeometry checks what the kernel made of the geometry.
func TestUblkGeometry(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		for name, want := range map[string]ublk.Geometry{
			"plain": {Size: 10<<20 + 512, LogicalBlock: 512, PhysicalBlock: 512, IOMin: 512},
			"4k": {Size: 8 << 20, LogicalBlock: 4096, PhysicalBlock: 4096, IOMin: 4096, IOOpt: 1 << 20,
				Rotational: true, ReadOnly: true},
			"all": {Size: 5<<20 + 1536, LogicalBlock: 512, PhysicalBlock: 4096, IOMin: 65536, IOOpt: 262144,
				MaxDiscard: (1<<32 - 512), DiscardGranularity: 8192, MaxWriteZeroes: (1<<32 - 512),
				VolatileCache: true, FUA: true, DMAMask: 511, VirtBoundaryMask: 4095},
		} {
			t.Run(mode.String()+"/"+name, func(t *testing.T) {
				cfg, _ := memoryConfig(t, mode, 1, 4)
				cfg.Geometry = want
				d := add(t, ctl, cfg)
				got, err := ublk.ReadGeometry(d.Path)
				if err != nil {
					t.Fatal(err)
				}
				// Without discard the driver has its own granularity, and only
				// zero copy makes demands on memory.
				if want.MaxDiscard == 0 {
					got.DiscardGranularity = 0
				}
				if mode == ublk.ModeCopy || want.DMAMask == 0 {
					got.DMAMask = want.DMAMask
				}
				if mode == ublk.ModeCopy {
					got.VirtBoundaryMask = want.VirtBoundaryMask
				}
				if got != want {
					t.Errorf("the disk has\n%+v, want\n%+v", got, want)
				}
			})
		}
	}
}

// TestUblkPartitions looks whether the kernel finds a partition.
func TestUblkPartitions(t *testing.T) {
	ctl := openControl(t)
	for _, hide := range []bool{false, true} {
		t.Run(fmt.Sprintf("hide=%v", hide), func(t *testing.T) {
			cfg, _ := memoryConfig(t, ublk.ModeAuto, 1, 8)
			cfg.NoPartScan = hide
			// A table of the old kind with one partition, sectors 2048 to 4095.
			table := make([]byte, 512)
			copy(table[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0})
			copy(table[510:], []byte{0x55, 0xaa})
			if _, err := unix.Pwrite(cfg.Files[0].Fd(), table, 0); err != nil {
				t.Fatal(err)
			}
			d := add(t, ctl, cfg)
			want := !hide
			found := func() bool { _, err := os.Stat(d.Path + "p1"); return err == nil }
			if want {
				guest.WaitFor(t, "the partition", found)
				part := claim(t, d.Path+"p1")
				if err := d.TryStop(guest.Context(t)); !errors.Is(err, ublk.ErrBusy) {
					t.Errorf("try stop with a partition in use: %v", err)
				}
				part.Close()
			} else if time.Sleep(500 * time.Millisecond); found() {
				t.Error("the kernel shows a partition")
			}
			// Whoever looked for partitions may still have the device open.
			guest.WaitFor(t, "the last user", func() bool {
				err := d.TryStop(guest.Context(t))
				if err != nil && !errors.Is(err, ublk.ErrBusy) {
					t.Fatal(err)
				}
				return err == nil
			})
		})
	}
}

// TestUblkOps sends every kind of request.
func TestUblkOps(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			const size = 12 << 30 // sparse: ranges longer than 4 GiB
			cfg, counts := memoryConfig(t, mode, 1, 16)
			cfg.Geometry = geometry(size)
			if err := unix.Ftruncate(cfg.Files[0].Fd(), size); err != nil {
				t.Fatal(err)
			}
			d := add(t, ctl, cfg)
			f := openDisk(t, d.Path, 0)
			buf := direct.Pages(t, 8192)
			for i := range buf {
				buf[i] = byte(i%251) + 1
			}
			at := func(off int64) bool {
				got := make([]byte, len(buf))
				if _, err := unix.Pread(cfg.Files[0].Fd(), got, off); err != nil {
					t.Fatal(err)
				}
				return string(got) == string(buf)
			}
			zero := func(off int64) bool {
				got := make([]byte, len(buf))
				if _, err := unix.Pread(cfg.Files[0].Fd(), got, off); err != nil {
					t.Fatal(err)
				}
				return strings.Count(string(got), "\x00") == len(got)
			}
			count := func(op ublk.Op) int64 { return counts.ops[op].Load() }
			ioctl := func(req uintptr, off, n uint64) {
				t.Helper()
				r := [2]uint64{off, n}
				if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(unsafe.Pointer(&r))); e != 0 {
					t.Fatalf("ioctl %#x: %v", req, e)
				}
			}
			for _, off := range []int64{0, 5 << 30, 9 << 30} {
				if _, err := f.WriteAt(buf, off); err != nil {
					t.Fatal(err)
				}
				if !at(off) {
					t.Fatalf("write at %d did not arrive", off)
				}
			}
			if n := counts.fua.Load(); n != 0 {
				t.Errorf("%d writes with FUA", n)
			}
			dsync := openDisk(t, d.Path, unix.O_DSYNC)
			if _, err := dsync.WriteAt(buf, 1<<20); err != nil {
				t.Fatal(err)
			}
			if n := counts.fua.Load(); n == 0 {
				t.Error("O_DSYNC made no write with FUA")
			}
			flushes := count(ublk.OpFlush)
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if count(ublk.OpFlush) == flushes {
				t.Error("fsync made no flush")
			}
			// 4.5 GiB: more than one request can have.
			ioctl(unix.BLKDISCARD, 4<<30, 4608<<20)
			if n := count(ublk.OpDiscard); n < 2 {
				t.Errorf("%d discards for 4.5 GiB", n)
			}
			if !zero(5<<30) || !at(0) || !at(9<<30) {
				t.Error("the discard did something else")
			}
			ioctl(unix.BLKZEROOUT, 7<<30, 4608<<20)
			if n := count(ublk.OpWriteZeroes); n < 2 || counts.noUnmap.Load() != n {
				t.Errorf("%d write-zeroes for 4.5 GiB, %d of them without unmap", n, counts.noUnmap.Load())
			}
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 1<<20); err != nil {
				t.Fatal(err)
			}
			if count(ublk.OpWriteZeroes) == counts.noUnmap.Load() {
				t.Error("punching a hole made no write-zeroes with unmap")
			}
			if !zero(1 << 20) {
				t.Error("the hole is not empty")
			}
			if !zero(9<<30) || !at(0) {
				t.Error("the write-zeroes did something else")
			}
		})
	}
}

// TestUblkHandlerErrors returns errors to the issuer as they are.
func TestUblkHandlerErrors(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			cfg, counts := memoryConfig(t, mode, 1, 8)
			var errno atomic.Uint32
			file := cfg.Files[0]
			cfg.NewHandler = func(_ int, bq blockdev.Queue) ublk.Handler {
				h := newMemoryDisk(bq, file, 8, counts)
				h.hold = func(r *ublk.Request) bool {
					if e := unix.Errno(errno.Load()); e != 0 {
						r.Complete(e)
						return true
					}
					return false
				}
				return h
			}
			d := add(t, ctl, cfg)
			f := openDisk(t, d.Path, 0)
			buf := direct.Pages(t, 4096)
			for _, e := range []unix.Errno{unix.EIO, unix.ENOSPC} {
				errno.Store(uint32(e))
				if _, err := f.WriteAt(buf, 0); !errors.Is(err, e) {
					t.Errorf("write: %v, want %v", err, e)
				}
				if _, err := f.ReadAt(buf, 0); !errors.Is(err, e) {
					t.Errorf("read: %v, want %v", err, e)
				}
			}
			errno.Store(0)
			if _, err := f.ReadAt(buf, 0); err != nil {
				t.Errorf("read after the errors: %v", err)
			}
		})
	}
}
