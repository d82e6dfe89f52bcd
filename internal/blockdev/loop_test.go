package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

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

// diskFile is a regular file of the given size in dir.
func diskFile(t testing.TB, dir string, size int64, o OpenOptions) *OSFile {
	t.Helper()
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := OpenDisk(path, o)
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
	f, err := OpenDisk(path, OpenOptions{})
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

func TestRingWritesAndReads(t *testing.T) {
	const n = 64 << 10
	for _, direct := range []bool{false, true} {
		for _, registered := range []bool{false, true} {
			t.Run(fmt.Sprintf("direct=%v registered=%v", direct, registered), func(t *testing.T) {
				f := diskFile(t, t.TempDir(), 1<<20, OpenOptions{Direct: direct})
				mem := mapped(t, 2*n)
				cfg := RingConfig{Name: "test", Depth: 4}
				out, in := MemBuf(mem), MemBuf(mem[n:])
				if registered {
					cfg.Files = []*OSFile{diskFile(t, t.TempDir(), 1, OpenOptions{}), f}
					cfg.Buffers = [][]byte{mem[n:], mem[:n]}
					out.Index, in.Index = 1, 0
				}
				q := startQueue(t, cfg)
				fill(mem[:n], 1)
				mustDo(t, q, &Op{Kind: Write, FUA: true, File: f, Off: 4096, Len: n, Buf: out})
				mustDo(t, q, &Op{Kind: Flush, File: f})
				mustDo(t, q, &Op{Kind: Read, File: f, Off: 4096, Len: n - 4096, Buf: in.At(4096)})
				if !bytes.Equal(mem[:n-4096], mem[n+4096:]) {
					t.Fatal("read differs from what was written")
				}
				if !bytes.Equal(mem[n:n+4096], make([]byte, 4096)) {
					t.Fatal("the read wrote before its buffer")
				}
				onDisk, err := os.ReadFile(f.Name())
				if err != nil || len(onDisk) != 1<<20 || !bytes.Equal(onDisk[4096:4096+n], mem[:n]) {
					t.Fatalf("file of %d bytes (%v) differs from what was written", len(onDisk), err)
				}
			})
		}
	}
}

// TestRingZeroesAndHoles: ranges of all kinds on file systems of all kinds;
// some cannot zero a range and are given zeroes to write.
func TestRingZeroesAndHoles(t *testing.T) {
	const size = 4 << 20
	files := map[string]*OSFile{
		"temp":   diskFile(t, t.TempDir(), 0, OpenOptions{}),
		"direct": diskFile(t, t.TempDir(), 0, OpenOptions{Direct: true}),
	}
	if f := shmFile(t, 0); f != nil {
		files["tmpfs"] = f
	}
	for name, f := range files {
		t.Run(name, func(t *testing.T) {
			q := startQueue(t, RingConfig{Name: "test", Depth: 4, Files: []*OSFile{f}})
			mem := mapped(t, size)
			fill(mem, 3)
			want := append([]byte(nil), mem...)
			mustDo(t, q, &Op{Kind: Write, File: f, Len: size, Buf: MemBuf(mem)})
			blocks := func() int64 {
				var st unix.Stat_t
				if err := unix.Fstat(f.Fd(), &st); err != nil {
					t.Fatal(err)
				}
				return st.Blocks
			}
			check := func(what string) {
				t.Helper()
				mustDo(t, q, &Op{Kind: Flush, File: f})
				got, err := os.ReadFile(f.Name())
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("%s: the file (%d bytes) is not as it should be (%d bytes)", what, len(got), len(want))
				}
			}
			check("write")
			full := blocks()

			mustDo(t, q, &Op{Kind: WriteZeroes, NoUnmap: true, File: f, Off: 64 << 10, Len: 2 << 20})
			clear(want[64<<10 : 64<<10+2<<20])
			check("zeroes that stay allocated")
			if b := blocks(); b < full {
				t.Errorf("zeroes without unmap left %d of %d blocks", b, full)
			}

			mustDo(t, q, &Op{Kind: WriteZeroes, File: f, Off: 3 << 20, Len: 512 << 10})
			clear(want[3<<20 : 3<<20+512<<10])
			check("zeroes")
			if b := blocks(); b > full-1000 {
				t.Errorf("zeroes with unmap left %d of %d blocks", b, full)
			}

			mustDo(t, q, &Op{Kind: Discard, File: f, Off: 128 << 10, Len: 1 << 20})
			clear(want[128<<10 : 128<<10+1<<20])
			check("discard")
			if b := blocks(); b > full-3000 {
				t.Errorf("discard left %d of %d blocks", b, full)
			}

			mustDo(t, q, &Op{Kind: WriteZeroes, File: f, Off: size - 4096, Len: 1 << 20})
			clear(want[size-4096:])
			want = append(want, make([]byte, 1<<20-4096)...)
			check("zeroes over the end")

			mustDo(t, q, &Op{Kind: Allocate, File: f, Off: size, Len: 2 << 20})
			want = append(want, make([]byte, size+2<<20-len(want))...)
			check("allocate")
			if b := blocks(); b < full-4000+4096 {
				t.Errorf("%d blocks after allocate, had %d", b, full)
			}
		})
	}
}

