package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// ublkResources is what a process and the driver hold.
type ublkResources struct{ fds, threads, mappings, devices int }

func ublkHeld(t testing.TB) ublkResources {
	t.Helper()
	count := func(dir string) int {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return len(entries)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	blocks, _ := filepath.Glob("/sys/block/ublkb*")
	return ublkResources{
		fds:      count("/proc/self/fd"),
		threads:  count("/proc/self/task"),
		mappings: strings.Count(string(maps), "\n"),
		devices:  count("/sys/class/ublk-char") + len(blocks),
	}
}

// ublkSettled waits until nothing above what was held before is held.
func ublkSettled(t testing.TB, before ublkResources, slackThreads int) {
	t.Helper()
	var now ublkResources
	for end := time.Now().Add(guest.Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		now = ublkHeld(t)
		if now.fds <= before.fds && now.devices <= before.devices && now.threads <= before.threads+slackThreads &&
			now.mappings <= before.mappings+4*slackThreads+4 {
			return
		}
	}
	t.Errorf("left behind: now %+v, before %+v", now, before)
}

func TestUblkLifeCycle(t *testing.T) {
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			cfg, _ := ublkConfig(t, mode, min(2, ublk.MaxQueues()), 16)
			round := func(i int) {
				ctx := ublkContext(t)
				d, err := ublk.Add(ctx, ctl, cfg)
				if err != nil {
					t.Fatalf("round %d: %v", i, err)
				}
				f, err := os.OpenFile(d.Path, os.O_RDWR|unix.O_DIRECT, 0)
				if err != nil {
					t.Fatalf("round %d: %v", i, err)
				}
				buf := direct.Pages(t, 4096)
				if _, err := f.WriteAt(buf, int64(i)*4096); err != nil {
					t.Fatalf("round %d: %v", i, err)
				}
				f.Close()
				if i%2 == 0 {
					if err := d.TryStop(ctx); err != nil {
						t.Fatalf("round %d: %v", i, err)
					}
				}
				if err := d.Delete(ctx); err != nil {
					t.Fatalf("round %d: %v", i, err)
				}
				if err := d.Delete(ctx); err != nil {
					t.Fatalf("round %d: second delete: %v", i, err)
				}
			}
			// The first rounds leave threads and memory that the runtime uses
			// again.
			for i := range 4 {
				round(i)
			}
			procs := runtime.GOMAXPROCS(0)
			before := ublkHeld(t)
			goroutines := runtime.NumGoroutine()
			for i := range 50 {
				round(i)
			}
			ublkSettled(t, before, 3)
			if n := runtime.NumGoroutine(); n > goroutines {
				t.Errorf("%d goroutines, %d before", n, goroutines)
			}
			if n := runtime.GOMAXPROCS(0); n != procs {
				t.Errorf("GOMAXPROCS %d, %d before", n, procs)
			}
		})
	}
}

func TestUblkStopUnderIO(t *testing.T) {
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		for _, recovery := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/recovery=%v", mode, recovery), func(t *testing.T) {
				cfg, _ := ublkConfig(t, mode, 1, 32)
				cfg.Recovery = recovery
				d := ublkAdd(t, ctl, cfg)
				var stop atomic.Bool
				var done, failed atomic.Int64
				var wg sync.WaitGroup
				for w := range 8 {
					f := ublkOpen(t, d.Path, 0)
					buf := direct.Pages(t, 64<<10)
					wg.Add(1)
					go func() {
						defer wg.Done()
						defer f.Close()
						for i := int64(0); !stop.Load(); i++ {
							_, err := f.WriteAt(buf, (i*8+int64(w))%512*(64<<10))
							if err != nil {
								failed.Add(1)
								return
							}
							done.Add(1)
						}
					}()
				}
				guest.WaitFor(t, "writes", func() bool { return done.Load() >= 100 })
				if err := d.Delete(ublkContext(t)); err != nil {
					t.Fatal(err)
				}
				// Every writer gets an error; none hangs.
				wg.Wait()
				if failed.Load() != 8 {
					t.Errorf("%d of 8 writers saw the end", failed.Load())
				}
				guest.WaitFor(t, "the end of the device", func() bool {
					_, err := ctl.Info(ublkContext(t), d.ID)
					return errors.Is(err, unix.ENODEV)
				})
			})
		}
	}
}

