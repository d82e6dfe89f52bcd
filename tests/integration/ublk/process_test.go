package ublk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// procStatus is a line of /proc/self/status, in KiB.
func procStatus(t testing.TB, name string) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			fmt.Sscanf(rest, "%d", &kib)
			return kib
		}
	}
	t.Fatalf("no %s in /proc/self/status", name)
	return 0
}

// TestUblkProcess prepares a process of its own and looks at it; the device
// tests below it run in it too.
func TestUblkProcess(t *testing.T) {
	guest.Need(t)
	if os.Getenv("UBLK_TEST_PREPARED") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestUblkProcess$", "-test.v")
		cmd.Env = append(os.Environ(), "UBLK_TEST_PREPARED=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	before := procStatus(t, "VmRSS")
	for _, err := range ublk.PrepareProcess() {
		if strings.Contains(err.Error(), "cgo") {
			t.Log(err) // the test program's affair
			continue
		}
		t.Error(err)
	}
	if n := procStatus(t, "VmLck"); n == 0 {
		t.Error("no memory is locked")
	}
	if n := procStatus(t, "VmRSS"); n > before+(64<<10) {
		t.Errorf("locking took %d MiB", (n-before)>>10)
	}
	if b, err := os.ReadFile("/proc/self/oom_score_adj"); err != nil || strings.TrimSpace(string(b)) != "-1000" {
		t.Errorf("oom_score_adj %q, %v", b, err)
	}
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeCopy, 1, 16)
	d := add(t, ctl, cfg)
	verify(t, d.Path, 2, 20)
	// Memory that the runtime gave back must come back to it.
	for range 20 {
		_ = make([]byte, 8<<20)
	}
	debug.FreeOSMemory()
	runtime.GC()
	t.Logf("resident %d MiB, %d MiB before; locked ranges %d MiB", procStatus(t, "VmRSS")>>10, before>>10, procStatus(t, "VmLck")>>10)
}

// TestUblkSteady serves many requests and counts what the Go runtime did.
func TestUblkSteady(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			cfg, counts := memoryConfig(t, mode, 1, 32)
			d := add(t, ctl, cfg)
			// Another process makes the requests, so that this one only serves.
			load := func(n int) {
				t.Helper()
				out, err := exec.Command("dd", "if="+d.Path, "of=/dev/null", "bs=4k", fmt.Sprint("count=", n), "iflag=direct").CombinedOutput()
				if err != nil {
					t.Fatalf("dd: %v: %s", err, out)
				}
			}
			load(500)
			var m0, m1 runtime.MemStats
			goroutines := runtime.NumGoroutine()
			runtime.ReadMemStats(&m0)
			served := counts.ops[ublk.OpRead].Load()
			load(3000)
			runtime.ReadMemStats(&m1)
			served = counts.ops[ublk.OpRead].Load() - served
			if served < 3000 {
				t.Fatalf("only %d requests", served)
			}
			// Starting dd takes a hundred.
			if n := m1.Mallocs - m0.Mallocs; n > 500 {
				t.Errorf("%d allocations for %d requests", n, served)
			} else {
				t.Logf("%d allocations for %d requests", n, served)
			}
			// Those that read what dd says may be on their way out.
			guest.WaitFor(t, "as many goroutines as before", func() bool { return runtime.NumGoroutine() <= goroutines })
		})
	}
}

// TestUblkCollect collects garbage all the time while queues work and sleep.
func TestUblkCollect(t *testing.T) {
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeAuto, ublk.MaxQueues(), 16)
	d := add(t, ctl, cfg)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Add(1)
	var longest time.Duration
	go func() {
		defer wg.Done()
		for !stop.Load() {
			start := time.Now()
			runtime.GC()
			longest = max(longest, time.Since(start))
		}
	}()
	for range 3 {
		verify(t, d.Path, 4, 15)
		time.Sleep(20 * time.Millisecond)
	}
	stop.Store(true)
	wg.Wait()
	// A millisecond on a quiet machine. A queue that does not let itself be
	// stopped would take for ever.
	t.Logf("longest collection: %v", longest)
	if longest > guest.Patience {
		t.Errorf("a collection took %v", longest)
	}
}