// TestRingLongRanges: lengths beyond 32 bits.
func TestRingLongRanges(t *testing.T) {
	const size = 9 << 30
	f := diskFile(t, t.TempDir(), size, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 4, Files: []*OSFile{f}})
	mem := mapped(t, 8192)
	for _, kind := range []Kind{Discard, WriteZeroes} {
		fill(mem[:4096], 1)
		mustDo(t, q, &Op{Kind: Write, File: f, Off: size - 8192, Len: 4096, Buf: MemBuf(mem)})
		mustDo(t, q, &Op{Kind: Write, File: f, Off: size - 4096, Len: 4096, Buf: MemBuf(mem)})
		mustDo(t, q, &Op{Kind: kind, File: f, Off: 4096, Len: size - 8192})
		mustDo(t, q, &Op{Kind: Read, File: f, Off: size - 8192, Len: 4096, Buf: MemBuf(mem[4096:])})
		if !bytes.Equal(mem[4096:], make([]byte, 4096)) {
			t.Errorf("%s left the last block of its range", kind)
		}
		mustDo(t, q, &Op{Kind: Read, File: f, Off: size - 4096, Len: 4096, Buf: MemBuf(mem[4096:])})
		if !bytes.Equal(mem[4096:], mem[:4096]) {
			t.Errorf("%s went beyond its range", kind)
		}
	}
}

func TestRingErrors(t *testing.T) {
	f := diskFile(t, t.TempDir(), 8192, OpenOptions{})
	readOnly, err := OpenDisk(f.Name(), OpenOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	buf := MemBuf(mapped(t, 16384))
	for _, c := range []struct {
		what string
		op   Op
		want unix.Errno
	}{
		{"read at the end", Op{Kind: Read, File: f, Off: 8192, Len: 4096, Buf: buf}, unix.EIO},
		{"read over the end", Op{Kind: Read, File: f, Off: 4096, Len: 8192, Buf: buf}, unix.EIO},
		{"negative offset", Op{Kind: Read, File: f, Off: -1, Len: 1, Buf: buf}, unix.EINVAL},
		{"negative length", Op{Kind: Discard, File: f, Len: -1}, unix.EINVAL},
		{"nothing", Op{Kind: Read, File: f, Len: 0, Buf: buf}, unix.EINVAL},
		{"write, read-only", Op{Kind: Write, File: readOnly, Len: 4096, Buf: buf}, unix.EBADF},
		{"discard, read-only", Op{Kind: Discard, File: readOnly, Len: 4096}, unix.EBADF},
		{"zeroes, read-only", Op{Kind: WriteZeroes, File: readOnly, Len: 4096}, unix.EBADF},
		{"allocate, read-only", Op{Kind: Allocate, File: readOnly, Len: 4096}, unix.EBADF},
		{"bad memory", Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Off: 8, Index: NoIndex}}, unix.EFAULT},
		{"no such buffer", Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Index: 9}}, unix.EFAULT},
		{"flush", Op{Kind: Flush, File: f, Off: -1, Len: -1}, 0},
	} {
		for _, registered := range []bool{false, true} {
			cfg := RingConfig{Name: "test", Depth: 1}
			if registered {
				cfg.Files = []*OSFile{f, readOnly}
			}
			q := startQueue(t, cfg)
			op := c.op
			if e := onQueue(t, q, &op); e != c.want {
				t.Errorf("%s, registered %v: %v (%d), want %v", c.what, registered, e, e, c.want)
			}
			q.Stop()
		}
	}
}