// TestUblkDeleteWhileOpen deletes a device that somebody keeps open.
func TestUblkDeleteWhileOpen(t *testing.T) {
	ctl := ublkControl(t)
	cfg, _ := ublkConfig(t, ublk.ModeCopy, 1, 4)
	d := ublkAdd(t, ctl, cfg)
	f := ublkOpen(t, d.Path, 0)
	if err := d.Delete(ublkContext(t)); err != nil {
		t.Fatal(err)
	}
	buf := direct.Pages(t, 4096)
	if _, err := f.ReadAt(buf, 0); err == nil {
		t.Error("read of a deleted disk succeeded")
	}
	f.Close()
	guest.WaitFor(t, "the end of the device after its last close", func() bool {
		_, err := ctl.Info(ublkContext(t), d.ID)
		return errors.Is(err, unix.ENODEV)
	})
}

func TestUblkTryStop(t *testing.T) {
	ctl := ublkControl(t)
	cfg, _ := ublkConfig(t, ublk.ModeAuto, 1, 16)
	cfg.Recovery = true
	file := cfg.Files[0]
	d := ublkAdd(t, ctl, cfg)

	// Written through the page cache and not synced by the writer; open in
	// another process, too.
	f, err := os.OpenFile(d.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []byte("written and never synced")
	if _, err := f.WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	other := exec.Command("sleep", "60")
	other.Stdin = f
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	err = d.TryStop(ublkContext(t))
	if !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), "sleep (process") {
		t.Errorf("try stop of an open disk: %v", err)
	}
	other.Process.Kill()
	other.Wait()

	// Claimed, as by a mount.
	d2cfg, _ := ublkConfig(t, ublk.ModeAuto, 1, 16)
	d2 := ublkAdd(t, ctl, d2cfg)
	held := ublkClaim(t, d2.Path)
	if err := d2.TryStop(ublkContext(t)); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("try stop of a claimed disk: %v", err)
	}
	held.Close()
	if err := d2.TryStop(ublkContext(t)); err != nil {
		t.Errorf("try stop of a free disk: %v", err)
	}

	if err := d.TryStop(ublkContext(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := unix.Pread(file.Fd(), got, 8192); err != nil || string(got) != string(want) {
		t.Errorf("after the stop the disk has %q, %v; want %q", got, err, want)
	}
}

func TestUblkErrors(t *testing.T) {
	ctl := ublkControl(t)
	ctx := ublkContext(t)
	base, _ := ublkConfig(t, ublk.ModeCopy, 1, 8)
	first := ublkAdd(t, ctl, base)
	before := ublkHeld(t)

	unopened := blockdev.NewOSFile(1<<19, "never opened")
	cases := map[string]struct {
		change func(*ublk.Config)
		want   string
	}{
		"number taken":       {func(c *ublk.Config) { c.ID = first.ID }, "file exists"},
		"number too large":   {func(c *ublk.Config) { c.ID = 1 << 20 }, "device number"},
		"no queues":          {func(c *ublk.Config) { c.Queues = 0 }, "want 1 to"},
		"too many queues":    {func(c *ublk.Config) { c.Queues = ublk.MaxQueues() + 1 }, "want 1 to"},
		"no depth":           {func(c *ublk.Config) { c.Depth = 0 }, "want 1 to 4096"},
		"depth too large":    {func(c *ublk.Config) { c.Depth = ublk.MaxDepth + 1 }, "want 1 to 4096"},
		"odd request size":   {func(c *ublk.Config) { c.MaxIO = 5000 }, "multiple of 4096"},
		"no size":            {func(c *ublk.Config) { c.Geometry.Size = 0 }, "size of 0"},
		"blocks too large":   {func(c *ublk.Config) { c.Geometry.LogicalBlock = 8192 }, "power of two"},
		"a file is not open": {func(c *ublk.Config) { c.Files = []*blockdev.OSFile{unopened} }, "place 1 was refused"},
		"no handler":         {func(c *ublk.Config) { c.NewHandler = nil }, "no handler"},
		"unknown mode":       {func(c *ublk.Config) { c.Mode = 9 }, "unknown payload mode"},
		"too little memory":  {func(c *ublk.Config) { c.Depth, c.MaxIO = 4096, 32<<20 }, "memory"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cfg := base
			c.change(&cfg)
			d, err := ublk.Add(ctx, ctl, cfg)
			if err == nil {
				d.Delete(ctx)
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q, want %q in it", err, c.want)
			}
			t.Log(err)
		})
	}
	// A context that has ended: the device is made and unmade.
	t.Run("context ended", func(t *testing.T) {
		ended, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := ublk.Add(ended, ctl, base); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
	ublkSettled(t, before, 3)

	if _, err := ctl.Info(ctx, 1<<19); !errors.Is(err, unix.ENODEV) {
		t.Errorf("info of no device: %v", err)
	}
	if err := ctl.DeleteDevice(ctx, first.ID); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("delete of a live device: %v", err)
	}
}

func TestUblkList(t *testing.T) {
	ctl := ublkControl(t)
	cfg, _ := ublkConfig(t, ublk.ModeAuto, 1, 7)
	cfg.Tag = ublk.NewTag(0x5a)
	d := ublkAdd(t, ctl, cfg)
	list, err := ctl.List(ublkContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		kind, ours := ublk.IsOurs(i.Tag)
		if i.ID == d.ID {
			if !ours || kind != 0x5a || i.State != ublk.Live || i.Queues != 1 || i.Depth != 7 ||
				i.MaxIO != ublk.DefaultMaxIO || i.PID != os.Getpid() {
				t.Errorf("listed as %+v", i)
			}
			return
		}
	}
	t.Errorf("device %d not in %+v", d.ID, list)
}

// TestUblkGeometry checks what the kernel made of the geometry.
func TestUblkGeometry(t *testing.T) {
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		for name, want := range map[string]ublk.Geometry{
			"plain": {Size: 10<<20 + 512, LogicalBlock: 512, PhysicalBlock: 512, IOMin: 512},
			"4k": {Size: 8 << 20, LogicalBlock: 4096, PhysicalBlock: 4096, IOMin: 4096, IOOpt: 1 << 20,
				Rotational: true, ReadOnly: true},
			"all": {Size: 5<<20 + 1536, LogicalBlock: 512, PhysicalBlock: 4096, IOMin: 65536, IOOpt: 262144,
				MaxDiscard: (1<<32 - 512), DiscardGranularity: 8192, MaxWriteZeroes: (1<<32 - 512),
				VolatileCache: true, FUA: true, DMAMask: 511, VirtBoundaryMask: 4095},
		} {
			t.Run(mode.String()+"/"+name, func(t *testing.T) {
				cfg, _ := ublkConfig(t, mode, 1, 4)
				cfg.Geometry = want
				d := ublkAdd(t, ctl, cfg)
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

// TestUblkOps sends every kind of request.
func TestUblkOps(t *testing.T) {
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			const size = 12 << 30 // sparse: ranges longer than 4 GiB
			cfg, counts := ublkConfig(t, mode, 1, 16)
			cfg.Geometry = ublkGeometry(size)
			if err := unix.Ftruncate(cfg.Files[0].Fd(), size); err != nil {
				t.Fatal(err)
			}
			d := ublkAdd(t, ctl, cfg)
			f := ublkOpen(t, d.Path, 0)
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
			dsync := ublkOpen(t, d.Path, unix.O_DSYNC)
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
	ctl := ublkControl(t)
	for _, mode := range ublkModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			cfg, counts := ublkConfig(t, mode, 1, 8)
			var errno atomic.Uint32
			file := cfg.Files[0]
			cfg.NewHandler = func(_ int, bq blockdev.Queue) ublk.Handler {
				h := newUblkMemory(bq, file, 8, counts)
				h.hold = func(r *ublk.Request) bool {
					if e := unix.Errno(errno.Load()); e != 0 {
						r.Complete(e)
						return true
					}
					return false
				}
				return h
			}
			d := ublkAdd(t, ctl, cfg)
			f := ublkOpen(t, d.Path, 0)
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

// TestUblkStopWaits stops a device whose handler keeps a request.
func TestUblkStopWaits(t *testing.T) {
	ctl := ublkControl(t)
	cfg, counts := ublkConfig(t, ublk.ModeAuto, 1, 8)
	file := cfg.Files[0]
	held := make(chan func(), 1)
	cfg.NewHandler = func(_ int, bq blockdev.Queue) ublk.Handler {
		h := newUblkMemory(bq, file, 8, counts)
		h.hold = func(r *ublk.Request) bool {
			if r.Op != ublk.OpWrite {
				return false
			}
			task := &blockdev.Task{Run: func() { h.start(r) }}
			held <- func() { bq.Post(task) }
			return true
		}
		return h
	}
	d := ublkAdd(t, ctl, cfg)
	f := ublkOpen(t, d.Path, 0)
	buf := direct.Pages(t, 4096)
	wrote := make(chan error, 1)
	go func() {
		_, err := f.WriteAt(buf, 0)
		wrote <- err
	}()
	release := <-held
	// Again and again, more often than there is room for commands that hang.
	for range 30 {
		short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := d.Delete(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("delete with a request in hand: %v", err)
		}
		cancel()
	}
	// The driver is busy with that stop; others must get through.
	if _, err := ctl.Info(ublkContext(t), 1<<19); !errors.Is(err, unix.ENODEV) {
		t.Errorf("another command meanwhile: %v", err)
	}
	other, _ := ublkConfig(t, ublk.ModeAuto, 1, 8)
	ublkAdd(t, ctl, other)
	release()
	if err := <-wrote; err != nil {
		t.Errorf("the write in hand: %v", err)
	}
	f.Close()
	if err := d.Delete(ublkContext(t)); err != nil {
		t.Errorf("the last delete: %v", err)
	}
}

// TestUblkPartitions looks whether the kernel finds a partition.
func TestUblkPartitions(t *testing.T) {
	ctl := ublkControl(t)
	for _, hide := range []bool{false, true} {
		t.Run(fmt.Sprintf("hide=%v", hide), func(t *testing.T) {
			cfg, _ := ublkConfig(t, ublk.ModeAuto, 1, 8)
			cfg.NoPartScan = hide
			// A table of the old kind with one partition, sectors 2048 to 4095.
			table := make([]byte, 512)
			copy(table[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0})
			copy(table[510:], []byte{0x55, 0xaa})
			if _, err := unix.Pwrite(cfg.Files[0].Fd(), table, 0); err != nil {
				t.Fatal(err)
			}
			d := ublkAdd(t, ctl, cfg)
			// Where the driver cannot leave the table alone it looks all the same.
			want := !hide || !ctl.Has(uapi.UBLK_F_NO_AUTO_PART_SCAN)
			found := func() bool { _, err := os.Stat(d.Path + "p1"); return err == nil }
			if want {
				guest.WaitFor(t, "the partition", found)
				part := ublkClaim(t, d.Path+"p1")
				if err := d.TryStop(ublkContext(t)); !errors.Is(err, ublk.ErrBusy) {
					t.Errorf("try stop with a partition in use: %v", err)
				}
				part.Close()
			} else if time.Sleep(500 * time.Millisecond); found() {
				t.Error("the kernel shows a partition")
			}
			// Whoever looked for partitions may still have the device open.
			guest.WaitFor(t, "the last user", func() bool {
				err := d.TryStop(ublkContext(t))
				if err != nil && !errors.Is(err, ublk.ErrBusy) {
					t.Fatal(err)
				}
				return err == nil
			})
		})
	}
}
