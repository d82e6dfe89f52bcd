package ublk

import (
	"bytes"
	"fmt"
	"math/rand"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// verify writes and reads random pieces with several writers, each in its
// own part of the disk, and compares with what it wrote.
func verify(t testing.TB, path string, writers, rounds int) {
	t.Helper()
	part := diskSize / writers &^ 4095
	noise := make([]byte, 2<<20) // any 1 MiB of it is unlike any other
	rand.New(rand.NewSource(99)).Read(noise)
	var wg sync.WaitGroup
	errs := make(chan error, writers)
	for w := range writers {
		f := openDisk(t, path, 0)
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
	ctl := openControl(t)
	for _, mode := range payloadModes(ctl) {
		for _, shape := range []struct{ queues, depth int }{{1, 1}, {1, 128}, {2, 32}} {
			t.Run(fmt.Sprintf("%s/%dx%d", mode, shape.queues, shape.depth), func(t *testing.T) {
				cfg, counts := memoryConfig(t, mode, shape.queues, shape.depth)
				d := add(t, ctl, cfg)
				if d.Mode != mode {
					t.Fatalf("mode %s, want %s", d.Mode, mode)
				}
				verify(t, d.Path, 8, 60)
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

// TestUblkRegistration has the kernel fail to register payloads with their requests,
// because the place is taken. A command registers them later, and no request fails.
func TestUblkRegistration(t *testing.T) {
	ctl := openControl(t)
	if !slices.Contains(payloadModes(ctl), ublk.ModeZeroCopy) {
		t.Skip("needs kernel 6.16: no zero copy")
	}
	cfg, _ := memoryConfig(t, ublk.ModeZeroCopy, 1, 1)
	newHandler := cfg.NewHandler
	var queue blockdev.Queue
	cfg.NewHandler = func(i int, bq blockdev.Queue) ublk.Handler {
		queue = bq
		return newHandler(i, bq)
	}
	d := add(t, ctl, cfg)
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
	f := openDisk(t, d.Path, 0)
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
	verify(t, d.Path, 4, 20) // as ever
}
