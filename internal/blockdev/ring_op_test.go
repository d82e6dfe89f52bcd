package blockdev

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

func TestRingWritesAndReads(t *testing.T) {
	const n = 64 << 10
	for _, direct := range []int{0, unix.O_DIRECT} {
		for _, registered := range []bool{false, true} {
			t.Run(fmt.Sprintf("direct=%v registered=%v", direct != 0, registered), func(t *testing.T) {
				f := diskFile(t, t.TempDir(), 1<<20, direct)
				mem := mapped(t, 2*n)
				cfg := RingConfig{Name: "test", Depth: 4}
				out, in := MemBuf(mem), MemBuf(mem[n:])
				if registered {
					cfg.Files = []*OSFile{diskFile(t, t.TempDir(), 1, 0), f}
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
		"temp":   diskFile(t, t.TempDir(), 0, 0),
		"direct": diskFile(t, t.TempDir(), 0, unix.O_DIRECT),
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
	f := diskFile(t, t.TempDir(), size, 0)
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
	f := diskFile(t, t.TempDir(), 8192, 0)
	readOnly, err := openFile(f.Name(), unix.O_RDONLY)
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

// TestRingMinSize: a file that was truncated is not made to grow by those who know
// how far it reached, and one that is truncated under a write is noticed after it.
func TestRingMinSize(t *testing.T) {
	const size = 16384
	f := diskFile(t, t.TempDir(), size, 0)
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
		if e := onQueue(t, q, &Op{Kind: kind, File: f, Off: off, Len: 4096, MinSize: reach, Buf: buf}); e != want {
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
			q.Submit(&Op{Kind: Write, File: f, Len: 4096, MinSize: size, Buf: buf, Done: func(op *Op) { results <- op.Err }})
		}
		cut(0)
	})
	for range 2 {
		if e := <-results; e != unix.EIO {
			t.Errorf("write of a file truncated meanwhile: %v", e)
		}
	}
}

// TestRingAgainstModel runs random operations on several queues at a time, each
// with its own part of one file, and compares with plain memory.
func TestRingAgainstModel(t *testing.T) {
	const queues, part, depth, total = 3, 1 << 20, 8, 800
	f := diskFile(t, t.TempDir(), queues*part, 0)
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

// TestRingRetries answers for the kernel with errors that are no results.
func TestRingRetries(t *testing.T) {
	f := diskFile(t, t.TempDir(), 8192, 0)
	q := manualQueue(t, RingConfig{Depth: 1})
	calls := 0
	op := &Op{Kind: Read, File: f, Len: 8192, Buf: MemBuf(mapped(t, 8192)), Done: func(*Op) { calls++ }}
	answer := func() uring.CQE { t.Helper(); return nextAnswer(t, q) }
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
		{[]int32{-int32(unix.ECANCELED), -int32(unix.ECANCELED), 0}, true, 0},
		{[]int32{-int32(unix.ECANCELED), 0}, false, 0},
		{[]int32{-int32(unix.EAGAIN), -int32(unix.ECANCELED), -int32(unix.EIO)}, false, unix.EIO},
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
			if res == -int32(unix.ECANCELED) {
				endPause(t, q)
			}
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

// TestRingWaitingInOrder: with one slot, operations run one at a time, oldest
// first, those submitted from inside Done included.
func TestRingWaitingInOrder(t *testing.T) {
	f := diskFile(t, t.TempDir(), 4096, 0)
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

// TestRingAllocatesNothing counts what the whole process allocates while a
// queue works in its steady state.
func TestRingAllocatesNothing(t *testing.T) {
	f := diskFile(t, t.TempDir(), 1<<20, 0)
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
			q.Command(uint32(left)) // zeroed, an entry is IORING_OP_NOP
		}
		q.Submit(op)
	}
	back := &Task{Run: func() {}}
	there := &Task{Run: func() { q.Post(back) }}
	for i := range ops {
		ops[i] = Op{File: f, Off: int64(i) * 4096, Len: 4096, MinSize: 1 << 20, Buf: MemBuf(mem[i*4096:])}
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