// TestRingReach: a file that was cut off is not made to grow by those who know
// how far it reached, and one that is cut off under a write is noticed after it.
func TestRingReach(t *testing.T) {
	const size = 16384
	f := diskFile(t, t.TempDir(), size, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 1})
	buf := MemBuf(mapped(t, size))
	cut := func(to int64) {
		t.Helper()
		if err := unix.Ftruncate(f.Fd(), to); err != nil {
			t.Fatal(err)
		}
	}
	do := func(what string, kind Kind, off, reach int64, want unix.Errno, end int64) {
		t.Helper()
		if e := onQueue(t, q, &Op{Kind: kind, File: f, Off: off, Len: 4096, Reach: reach, Buf: buf}); e != want {
			t.Errorf("%s: %v, want %v", what, e, want)
		}
		if now, err := f.Size(); err != nil || now != end {
			t.Errorf("%s: the file ends at %d, want %d (%v)", what, now, end, err)
		}
	}
	do("write of a whole file", Write, 4096, size, 0, size)
	do("growing a whole file", Allocate, size, size, 0, size+4096)
	cut(4096)
	do("write", Write, 8192, size, unix.EIO, 4096)
	do("write of what is left", Write, 0, size, unix.EIO, 4096)
	do("growing", Allocate, size, size, unix.EIO, 4096)
	do("write of one who does not know", Write, 8192, 0, 0, 12288)
	cut(size)
	results := make(chan unix.Errno, 2)
	onThread(t, q, func() {
		for range 2 { // the second has been looked at and waits for the first
			q.Submit(&Op{Kind: Write, File: f, Len: 4096, Reach: size, Buf: buf, Done: func(op *Op) { results <- op.Err }})
		}
		cut(0)
	})
	for range 2 {
		if e := <-results; e != unix.EIO {
			t.Errorf("write of a file cut off meanwhile: %v", e)
		}
	}
}

