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

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// resources is what a process and the driver hold.
type resources struct{ fds, threads, mappings, devices int }

func heldNow(t testing.TB) resources {
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
	return resources{
		fds:      count("/proc/self/fd"),
		threads:  count("/proc/self/task"),
		mappings: strings.Count(string(maps), "\n"),
		devices:  count("/sys/class/ublk-char") + len(blocks),
	}
}

// settled waits until nothing above what was held before is held.
func settled(t testing.TB, before resources, slackThreads int) {
	t.Helper()
	var now resources
	for end := time.Now().Add(guest.Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		now = heldNow(t)
		if now.fds <= before.fds && now.devices <= before.devices && now.threads <= before.threads+slackThreads &&
			now.mappings <= before.mappings+4*slackThreads+4 {
			return
		}
	}
	t.Errorf("left behind: now %+v, before %+v", now, before)
}

func TestUblkLifeCycle(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			cfg, _ := memoryConfig(t, mode, min(2, ublk.MaxQueues()), 16)
			round := func(i int) {
				ctx := guest.Context(t)
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
			before := heldNow(t)
			goroutines := runtime.NumGoroutine()
			for i := range 50 {
				round(i)
			}
			settled(t, before, 3)
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
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		for _, recovery := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/recovery=%v", mode, recovery), func(t *testing.T) {
				cfg, _ := memoryConfig(t, mode, 1, 32)
				cfg.Recovery = recovery
				d := add(t, ctl, cfg)
				var stop atomic.Bool
				var done, failed atomic.Int64
				var wg sync.WaitGroup
				for w := range 8 {
					f := openDisk(t, d.Path, 0)
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
				if err := d.Delete(guest.Context(t)); err != nil {
					t.Fatal(err)
				}
				// Every writer gets an error; none hangs.
				wg.Wait()
				if failed.Load() != 8 {
					t.Errorf("%d of 8 writers saw the end", failed.Load())
				}
				guest.WaitFor(t, "the end of the device", func() bool {
					_, err := ctl.Info(guest.Context(t), d.ID)
					return errors.Is(err, unix.ENODEV)
				})
			})
		}
	}
}

// TestUblkDeleteWhileOpen deletes a device that somebody keeps open.
func TestUblkDeleteWhileOpen(t *testing.T) {
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeCopy, 1, 4)
	d := add(t, ctl, cfg)
	f := openDisk(t, d.Path, 0)
	if err := d.Delete(guest.Context(t)); err != nil {
		t.Fatal(err)
	}
	buf := direct.Pages(t, 4096)
	if _, err := f.ReadAt(buf, 0); err == nil {
		t.Error("read of a deleted disk succeeded")
	}
	f.Close()
	guest.WaitFor(t, "the end of the device after its last close", func() bool {
		_, err := ctl.Info(guest.Context(t), d.ID)
		return errors.Is(err, unix.ENODEV)
	})
}

func TestUblkTryStop(t *testing.T) {
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeAuto, 1, 16)
	cfg.Recovery = true
	file := cfg.Files[0]
	d := add(t, ctl, cfg)

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
	err = d.TryStop(guest.Context(t))
	if !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), "sleep (process") {
		t.Errorf("try stop of an open disk: %v", err)
	}
	other.Process.Kill()
	other.Wait()

	// Claimed, as by a mount.
	d2cfg, _ := memoryConfig(t, ublk.ModeAuto, 1, 16)
	d2 := add(t, ctl, d2cfg)
	held := claim(t, d2.Path)
	if err := d2.TryStop(guest.Context(t)); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("try stop of a claimed disk: %v", err)
	}
	held.Close()
	if err := d2.TryStop(guest.Context(t)); err != nil {
		t.Errorf("try stop of a free disk: %v", err)
	}

	if err := d.TryStop(guest.Context(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := unix.Pread(file.Fd(), got, 8192); err != nil || string(got) != string(want) {
		t.Errorf("after the stop the disk has %q, %v; want %q", got, err, want)
	}
}

func TestUblkErrors(t *testing.T) {
	ctl := openControl(t)
	ctx := guest.Context(t)
	base, _ := memoryConfig(t, ublk.ModeCopy, 1, 8)
	first := add(t, ctl, base)
	before := heldNow(t)

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
	settled(t, before, 3)

	if _, err := ctl.Info(ctx, 1<<19); !errors.Is(err, unix.ENODEV) {
		t.Errorf("info of no device: %v", err)
	}
	if err := ctl.DeleteDevice(ctx, first.ID); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("delete of a live device: %v", err)
	}
}

func TestUblkList(t *testing.T) {
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeAuto, 1, 7)
	cfg.Tag = ublk.NewTag(0x5a)
	d := add(t, ctl, cfg)
	list, err := ctl.List(guest.Context(t))
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

// TestUblkStopWaits stops a device whose handler keeps a request.
func TestUblkStopWaits(t *testing.T) {
	ctl := openControl(t)
	cfg, counts := memoryConfig(t, ublk.ModeAuto, 1, 8)
	file := cfg.Files[0]
	held := make(chan func(), 1)
	cfg.NewHandler = func(_ int, bq blockdev.Queue) ublk.Handler {
		h := newMemoryDisk(bq, file, 8, counts)
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
	d := add(t, ctl, cfg)
	f := openDisk(t, d.Path, 0)
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
	if _, err := ctl.Info(guest.Context(t), 1<<19); !errors.Is(err, unix.ENODEV) {
		t.Errorf("another command meanwhile: %v", err)
	}
	other, _ := memoryConfig(t, ublk.ModeAuto, 1, 8)
	add(t, ctl, other)
	release()
	if err := <-wrote; err != nil {
		t.Errorf("the write in hand: %v", err)
	}
	f.Close()
	if err := d.Delete(guest.Context(t)); err != nil {
		t.Errorf("the last delete: %v", err)
	}
}
