package blockdev

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// mapped is memory off the Go heap for the length of the test.
func mapped(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("map %d bytes: %v", n, err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func openFile(path string, flags int) (*OSFile, error) {
	fd, err := unix.Open(path, unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return NewOSFile(fd, path), nil
}

// diskFile is a regular file of the given size in dir.
func diskFile(t testing.TB, dir string, size int64, flags int) *OSFile {
	t.Helper()
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := openFile(path, unix.O_RDWR|flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// shmFile is a file of n bytes, all allocated, on a tmpfs; nil without one.
func shmFile(t testing.TB, n int) *OSFile {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "blockdev")
	if err != nil {
		return nil
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := openFile(path, unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func startQueue(t testing.TB, cfg RingConfig) *RingQueue {
	t.Helper()
	q, err := NewRingQueue(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Stop)
	return q
}

// within fails the test, with all stacks, if done takes more than a minute.
func within(t testing.TB, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s: not after a minute\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

// onThread runs fn on the queue's thread and waits for its end.
func onThread(t testing.TB, q *RingQueue, fn func()) {
	t.Helper()
	done := make(chan struct{})
	q.Post(&Task{Run: func() { fn(); close(done) }})
	within(t, "task", done)
}

// onQueue runs op on the queue from outside and waits for its end.
func onQueue(t testing.TB, q *RingQueue, op *Op) unix.Errno {
	t.Helper()
	done := make(chan struct{})
	op.Done = func(*Op) { close(done) }
	q.Post(&Task{Run: func() { q.Submit(op) }})
	within(t, op.Kind.String(), done)
	return op.Err
}

// call runs f on the queue's thread.
func call(t testing.TB, q *RingQueue, f func()) {
	t.Helper()
	done := make(chan struct{})
	q.Post(&Task{Run: func() {
		f()
		close(done)
	}})
	within(t, "task", done)
}

func mustDo(t testing.TB, q *RingQueue, op *Op) {
	t.Helper()
	if e := onQueue(t, q, op); e != 0 {
		t.Fatalf("%s of %d bytes at %d: %v", op.Kind, op.Len, op.Off, e)
	}
}

func fill(b []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
}

// manualQueue is a queue whose turns the test makes, on its own thread.
func manualQueue(t *testing.T, cfg RingConfig) *RingQueue {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	q := &RingQueue{cfg: cfg, slots: make([]slot, cfg.Depth), ended: make(chan struct{}), wakeFd: -1, maxTransfer: maxTransfer}
	for i := range q.slots {
		q.free = append(q.free, uint32(i))
	}
	if err := q.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.close)
	return q
}

func TestRingStopWhileBusy(t *testing.T) {
	f := diskFile(t, t.TempDir(), 1<<20, 0)
	for round := range 20 {
		q := startQueue(t, RingConfig{Name: "busy", Depth: 8, Files: []*OSFile{f}})
		mem := mapped(t, 16*4096)
		var begun, ended atomic.Int64
		var quit atomic.Bool
		done := func(op *Op) {
			ended.Add(1)
			if !quit.Load() {
				begun.Add(1)
				q.Submit(op)
			}
		}
		q.Post(&Task{Run: func() {
			for i := range 16 {
				begun.Add(1)
				q.Submit(&Op{Kind: Kind(i % 2), File: f, Off: int64(i) * 4096, Len: 4096, Buf: MemBuf(mem[i*4096:]), Done: done})
			}
		}})
		for begun.Load() < 100 {
			runtime.Gosched()
		}
		stopped := make(chan struct{})
		for range 2 {
			go func() {
				q.Stop()
				stopped <- struct{}{}
			}()
		}
		if round%2 == 0 {
			select {
			case <-stopped:
				t.Fatal("Stop did not wait for the operations")
			case <-time.After(time.Millisecond):
			}
		}
		quit.Store(true)
		within(t, "stop", stopped)
		within(t, "second stop", stopped)
		if begun.Load() != ended.Load() {
			t.Fatalf("%d operations begun, %d ended when the queue stopped", begun.Load(), ended.Load())
		}
		q.Stop()
		q.Post(&Task{Run: func() { t.Error("a task ran after the end") }})
	}
}

func TestRingStopWaitsForCommands(t *testing.T) {
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(efd)
	var answers atomic.Int32
	cfg := RingConfig{Name: "test", Depth: 1, Files: []*OSFile{NewOSFile(efd, "eventfd")}, OnCommand: func(uint32, int32) { answers.Add(1) }}
	start := func() (*RingQueue, chan struct{}) {
		q := startQueue(t, cfg)
		onThread(t, q, func() {
			// By the registered file, which the end of an abandoned queue must not wait for.
			c := q.Command(0)
			c.PrepPollAdd(0, unix.POLLIN)
			c.SetFixedFile()
		})
		stopped := make(chan struct{})
		go func() {
			q.Stop()
			close(stopped)
		}()
		select {
		case <-stopped:
			t.Error("Stop did not wait for the command")
		case <-time.After(20 * time.Millisecond):
		}
		return q, stopped
	}

	q, stopped := start()
	q.Abandon()
	within(t, "stop of an abandoned queue", stopped)
	if answers.Load() != 0 {
		t.Errorf("%d abandoned commands were answered", answers.Load())
	}

	_, stopped = start()
	if _, err := unix.Write(efd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	within(t, "stop", stopped)
	if answers.Load() != 1 {
		t.Errorf("%d commands were answered, want 1", answers.Load())
	}
}

// TestRingStopWhilePosted: what was posted before Stop runs, whoever posts
// meanwhile.
func TestRingStopWhilePosted(t *testing.T) {
	for range 20 {
		q := startQueue(t, RingConfig{Name: "test", Depth: 1})
		var before atomic.Int32
		for range 10 {
			q.Post(&Task{Run: func() { before.Add(1) }})
		}
		quit := make(chan struct{})
		var posters sync.WaitGroup
		for range 2 {
			posters.Add(1)
			go func() {
				defer posters.Done()
				for {
					select {
					case <-quit:
						return
					default:
						q.Post(&Task{Run: func() {}})
					}
				}
			}()
		}
		runtime.Gosched()
		stopped := make(chan struct{})
		go func() {
			q.Stop()
			close(stopped)
		}()
		// Posters that never pause may keep a queue going.
		time.AfterFunc(time.Millisecond, func() { close(quit) })
		within(t, "stop", stopped)
		posters.Wait()
		if before.Load() != 10 {
			t.Fatalf("%d of 10 tasks posted before Stop ran", before.Load())
		}
	}
}

// threads are the names of the process's threads.
func threads(t *testing.T) map[string]int {
	t.Helper()
	names := make(map[string]int)
	paths, err := filepath.Glob("/proc/self/task/*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil {
			names[strings.TrimSpace(string(b))]++
		}
	}
	return names
}

func openFiles(t *testing.T) map[string]string {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	fds := make(map[string]string)
	for _, e := range list {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			fds[e.Name()] = to
		}
	}
	return fds
}

// settledGoroutines is the number of goroutines once those of earlier tests
// are gone.
func settledGoroutines() int {
	n, same := runtime.NumGoroutine(), 0
	for same < 20 {
		time.Sleep(time.Millisecond)
		if now := runtime.NumGoroutine(); now == n {
			same++
		} else {
			n, same = now, 0
		}
	}
	return n
}

func TestRingThreadAndDescriptors(t *testing.T) {
	goroutines := settledGoroutines()
	before := openFiles(t)
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	first := 0
	for !cpus.IsSet(first) {
		first++
	}
	var one unix.CPUSet
	one.Set(first)
	q := startQueue(t, RingConfig{Name: "a-very-long-name-indeed", Depth: 4, CPUs: &one})
	var got unix.CPUSet
	onThread(t, q, func() {
		if err := unix.SchedGetaffinity(0, &got); err != nil {
			t.Error(err)
		}
		if unix.Gettid() == unix.Getpid() {
			t.Error("the queue runs on the main thread")
		}
	})
	if got != one {
		t.Errorf("the thread runs on %d processors, want 1", got.Count())
	}
	if names := threads(t); names["a-very-long-nam"] != 1 {
		t.Errorf("threads %v, want one with the queue's name", names)
	}
	if n := runtime.NumGoroutine(); n != goroutines+1 {
		t.Errorf("%d goroutines with the queue, %d without", n, goroutines)
	}
	added := 0
	for fd, to := range openFiles(t) {
		if before[fd] == to {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + fd)
		if err != nil || !strings.Contains(to, "anon_inode") {
			continue // the listing of the directory itself
		}
		added++
		var flags int
		for _, line := range strings.Split(string(info), "\n") {
			fmt.Sscanf(line, "flags: %o", &flags)
		}
		if flags&unix.O_CLOEXEC == 0 {
			t.Errorf("%s is not close-on-exec", to)
		}
	}
	if added != 2 {
		t.Errorf("%d descriptors added, want the ring and the eventfd", added)
	}
	q.Stop()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		names, fds := threads(t), openFiles(t)
		if names["a-very-long-nam"] == 0 && len(fds) == len(before) && runtime.NumGoroutine() == goroutines {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left after Stop: threads %v, files %v, %d goroutines", names, fds, runtime.NumGoroutine())
		}
	}
}

func TestRingBadConfig(t *testing.T) {
	goroutines := settledGoroutines()
	before := len(openFiles(t))
	gone := NewOSFile(1<<20, "gone")
	forbidden, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(forbidden)
	for what, cfg := range map[string]RingConfig{
		"no depth":     {},
		"too deep":     {Depth: uring.MaxEntries + 1},
		"closed file":  {Depth: 1, Files: []*OSFile{gone}},
		"no processor": {Depth: 1, CPUs: &unix.CPUSet{}},
		"no memory":    {Depth: 1, Buffers: [][]byte{forbidden}},
	} {
		if q, err := NewRingQueue(cfg); err == nil {
			q.Stop()
			t.Errorf("%s: a queue was made", what)
		} else if what == "closed file" && !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: %v, want EBADF", what, err)
		}
	}
	for end := time.Now().Add(time.Minute); runtime.NumGoroutine() != goroutines || len(openFiles(t)) != before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines and %d files left, were %d and %d", runtime.NumGoroutine(), len(openFiles(t)), goroutines, before)
		}
	}
}