// TestRingAgainstModel runs random operations on several queues at a time, each
// with its own part of one file, and compares with plain memory.
func TestRingAgainstModel(t *testing.T) {
	const queues, part, depth, total = 3, 1 << 20, 8, 800
	f := diskFile(t, t.TempDir(), queues*part, OpenOptions{})
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	model := make([]byte, queues*part)
	var all sync.WaitGroup
	for n := range queues {
		mem := mapped(t, depth*64<<10)
		cfg := RingConfig{Name: "model", Depth: depth - n, Buffers: [][]byte{mem}}
		if n != 1 {
			cfg.Files = []*OSFile{f}
		}
		q := startQueue(t, cfg)
		q.maxTransfer = 24 << 10 // so that longer ones go in several
		rng := rand.New(rand.NewPCG(seed, uint64(n)))
		base := int64(n) * part
		busy := make([]bool, part/4096) // blocks with an operation in flight
		begun := 0
		flying := 0
		all.Add(1)
		next := func(op *Op) {
			if begun == total {
				if flying == 0 {
					all.Done()
				}
				return
			}
			begun++
			var at, blocks int
			for {
				blocks = 1 + rng.IntN(16)
				at = rng.IntN(len(busy) - blocks + 1)
				clash := false
				for i := range blocks {
					clash = clash || busy[at+i]
				}
				if !clash {
					break
				}
			}
			for i := range blocks {
				busy[at+i] = true
			}
			*op = Op{
				Kind: []Kind{Read, Write, Write, Discard, WriteZeroes, Flush}[rng.IntN(6)], File: f,
				FUA: rng.IntN(4) == 0, NoUnmap: rng.IntN(2) == 0,
				Off: base + int64(at)*4096, Len: int64(blocks) * 4096, Buf: op.Buf, Done: op.Done,
			}
			if rng.IntN(2) == 0 {
				op.Buf.Index = 0
			} else {
				op.Buf.Index = NoIndex
			}
			part := model[op.Off : op.Off+op.Len]
			switch op.Kind {
			case Write:
				fill(op.Buf.Bytes(op.Len), rng.Uint64())
				copy(part, op.Buf.Bytes(op.Len))
			case Discard, WriteZeroes:
				clear(part)
			}
			flying++
			q.Submit(op)
		}
		done := func(op *Op) {
			flying--
			if op.Err != 0 {
				t.Errorf("%s of %d bytes at %d: %v", op.Kind, op.Len, op.Off, op.Err)
			}
			if op.Kind == Read && !bytes.Equal(op.Buf.Bytes(op.Len), model[op.Off:op.Off+op.Len]) {
				t.Errorf("read of %d bytes at %d differs from the model", op.Len, op.Off)
			}
			for i := range op.Len / 4096 {
				busy[(op.Off-base)/4096+i] = false
			}
			next(op)
		}
		q.Post(&Task{Run: func() {
			for i := range depth {
				next(&Op{Buf: MemBuf(mem).At(int64(i) * 64 << 10), Done: done})
			}
		}})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	within(t, "operations", done)
	got, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Equal(got, model) {
		t.Fatalf("the file (%v) differs from the model", err)
	}
}

// TestRingPartialTransfers reads from a pipe that is filled bit by bit.
func TestRingPartialTransfers(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	f := NewOSFile(pipe[0], "pipe")
	defer f.Close()
	q := startQueue(t, RingConfig{Name: "test", Depth: 1, Files: []*OSFile{f}})
	mem := mapped(t, 8192)
	want := make([]byte, 5000)
	fill(want, 1)
	done := make(chan unix.Errno, 2)
	for range 2 {
		op := &Op{Kind: Read, File: f, Len: 5000, Buf: MemBuf(mem).At(100), Done: func(op *Op) { done <- op.Err }}
		q.Post(&Task{Run: func() { q.Submit(op) }})
	}
	for i := 0; i < len(want); i += 1000 {
		if _, err := unix.Write(pipe[1], want[i:i+1000]); err != nil {
			t.Fatal(err)
		}
		onThread(t, q, func() {})
	}
	if e := <-done; e != 0 || !bytes.Equal(mem[100:5100], want) {
		t.Fatalf("read in parts: %v, content equal: %v", e, bytes.Equal(mem[100:5100], want))
	}
	if mem[99] != 0 || mem[5100] != 0 {
		t.Fatal("the read wrote outside its buffer")
	}
	unix.Close(pipe[1])
	if e := <-done; e != unix.EIO {
		t.Fatalf("read at the end of the pipe: %v, want EIO", e)
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

// TestRingRetries answers for the kernel with errors that are no results.
func TestRingRetries(t *testing.T) {
	f := diskFile(t, t.TempDir(), 8192, OpenOptions{})
	q := manualQueue(t, RingConfig{Depth: 1})
	calls := 0
	op := &Op{Kind: Read, File: f, Len: 8192, Buf: MemBuf(mapped(t, 8192)), Done: func(*Op) { calls++ }}
	answer := func() uring.CQE {
		t.Helper()
		if err := q.ring.SubmitAndWaitTimeout(1, time.Minute, false); err != nil {
			t.Fatal(err)
		}
		var c [2]uring.CQE
		if n := q.ring.Reap(c[:]); n != 1 {
			t.Fatalf("%d completions, want 1", n)
		}
		return c[0]
	}
	for _, c := range []struct {
		answers []int32 // in place of the kernel's; 0 passes that one on
		async   bool
		want    unix.Errno
	}{
		{[]int32{0}, false, 0},
		{[]int32{-int32(unix.EINTR), -int32(unix.EINTR), 0}, false, 0},
		{[]int32{-int32(unix.EAGAIN), -int32(unix.EINTR), 0}, false, 0},
		{[]int32{-int32(unix.EIO)}, false, unix.EIO},
		{[]int32{4096, -int32(unix.EAGAIN), 4096}, false, 0},
		{[]int32{4096, -int32(unix.EIO)}, false, unix.EIO},
		{[]int32{0}, true, 0},
		{[]int32{-int32(unix.ECANCELED), 0}, true, 0}, // no worker to be had
		{[]int32{4096, -int32(unix.ECANCELED), 4096}, true, 0},
		{[]int32{-int32(unix.ECANCELED), -int32(unix.ECANCELED)}, true, unix.ECANCELED},
		{[]int32{-int32(unix.ECANCELED)}, false, unix.ECANCELED},
	} {
		calls, op.ForceAsync = 0, c.async
		q.Submit(op)
		for i, res := range c.answers {
			if calls != 0 {
				t.Fatalf("%v: done after %d answers", c.answers, i)
			}
			got := answer()
			if res == 0 {
				res = got.Res
			}
			q.completed(uint32(got.UserData), res)
		}
		if calls != 1 || op.Err != c.want {
			t.Fatalf("%v: done %d times with %v, want once with %v", c.answers, calls, op.Err, c.want)
		}
		if q.inFlight != 0 || len(q.free) != 1 {
			t.Fatalf("%v: %d in flight and %d slots free afterwards", c.answers, q.inFlight, len(q.free))
		}
	}
	op.ForceAsync = false
	// Progress counts: EAGAIN may come more often than maxTries in all.
	calls = 0
	q.Submit(op)
	for range 2 * maxTries {
		q.completed(uint32(answer().UserData), -int32(unix.EAGAIN))
		q.completed(uint32(answer().UserData), 8192/(2*maxTries))
	}
	if calls != 1 || op.Err != 0 {
		t.Fatalf("EAGAIN between parts: done %d times with %v", calls, op.Err)
	}
	// A device that never has the means is believed in the end.
	calls = 0
	q.Submit(op)
	for n := 0; calls == 0; n++ {
		if n > maxTries {
			t.Fatalf("still trying after %d times EAGAIN", n)
		}
		q.completed(uint32(answer().UserData), -int32(unix.EAGAIN))
	}
	if op.Err != unix.EAGAIN {
		t.Fatalf("always EAGAIN: %v, want EAGAIN", op.Err)
	}
	// Each way in turn, until there is none left.
	for _, c := range []struct {
		op    Op
		block bool
		ways  int
	}{
		{Op{Kind: Discard}, false, 1}, {Op{Kind: Discard}, true, 2},
		{Op{Kind: WriteZeroes}, false, 3}, {Op{Kind: WriteZeroes}, true, 3},
		{Op{Kind: WriteZeroes, NoUnmap: true}, false, 2}, {Op{Kind: Allocate}, false, 1},
		{Op{Kind: Flush}, false, 1},
	} {
		calls = 0
		o := c.op
		o.File, o.Len, o.Done = &OSFile{fd: f.fd, block: c.block}, 4096, op.Done
		q.Submit(&o)
		n := 0
		for ; calls == 0; n++ {
			q.completed(uint32(answer().UserData), -int32(unix.EOPNOTSUPP))
		}
		if n != c.ways || o.Err != unix.EOPNOTSUPP {
			t.Errorf("%s, block %v: %d ways tried, then %v; want %d, then EOPNOTSUPP", c.op.Kind, c.block, n, o.Err, c.ways)
		}
	}
}

// TestRingWaitSeesWork: what came up after the queue looked for work and before
// it went to sleep.
func TestRingWaitSeesWork(t *testing.T) {
	for what, happens := range map[string]func(*RingQueue){
		"task":     func(q *RingQueue) { q.Post(&Task{}) },
		"stop":     func(q *RingQueue) { q.stopping.Store(true) },
		"finished": func(q *RingQueue) { q.Submit(&Op{Len: -1}) },
	} {
		q := manualQueue(t, RingConfig{Depth: 1})
		q.readWake()
		happens(q)
		overslept := time.AfterFunc(time.Minute, q.signal)
		q.wait()
		if !overslept.Stop() {
			t.Errorf("%s: the queue went to sleep over it", what)
		}
		q.signal()
		for q.wakeRead {
			q.wait()
			q.reap()
		}
	}
}

// TestRingSpins: spinning ends with the first work, or in vain, and then the
// queue sleeps more and more often without it.
func TestRingSpins(t *testing.T) {
	defer func(n int) { spinners = n }(spinners)
	spinners = math.MaxInt
	q := manualQueue(t, RingConfig{Depth: 1})
	q.maxRaw = math.MaxInt32
	q.readWake()
	if q.spins() {
		t.Error("spins though it does not wait raw")
	}
	q.heat()
	if !q.raw {
		t.Fatal("does not wait raw")
	}
	defer q.cool()
	sleeps := []int{}
	for range maxMisses + 1 {
		if !q.spins() {
			t.Fatalf("does not spin after %v", sleeps)
		}
		if start := time.Now(); q.spin() || time.Since(start) < spinTime {
			t.Fatalf("found work after %v, where there is none", time.Since(start))
		}
		n := 0
		for q.sleeps > 0 && !q.spins() {
			n++
		}
		sleeps = append(sleeps, n)
	}
	if want := "[2 4 8 16 32 64 128 128]"; fmt.Sprint(sleeps) != want {
		t.Errorf("slept %v times after each spin in vain, want %s", sleeps, want)
	}
	q.Post(&Task{Run: func() {}})
	if !q.spin() || q.misses != 0 {
		t.Errorf("a task is no work, or %d misses are left", q.misses)
	}
	q.runTasks()
	q.signal()
	for end := time.Now().Add(time.Minute); !q.spin(); {
		if time.Now().After(end) {
			t.Fatal("a completion is no work")
		}
	}
	if !q.reap() || q.wakeRead {
		t.Error("nothing to reap after spinning")
	}
	q.stopping.Store(true)
	if q.spins() {
		t.Error("spins while it stops")
	}
	q.stopping.Store(false)
	q.Submit(&Op{Len: -1, Done: func(*Op) {}})
	if q.spins() {
		t.Error("spins with an operation that is done")
	}
	q.runFinished()
	spinners = 0
	if q.spins() {
		t.Error("spins with no processor left")
	}
}

// TestRingLateWakeUp: a poster that comes late must not write into whatever
// has the eventfd's number by then.
func TestRingLateWakeUp(t *testing.T) {
	q := manualQueue(t, RingConfig{Depth: 1})
	number := q.wakeFd
	q.armed.Store(true)
	q.close()
	var mine []int
	for {
		efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(efd)
		mine = append(mine, efd)
		if efd >= number {
			break
		}
	}
	q.wake()
	for _, efd := range mine {
		if _, err := unix.Read(efd, make([]byte, 8)); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("eventfd %d was written to (%v); the queue's was %d", efd, err, number)
		}
	}
}

// TestRingFailuresFromDone: operations that fail without I/O, each submitted
// from inside the Done before it, with nothing else to wake the queue.
func TestRingFailuresFromDone(t *testing.T) {
	q := startQueue(t, RingConfig{Name: "test", Depth: 1})
	done := make(chan struct{})
	left := 100
	op := &Op{Kind: Read, Len: -1}
	op.Done = func(op *Op) {
		if left--; left == 0 {
			close(done)
			return
		}
		q.Submit(op)
	}
	q.Post(&Task{Run: func() { q.Submit(op) }})
	within(t, "failures", done)
}

// TestRingWaitingInOrder: with one slot, operations run one at a time, oldest
// first, those submitted from inside Done included.
func TestRingWaitingInOrder(t *testing.T) {
	f := diskFile(t, t.TempDir(), 4096, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 1})
	const n = 100
	mem := mapped(t, 4096)
	var order []int
	finished := make(chan struct{})
	inSubmit := false
	onThread(t, q, func() {
		ops := make([]Op, n)
		for i := range ops {
			ops[i] = Op{Kind: Read, File: f, Len: 512, Buf: MemBuf(mem), Done: func(*Op) {
				if inSubmit {
					t.Error("Done ran inside Submit")
				}
				if q.inFlight != 0 && i != 7 {
					t.Errorf("%d operations in flight with one slot", q.inFlight+1)
				}
				order = append(order, i)
				if i < n/2 {
					inSubmit = true
					q.Submit(&ops[n/2+i])
					inSubmit = false
				}
				if len(order) == n {
					close(finished)
				}
			}}
		}
		ops[7].Len = -1 // fails without I/O: not from inside Submit either
		inSubmit = true
		for i := range n / 2 {
			q.Submit(&ops[i])
		}
		inSubmit = false
	})
	within(t, "operations", finished)
	// The one that failed overtook the others, and what it started with it.
	want := []int{7}
	for i := range n {
		if i != 7 && i != n/2+7 {
			want = append(want, i)
		}
		if i == n/2-1 {
			want = append(want, n/2+7)
		}
	}
	if fmt.Sprint(order) != fmt.Sprint(want) {
		t.Fatalf("order %v, want %v", order, want)
	}
}

func TestRingCommands(t *testing.T) {
	const n = 500
	for _, commands := range []int{0, n} {
		results := make(map[uint32]int)
		done := make(chan struct{})
		q := startQueue(t, RingConfig{Name: "test", Depth: 2, Commands: commands, OnCommand: func(tag uint32, res int32) {
			results[tag]++
			if res != 0 {
				t.Errorf("command %d: result %d", tag, res)
			}
			if len(results) == n {
				close(done)
			}
		}})
		// More than the queue holds: Command submits to make room.
		q.Post(&Task{Run: func() {
			for tag := range uint32(n) {
				q.Command(tag ^ 0xffff0000).PrepNop()
			}
		}})
		within(t, "commands", done)
		onThread(t, q, func() {})
		for tag, times := range results {
			if times != 1 || tag^0xffff0000 >= n {
				t.Errorf("command %#x completed %d times", tag, times)
			}
		}
	}
}

// TestRingOperationsPastFullQueueOfCommands: commands that wait for ever must
// not keep operations from the kernel.
func TestRingOperationsPastFullQueueOfCommands(t *testing.T) {
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(efd)
	f := diskFile(t, t.TempDir(), 4096, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 1, OnCommand: func(uint32, int32) {}})
	defer unix.Write(efd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	onThread(t, q, func() {
		for tag := range uint32(64) {
			q.Command(tag).PrepPollAdd(efd, unix.POLLIN)
		}
	})
	done := make(chan struct{})
	op := &Op{Kind: Read, File: f, Len: 4096, Buf: MemBuf(mapped(t, 4096)), Done: func(*Op) { close(done) }}
	q.Post(&Task{Run: func() {
		for tag := range uint32(3) {
			q.Command(tag).PrepPollAdd(efd, unix.POLLIN)
		}
		q.Submit(op)
	}})
	within(t, "read", done)
}

func TestRingPostsFromManyGoroutines(t *testing.T) {
	const posters, each = 6, 3000
	q := startQueue(t, RingConfig{Name: "test", Depth: 1})
	last := make([]int, posters) // the queue's thread alone
	var ran atomic.Int64
	var all sync.WaitGroup
	for p := range posters {
		all.Add(1)
		go func() {
			defer all.Done()
			rng := rand.New(rand.NewPCG(1, uint64(p)))
			for i := 1; i <= each; i++ {
				q.Post(&Task{Run: func() {
					if last[p] != i-1 {
						t.Errorf("poster %d: task %d ran after task %d", p, i, last[p])
					}
					last[p] = i
					ran.Add(1)
				}})
				// Now and then the queue gets time to fall asleep.
				if rng.IntN(64) == 0 {
					time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond)
				}
			}
		}()
	}
	all.Wait()
	for end := time.Now().Add(time.Minute); ran.Load() != posters*each; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of %d tasks ran", ran.Load(), posters*each)
		}
	}
}

