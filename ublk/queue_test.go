package ublk

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

func TestDecode(t *testing.T) {
	const maxIO = 64 << 10
	cases := []struct {
		flags, sectors uint32
		start          uint64
		want           Request
		errno          unix.Errno
	}{
		{uapi.UBLK_IO_OP_READ, 8, 3, Request{Op: OpRead, Off: 1536, Len: 4096}, 0},
		{uapi.UBLK_IO_OP_WRITE, 1, 1 << 40, Request{Op: OpWrite, Off: 1 << 49, Len: 512}, 0},
		{uapi.UBLK_IO_OP_WRITE | uapi.UBLK_IO_F_FUA | uapi.UBLK_IO_F_META, 128, 0, Request{Op: OpWrite, FUA: true, Len: 65536}, 0},
		{uapi.UBLK_IO_OP_READ | uapi.UBLK_IO_F_FUA, 1, 0, Request{Op: OpRead, Len: 512}, 0},
		{uapi.UBLK_IO_OP_FLUSH, 0, ^uint64(0), Request{Op: OpFlush}, 0},
		{uapi.UBLK_IO_OP_DISCARD, 8388607, 0, Request{Op: OpDiscard, Len: 8388607 * 512}, 0},
		{uapi.UBLK_IO_OP_WRITE_ZEROES, 8388607, 8, Request{Op: OpWriteZeroes, Off: 4096, Len: 8388607 * 512}, 0},
		{uapi.UBLK_IO_OP_WRITE_ZEROES | uapi.UBLK_IO_F_NOUNMAP, 1, 0, Request{Op: OpWriteZeroes, NoUnmap: true, Len: 512}, 0},
		{uapi.UBLK_IO_OP_WRITE_SAME, 1, 0, Request{}, unix.EOPNOTSUPP},
		{uapi.UBLK_IO_OP_ZONE_APPEND, 1, 0, Request{}, unix.EOPNOTSUPP},
		{uapi.UBLK_IO_OP_REPORT_ZONES, 1, 0, Request{}, unix.EOPNOTSUPP},
		{255, 1, 0, Request{}, unix.EOPNOTSUPP},
		{uapi.UBLK_IO_OP_READ, 129, 0, Request{}, unix.EINVAL},
		{uapi.UBLK_IO_OP_WRITE, 0, 0, Request{}, unix.EINVAL},
		{uapi.UBLK_IO_OP_WRITE, 1, 1 << 60, Request{}, unix.EINVAL},
	}
	for _, c := range cases {
		// What an earlier request left must not show.
		r := Request{Op: OpWriteZeroes, FUA: true, NoUnmap: true, Off: 99, Len: 99}
		errno := r.decode(c.flags, c.sectors, c.start, maxIO)
		if errno != c.errno || errno == 0 && r != c.want {
			t.Errorf("flags %#x, %d sectors at %d: %v %+v, want %v %+v", c.flags, c.sectors, c.start, errno, r, c.errno, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(uint32(1), uint32(8), uint64(0))
	f.Add(uint32(0x2003), uint32(1<<31), uint64(1)<<63)
	f.Fuzz(func(t *testing.T, flags, sectors uint32, start uint64) {
		const maxIO = 128 << 10
		var r Request
		if errno := r.decode(flags, sectors, start, maxIO); errno != 0 {
			if res := r.result(errno); res != -int32(errno) {
				t.Errorf("result %d of %v", res, errno)
			}
			return
		}
		if r.Off < 0 || r.Len < 0 || r.Off+r.Len < 0 || r.Op > OpWriteZeroes {
			t.Errorf("%+v", r)
		}
		payload := r.Op == OpRead || r.Op == OpWrite
		if payload && (r.Len == 0 || r.Len > maxIO || int64(r.result(0)) != r.Len) || !payload && r.result(0) != 0 {
			t.Errorf("%+v has result %d", r, r.result(0))
		}
		if r.FUA && r.Op != OpWrite || r.NoUnmap && r.Op != OpWriteZeroes {
			t.Errorf("%+v", r)
		}
	})
}

func TestResult(t *testing.T) {
	for op, want := range map[Op]int32{OpRead: 4096, OpWrite: 4096, OpFlush: 0, OpDiscard: 0, OpWriteZeroes: 0} {
		r := Request{Op: op, Len: 4096}
		if got := r.result(0); got != want {
			t.Errorf("%s: result %d, want %d", op, got, want)
		}
		if got := r.result(unix.ENOSPC); got != -28 {
			t.Errorf("%s: result %d of ENOSPC", op, got)
		}
	}
}

// keeper keeps the requests it gets.
type keeper struct{ got []*Request }

func (k *keeper) Handle(r *Request) { k.got = append(k.got, r) }

// testQueue is a queue without a kernel: its commands go to a file that knows
// none, and the test plays the answers.
func testQueue(t *testing.T, depth int, zeroCopy bool) (*queue, *keeper) {
	t.Helper()
	desc, err := unix.Mmap(-1, 0, descBytes(depth), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	u, err := newQueue(3, depth, 8192, zeroCopy)
	if err != nil {
		t.Fatal(err)
	}
	u.describe(desc)
	t.Cleanup(u.unmap)
	k := &keeper{}
	u.handler = k
	return u, k
}

func TestServe(t *testing.T) {
	for _, zeroCopy := range []bool{false, true} {
		u, k := testQueue(t, 4, zeroCopy)
		u.desc[2] = uapi.UblksrvIODesc{OpFlags: uapi.UBLK_IO_OP_WRITE, NrSectors: 16, StartSector: 8}
		u.onCommand(2, uapi.UBLK_IO_RES_OK)
		if len(k.got) != 1 {
			t.Fatalf("%d requests", len(k.got))
		}
		r := k.got[0]
		if r.Tag != 2 || r.Op != OpWrite || r.Off != 4096 || r.Len != 8192 || r.Buf.Index != 2 || r.Buf.Off != 0 {
			t.Errorf("request %+v", r)
		}
		if zeroCopy {
			if r.Buf.Mem != nil {
				t.Error("zero copy with memory")
			}
		} else if r.Buf.Mem != unsafe.Pointer(&u.payloadMem[2*8192]) {
			t.Error("the wrong buffer")
		}
	}
}

func TestAbort(t *testing.T) {
	u, k := testQueue(t, 2, false)
	u.fetchFailed = func(err error) { t.Errorf("failed: %v", err) }
	u.onCommand(0, uapi.UBLK_IO_RES_ABORT)
	u.onCommand(1, uapi.UBLK_IO_RES_ABORT)
	if len(k.got) != 0 || u.tags[0] != tagEnded || u.tags[1] != tagEnded {
		t.Errorf("%d requests, tags %v", len(k.got), u.tags)
	}
}

func TestFetchRefused(t *testing.T) {
	u, _ := testQueue(t, 1, false)
	var got error
	u.fetchFailed = func(err error) { got = err }
	u.onCommand(0, -int32(unix.EINVAL))
	if got == nil || !strings.Contains(got.Error(), "fetch tag 0 of queue 3: invalid argument") {
		t.Errorf("error %v", got)
	}
}

func TestBrokenInvariants(t *testing.T) {
	panics := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s: no panic", name)
			}
		}()
		f()
	}
	u, k := testQueue(t, 1, false)
	panics("completion of a request that the handler does not have", func() { u.reqs[0].Complete(0) })
	u.desc[0] = uapi.UblksrvIODesc{OpFlags: uapi.UBLK_IO_OP_FLUSH}
	u.onCommand(0, uapi.UBLK_IO_RES_OK)
	panics("a second request on a tag", func() { u.onCommand(0, uapi.UBLK_IO_RES_OK) })
	u.tags[0] = tagCommitted // as if it had been completed
	panics("second completion", func() { k.got[0].Complete(0) })
	panics("refused commit", func() { u.onCommand(0, -int32(unix.EINVAL)) })
}

func TestFill(t *testing.T) {
	for _, zeroCopy := range []bool{false, true} {
		u, _ := testQueue(t, 4, zeroCopy)
		var sqe uring.SQE
		u.fill(&sqe, uapi.UBLK_U_IO_COMMIT_AND_FETCH_REQ, 2, -5)
		if sqe.Opcode != uring.IORING_OP_URING_CMD || sqe.Flags != uring.IOSQE_FIXED_FILE || sqe.Fd != cdevFile || uint32(sqe.Off) != 0xc0107521 {
			t.Errorf("entry %+v", sqe)
		}
		cmd := *(*uapi.UblksrvIOCmd)(unsafe.Pointer(sqe.Cmd()))
		want := uapi.UblksrvIOCmd{QID: 3, Tag: 2, Result: -5}
		addr := uint64(0x10002) // index 2, fallback
		if !zeroCopy {
			want.Addr, addr = uint64(uintptr(unsafe.Pointer(&u.payloadMem[2*8192]))), 0
		}
		if cmd != want || sqe.Addr != addr {
			t.Errorf("command %+v, addr %#x, want %+v, %#x", cmd, sqe.Addr, want, addr)
		}
	}
}

// TestCommands sends commands through a ring to a file that takes none.
func TestCommands(t *testing.T) {
	fd, err := unix.MemfdCreate("no-device", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := blockdev.NewOSFile(fd, "no-device")
	defer file.Close()
	u, k := testQueue(t, 3, false)
	answers := make(chan int32, 8)
	u.ring, err = blockdev.NewRingQueue(blockdev.RingConfig{
		Name: "test", Depth: 1, Commands: 3, Files: []*blockdev.OSFile{file}, Buffers: u.buffers(),
		OnCommand: func(_ uint32, res int32) { answers <- res },
	})
	if err != nil {
		t.Skipf("no io_uring here: %v", err)
	}
	defer u.ring.Stop()
	u.ring.Post(&u.fetchTask)
	for range 3 {
		// A regular file takes no commands.
		if res := <-answers; res != -int32(unix.EOPNOTSUPP) {
			t.Errorf("fetch: %d", res)
		}
	}
	done := make(chan bool)
	u.ring.Post(&blockdev.Task{Run: func() {
		u.desc[1] = uapi.UblksrvIODesc{OpFlags: uapi.UBLK_IO_OP_READ, NrSectors: 1}
		u.onCommand(1, uapi.UBLK_IO_RES_OK)
		k.got[0].Complete(0)
		close(done)
	}})
	<-done
	if res := <-answers; res != -int32(unix.EOPNOTSUPP) || u.tags[1] != tagCommitted {
		t.Errorf("commit: %d, tag %v", res, u.tags[1])
	}
}

// TestRegister: a payload that cannot be registered at all fails its request,
// which the handler never sees; one that can is registered and unregistered.
func TestRegister(t *testing.T) {
	fd, err := unix.MemfdCreate("no-device", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := blockdev.NewOSFile(fd, "no-device")
	defer file.Close()
	u, k := testQueue(t, 2, true)
	answers := make(chan uint32, 8)
	play := map[uint32]int32{} // answers in place of the file's
	u.ring, err = blockdev.NewRingQueue(blockdev.RingConfig{
		Name: "test", Depth: 1, Commands: 2, Files: []*blockdev.OSFile{file}, Buffers: u.buffers(),
		OnCommand: func(tag uint32, res int32) {
			if tag&(forRegister|forPause) != 0 {
				if a, ok := play[tag]; ok {
					delete(play, tag) // the next one fails as it may
					res = a
				}
				u.onCommand(tag, res)
			}
			answers <- tag
		},
	})
	if err != nil {
		t.Skipf("no io_uring here: %v", err)
	}
	defer u.ring.Stop()
	serve := func(answer int32) {
		u.ring.Post(&blockdev.Task{Run: func() {
			if answer != 1 {
				play[1|forRegister] = answer
			}
			u.tags[1] = tagFetching
			u.desc[1] = uapi.UblksrvIODesc{OpFlags: uapi.UBLK_IO_OP_READ | uapi.UBLK_IO_F_NEED_REG_BUF, NrSectors: 1}
			u.onCommand(1, uapi.UBLK_IO_RES_OK)
		}})
	}
	expect := func(want ...uint32) {
		t.Helper()
		for _, w := range want {
			if got := <-answers; got != w {
				t.Fatalf("command %#x, want %#x", got, w)
			}
		}
	}
	const register, pause, commit, unregister = 1 | forRegister, 1 | forPause, 1, 1 | forUnregister
	serve(1) // no answer but the file's
	expect(register, commit)
	if len(k.got) != 0 || u.unregistered.Load() != 1 {
		t.Errorf("the handler has %d requests, %d failed", len(k.got), u.unregistered.Load())
	}
	serve(-int32(unix.ENOMEM)) // once, and then the file's
	expect(register, pause, register, commit)
	if len(k.got) != 0 || u.unregistered.Load() != 2 {
		t.Errorf("the handler has %d requests, %d failed", len(k.got), u.unregistered.Load())
	}
	serve(0)
	expect(register)
	done := make(chan struct{})
	u.ring.Post(&blockdev.Task{Run: func() {
		k.got[0].Complete(0)
		close(done)
	}})
	<-done
	expect(unregister, commit)
	if len(k.got) != 1 || u.unregistered.Load() != 2 {
		t.Errorf("the handler has %d requests, %d failed", len(k.got), u.unregistered.Load())
	}
}

func TestDescriptors(t *testing.T) {
	page := os.Getpagesize()
	for depth, want := range map[int]int{1: page, 170: page, 171: 2 * page, 4096: 4096 * 24} {
		if page == 4096 && descBytes(depth) != want {
			t.Errorf("depth %d: %d bytes, want %d", depth, descBytes(depth), want)
		}
	}
}

func TestThreadName(t *testing.T) {
	for _, c := range []struct {
		name string
		q    int
		want string
	}{{"data", 0, "data/0"}, {"a-rather-long-name", 7, "a-rather-long/7"}, {"a-rather-long-name", 63, "a-rather-lon/63"}, {"", 1, "/1"}} {
		if got := threadName(c.name, c.q); got != c.want || len(got) > 15 {
			t.Errorf("%q, %d: %q, want %q", c.name, c.q, got, c.want)
		}
	}
}

func TestAddProcs(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	addProcs(before + 5)
	if n := runtime.GOMAXPROCS(0); n != before+5+spareProcs {
		t.Errorf("GOMAXPROCS %d for %d queues", n, before+5)
	}
	addProcs(-5)
	if n := runtime.GOMAXPROCS(0); n != before+spareProcs {
		t.Errorf("GOMAXPROCS %d for %d queues", n, before)
	}
	addProcs(-before)
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("GOMAXPROCS %d, %d before", n, before)
	}
}
