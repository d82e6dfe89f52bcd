package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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

// fileConfig is a disk in the file at path, the same for every process.
func fileConfig(t testing.TB, path string, mode ublk.Mode) ublk.Config {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := blockdev.NewOSFile(fd, path)
	t.Cleanup(func() { file.Close() })
	const depth = 32
	counts := &requestCounts{}
	queues := min(2, ublk.MaxQueues())
	if n, err := strconv.Atoi(os.Getenv("UBLK_TEST_QUEUES")); err == nil {
		queues = n
	}
	return ublk.Config{
		Name: "child", Tag: ublk.NewTag('r'), ID: ublk.AnyID,
		Queues: queues, Depth: depth, MaxIO: 128 << 10, Mode: mode,
		Geometry: geometry(diskSize),
		Recovery: os.Getenv("UBLK_TEST_NO_RECOVERY") == "",
		Files:    []*blockdev.OSFile{file},
		NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler {
			return newMemoryDisk(bq, file, depth, counts)
		},
	}
}

// TestUblkChild is a server for the tests below, which kill it. It does
// nothing unless they start it.
func TestUblkChild(t *testing.T) {
	args := strings.Fields(os.Getenv("UBLK_TEST_CHILD")) // add|recover ID, file, mode
	if len(args) != 4 {
		return
	}
	ctl := openControl(t)
	mode, _ := strconv.Atoi(args[3])
	cfg := fileConfig(t, args[2], ublk.Mode(mode))
	ctx := guest.Context(t)
	var d *ublk.Device
	var err error
	if args[0] == "add" {
		d, err = ublk.Add(ctx, ctl, cfg)
	} else {
		id, _ := strconv.Atoi(args[1])
		d, err = takeOver(ctx, ctl, id, cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nserving %d\n", d.ID)
	time.Sleep(time.Hour)
}

type server struct {
	cmd *exec.Cmd
	id  int
}

// kill is kill -9, and the wait until it is dead.
func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// takeOver makes this process the server of device id.
func takeOver(ctx context.Context, ctl *ublk.Control, id int, cfg ublk.Config) (*ublk.Device, error) {
	c, err := ublk.Claim(ctx, ctl, id)
	if err != nil {
		return nil, err
	}
	d, err := c.Prepare(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := d.Resume(ctx); err != nil {
		d.Abandon()
		return nil, err
	}
	return d, nil
}

// startServer starts a process that makes a device, or with id >= 0
// recovers one.
func startServer(t testing.TB, id int, path string, mode ublk.Mode) *server {
	t.Helper()
	verb := "add"
	if id >= 0 {
		verb = "recover"
	}
	child, said := guest.StartChild(t, "TestUblkChild", fmt.Sprintf("UBLK_TEST_CHILD=%s %d %s %d", verb, id, path, mode), "serving ")
	s := &server{cmd: child}
	s.id, _ = strconv.Atoi(said)
	return s
}

// makeDisk makes the file behind a server's disk, for the time of the test.
func makeDisk(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	if err := os.Truncate(path, diskSize); err != nil {
		t.Fatal(err)
	}
}

// deleteLeft deletes the device that a dead server has left.
func deleteLeft(t *testing.T, ctl *ublk.Control, id int) {
	t.Helper()
	ctx := guest.Context(t)
	guest.WaitFor(t, "the deletion", func() bool {
		err := ctl.DeleteDevice(ctx, id)
		if err != nil && !errors.Is(err, ublk.ErrBusy) {
			t.Fatal(err)
		}
		return err == nil
	})
}

// TestUblkRecovery kills the server again and again under I/O: no request
// fails, and nothing that was acknowledged is lost.
func TestUblkRecovery(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		t.Run(mode.String(), func(t *testing.T) {
			path := filepath.Join("/dev/shm", t.Name()[len("TestUblkRecovery/"):])
			makeDisk(t, path)
			s := startServer(t, -1, path, mode)
			id := s.id
			defer func() {
				ctx := guest.Context(t)
				for errors.Is(ctl.DeleteDevice(ctx, id), ublk.ErrBusy) && ctx.Err() == nil {
					time.Sleep(20 * time.Millisecond)
				}
			}()
			dev := fmt.Sprintf("/dev/ublkb%d", id)

			noise := make([]byte, 1<<20)
			rand.New(rand.NewSource(99)).Read(noise)
			const writers = 8
			const part = diskSize / writers
			var stop atomic.Bool
			var done atomic.Int64
			var wg sync.WaitGroup
			for w := range writers {
				f := openDisk(t, dev, 0)
				buf := direct.Pages(t, 128<<10)
				wg.Add(1)
				go func() {
					defer wg.Done()
					defer f.Close()
					rnd := rand.New(rand.NewSource(int64(w)))
					shadow := make([]byte, part)
					for !stop.Load() {
						n := (1 + rnd.Intn(32)) * 4096
						off := rnd.Intn((part-n)/4096+1) * 4096
						copy(buf[:n], noise[rnd.Intn(len(noise)-n):])
						copy(shadow[off:], buf[:n])
						if _, err := f.WriteAt(buf[:n], int64(w*part+off)); err != nil {
							t.Errorf("write: %v", err)
							return
						}
						off = rnd.Intn((part-n)/4096+1) * 4096
						if _, err := f.ReadAt(buf[:n], int64(w*part+off)); err != nil {
							t.Errorf("read: %v", err)
							return
						}
						if !bytes.Equal(buf[:n], shadow[off:off+n]) {
							t.Errorf("%d bytes at %d differ", n, w*part+off)
							return
						}
						done.Add(1)
					}
				}()
			}
			progress := func() {
				t.Helper()
				from := done.Load()
				guest.WaitFor(t, "50 writes and reads", func() bool { return done.Load() > from+50 || t.Failed() })
			}
			progress()
			for range 4 {
				s.kill()
				time.Sleep(50 * time.Millisecond) // requests pile up
				s = startServer(t, id, path, mode)
				progress()
			}
			s.kill()

			// The last one is this process, which makes a mess of it first.
			cfg := fileConfig(t, path, mode)
			bad := cfg
			bad.Files = []*blockdev.OSFile{blockdev.NewOSFile(1<<19, "never opened")}
			if _, err := takeOver(guest.Context(t), ctl, id, bad); err == nil {
				t.Error("recovery with a bad file succeeded")
			}
			d, err := takeOver(guest.Context(t), ctl, id, cfg)
			if err != nil {
				t.Fatal(err)
			}
			if d.Mode != mode || d.Depth != 32 || d.MaxIO != 128<<10 {
				t.Errorf("recovered as %+v", d)
			}
			progress()
			if d.Flags&uapi.UBLK_F_QUIESCE != 0 {
				if err := d.Quiesce(guest.Context(t)); err != nil {
					t.Fatal(err)
				}
				guest.WaitFor(t, "the device to be quiesced", func() bool {
					i, err := ctl.Info(guest.Context(t), id)
					if err != nil {
						t.Fatal(err)
					}
					return i.State == ublk.Quiesced
				})
				from := done.Load()
				time.Sleep(50 * time.Millisecond)
				if n := done.Load(); n > from+writers {
					t.Errorf("%d requests went through a quiesced device", n-from)
				}
				if d, err = takeOver(guest.Context(t), ctl, id, cfg); err != nil {
					t.Fatal(err)
				}
				progress()
			}
			stop.Store(true)
			wg.Wait()
			if err := d.TryStop(guest.Context(t)); err != nil {
				t.Error(err)
			}
			if err := d.Delete(guest.Context(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestUblkServerDeath kills the server and deletes what it left. Without
// recovery requests fail at once, with it when the device is deleted.
func TestUblkServerDeath(t *testing.T) {
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		for _, recovery := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/recovery=%v", mode, recovery), func(t *testing.T) {
				path := "/dev/shm/death"
				makeDisk(t, path)
				if !recovery {
					t.Setenv("UBLK_TEST_NO_RECOVERY", "1")
				}
				s := startServer(t, -1, path, mode)
				f := openDisk(t, fmt.Sprintf("/dev/ublkb%d", s.id), 0)
				buf := direct.Pages(t, 4096)
				failed := make(chan error, 1)
				var ok atomic.Int64
				go func() {
					for {
						if _, err := f.WriteAt(buf, 0); err != nil {
							failed <- err
							return
						}
						ok.Add(1)
					}
				}()
				guest.WaitFor(t, "writes", func() bool { return ok.Load() >= 20 })
				s.kill()
				if recovery {
					select {
					case err := <-failed:
						t.Errorf("a write failed before the delete: %v", err)
					case <-time.After(100 * time.Millisecond):
					}
				}
				deleteLeft(t, ctl, s.id)
				t.Log(guest.Await(t, "the end of the writer", failed))
				f.Close()
				guest.WaitFor(t, "the end of the device", func() bool {
					_, err := ctl.Info(guest.Context(t), s.id)
					return errors.Is(err, unix.ENODEV)
				})
			})
		}
	}
}