// TestRingNoLostWakeUp sends one task back and forth between two queues and the
// test: a wake-up lost is a hang.
func TestRingNoLostWakeUp(t *testing.T) {
	a := startQueue(t, RingConfig{Name: "a", Depth: 1})
	b := startQueue(t, RingConfig{Name: "b", Depth: 1})
	const rounds = 5000
	n := 0
	done := make(chan struct{})
	var ping, pong Task
	ping.Run = func() { b.Post(&pong) }
	pong.Run = func() {
		if n++; n == rounds {
			close(done)
			return
		}
		a.Post(&ping)
	}
	a.Post(&ping)
	within(t, "ping-pong", done)
	ran := make(chan struct{})
	task := &Task{Run: func() { ran <- struct{}{} }}
	for range rounds {
		a.Post(task) // posted again once it has begun to run
		within(t, "task", ran)
	}
}

func TestRingStopWhileBusy(t *testing.T) {
	f := diskFile(t, t.TempDir(), 1<<20, OpenOptions{})
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
	cfg := RingConfig{Name: "test", Depth: 1, OnCommand: func(uint32, int32) { answers.Add(1) }}
	start := func() (*RingQueue, chan struct{}) {
		q := startQueue(t, cfg)
		onThread(t, q, func() { q.Command(0).PrepPollAdd(efd, unix.POLLIN) })
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

func TestRingEmptyBuffers(t *testing.T) {
	f := diskFile(t, t.TempDir(), 4096, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 1, Files: []*OSFile{f}, Buffers: make([][]byte, 4)})
	// The place is there, and empty until a driver fills it.
	if e := onQueue(t, q, &Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Index: 3}}); e != unix.EFAULT {
		t.Fatalf("read into an empty place: %v, want EFAULT", e)
	}
}