// TestUblkDisk passes a real disk through, of odd size and with its own
// geometry.
func TestUblkDisk(t *testing.T) {
	ctl := openControl(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	const size = 40<<20 + 512
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	_ = exec.Command("modprobe", "loop").Run() // it may be built in
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	defer func() {
		if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	}()
	want, err := ublk.ReadGeometry(loop)
	if err != nil {
		t.Fatal(err)
	}
	if want.Size != size || want.LogicalBlock != 512 || want.MaxDiscard == 0 || !want.VolatileCache {
		t.Fatalf("geometry of %s: %+v", loop, want)
	}
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			file, err := blockdev.OpenExclusive(loop, loop, unix.O_RDWR|unix.O_DIRECT)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			cfg, counts := memoryConfig(t, mode, 1, 16)
			cfg.Geometry = want
			cfg.Files = []*blockdev.OSFile{file}
			cfg.NewHandler = func(_ int, bq blockdev.Queue) ublk.Handler {
				return newMemoryDisk(bq, file, 16, counts)
			}
			d := add(t, ctl, cfg)
			got, err := ublk.ReadGeometry(d.Path)
			if err != nil {
				t.Fatal(err)
			}
			if got.Size != want.Size || got.LogicalBlock != want.LogicalBlock || got.PhysicalBlock != want.PhysicalBlock ||
				got.VolatileCache != want.VolatileCache || got.DiscardGranularity != want.DiscardGranularity {
				t.Errorf("the device has\n%+v, its disk\n%+v", got, want)
			}
			f := openDisk(t, d.Path, 0)
			buf := direct.Pages(t, 4096)
			copy(buf, "the last sector of "+mode.String())
			if _, err := f.WriteAt(buf[:512], size-512); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(buf, size-512); err == nil {
				t.Error("wrote past the end")
			}
			f.Close()
			if err := d.TryStop(guest.Context(t)); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(string(b[size-512:]), "the last sector of "+mode.String()) {
				t.Error("the last sector did not arrive")
			}
			if err := d.Delete(guest.Context(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestUblkResize changes the size of a disk that is open.
func TestUblkResize(t *testing.T) {
	ctl := openControl(t)
	cfg, _ := memoryConfig(t, ublk.ModeAuto, 1, 4)
	d := add(t, ctl, cfg)
	err := d.UpdateSize(guest.Context(t), diskSize*2)
	if !ctl.Has(uapi.UBLK_F_UPDATE_SIZE) {
		if !errors.Is(err, ublk.ErrTooOld) {
			t.Errorf("update of the size: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	g, err := ublk.ReadGeometry(d.Path)
	if err != nil || g.Size != diskSize*2 {
		t.Errorf("size %d, %v", g.Size, err)
	}
	if err := d.UpdateSize(guest.Context(t), 1000); err == nil {
		t.Error("a size of 1000 bytes was taken")
	}
}

func TestUblkProbes(t *testing.T) {
	ctl := openControl(t)
	release := ublk.KernelRelease()
	for _, p := range ctl.Probes() {
		since := !ublk.OlderThan(release, p.Since)
		t.Logf("%-24s %-4s since %s", p.Name, p.Answer, p.Since)
		// A feature may depend on the kernel's configuration, but none comes
		// before its kernel.
		if p.Answer == ublk.Yes && !since {
			t.Errorf("%s on %s, before %s", p.Name, release, p.Since)
		}
		if p.Answer == ublk.No && since {
			t.Errorf("no %s on %s, after %s", p.Name, release, p.Since)
		}
		if p.Answer == ublk.Unknown {
			t.Errorf("%s: could not tell", p.Name)
		}
	}
}