// Memory that comes and goes: what was written from one pinned buffer is read
// into another, places are used again, and there is an end of them.
func TestRingPin(t *testing.T) {
	f := diskFile(t, t.TempDir(), 64<<10, OpenOptions{})
	mem := mapped(t, 16<<10)
	own := mapped(t, 4096)
	q := startQueue(t, RingConfig{Name: "test", Depth: 4, Files: []*OSFile{f}, Buffers: [][]byte{own}, Pins: 5})
	pin := func(mem []byte) (index int32, err error) {
		call(t, q, func() { index, err = q.Pin(mem) })
		return index, err
	}
	for round := range 3 {
		a, err := pin(mem[:8<<10])
		if err != nil {
			t.Fatal(err)
		}
		b, err := pin(mem[8<<10:])
		if err != nil {
			t.Fatal(err)
		}
		if a == b || a == 0 || b == 0 {
			t.Fatalf("places %d and %d beside 0", a, b)
		}
		for i := range 8 << 10 {
			mem[i] = byte(i*7 + round)
		}
		buf := func(index int32, mem []byte) Buf {
			return Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: index}
		}
		if e := onQueue(t, q, &Op{Kind: Write, File: f, Off: 512, Len: 4096, Buf: buf(a, mem).At(512)}); e != 0 {
			t.Fatal(e)
		}
		if e := onQueue(t, q, &Op{Kind: Read, File: f, Off: 512, Len: 4096, Buf: buf(b, mem[8<<10:]).At(1024)}); e != 0 {
			t.Fatal(e)
		}
		if !bytes.Equal(mem[512:512+4096], mem[9<<10:13<<10]) {
			t.Fatal("read differs from what was written")
		}
		call(t, q, func() { q.Unpin(a) })
		if e := onQueue(t, q, &Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Index: a}}); e != unix.EFAULT {
			t.Fatalf("read into a place given back: %v, want EFAULT", e)
		}
		call(t, q, func() { q.Unpin(b) })
	}
	// Operations that wait for a slot, or for the next turn, when their memory is
	// pinned no more, and another in its place, go on as without it.
	ops := make([]Op, 12)
	ended := make(chan unix.Errno, len(ops))
	call(t, q, func() {
		a, err := q.Pin(mem[:8<<10])
		if err != nil {
			t.Error(err)
			return
		}
		for i := range ops {
			b := Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: a}
			ops[i] = Op{Kind: Read, File: f, Off: 512, Len: 512, Buf: b.At(int64(i) * 512), Done: func(op *Op) { ended <- op.Err }}
			q.Submit(&ops[i])
		}
		q.Unpin(a)
		b, err := q.Pin(own)
		if err != nil || a != b {
			t.Errorf("pinned at %d after %d, %v", b, a, err)
		}
		q.Unpin(b)
	})
	for range ops {
		if e := <-ended; e != 0 {
			t.Fatalf("operation on memory that is pinned no more: %v", e)
		}
	}
	for range 5 {
		if _, err := pin(own); err != nil {
			t.Fatal(err)
		}
	}
	if index, err := pin(own); err == nil || index != NoIndex {
		t.Fatalf("one too many is at %d, %v", index, err)
	}
}

// TestRingAllocatesNothing counts what the whole process allocates while a
// queue works in its steady state.
func TestRingAllocatesNothing(t *testing.T) {
	f := diskFile(t, t.TempDir(), 1<<20, OpenOptions{})
	q := startQueue(t, RingConfig{Name: "test", Depth: 8, Commands: 4, Files: []*OSFile{f}, OnCommand: func(uint32, int32) {}})
	other := startQueue(t, RingConfig{Name: "other", Depth: 1})
	mem := mapped(t, 16*4096)
	ops := make([]Op, 16) // twice the depth: half of them wait
	left := 0
	finished := make(chan struct{}, 1)
	flying := 0
	submit := func(op *Op) {
		left--
		flying++
		op.Kind = []Kind{Read, Write, Read, Flush}[left%4]
		op.FUA = left%64 == 1
		if left%8 == 0 {
			q.Command(uint32(left)).PrepNop()
		}
		q.Submit(op)
	}
	back := &Task{Run: func() {}}
	there := &Task{Run: func() { q.Post(back) }}
	for i := range ops {
		ops[i] = Op{File: f, Off: int64(i) * 4096, Len: 4096, Reach: 1 << 20, Buf: MemBuf(mem[i*4096:])}
		ops[i].Done = func(op *Op) {
			if flying--; left > 0 {
				submit(op)
			} else if flying == 0 {
				finished <- struct{}{}
			}
		}
	}
	begin := &Task{Run: func() {
		other.Post(there)
		for i := range ops {
			submit(&ops[i])
		}
	}}
	run := func(n int) uint64 {
		var a, b runtime.MemStats
		runtime.ReadMemStats(&a)
		left = n
		q.Post(begin)
		<-finished
		runtime.ReadMemStats(&b)
		return b.Mallocs - a.Mallocs
	}
	run(500)
	const n = 5000
	// The runtime itself allocates now and then: the best of three counts.
	if allocs := min(run(n), run(n), run(n)); allocs > n/100 {
		t.Fatalf("%d allocations in %d operations", allocs, n)
	}
	// One more goroutine per queue, however much it does.
	if g := runtime.NumGoroutine(); g > 20 {
		t.Fatalf("%d goroutines", g)
	}
}

// TestRingGivesItsProcessorBack: an idle queue does not wait raw for long, and
// collections end while it does.
func TestRingGivesItsProcessorBack(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	var queues []*RingQueue
	for i := range 4 {
		queues = append(queues, startQueue(t, RingConfig{Name: fmt.Sprint("idle", i), Depth: 1}))
	}
	for range 30 {
		for _, q := range queues {
			onThread(t, q, func() {})
		}
		if n := rawQueues.Load(); n > 2 {
			t.Fatalf("%d queues wait raw with 3 processors, want at most 2", n)
		}
		done := make(chan struct{})
		go func() {
			runtime.GC()
			close(done)
		}()
		within(t, "collection", done)
	}
	for end := time.Now().Add(time.Minute); rawQueues.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d idle queues still wait raw", rawQueues.Load())
		}
	}
	// Idle ones wake up again.
	for _, q := range queues {
		onThread(t, q, func() {})
	}
}

func TestRawLimit(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(5))
	if n := rawLimit("madvdontneed=1,asyncpreemptoff=0"); n != 4 {
		t.Errorf("%d queues may wait raw with 5 processors, want 4", n)
	}
	if n := rawLimit("x=1,asyncpreemptoff=1"); n != 0 {
		t.Errorf("%d queues may wait raw without preemption, want 0", n)
	}
}
