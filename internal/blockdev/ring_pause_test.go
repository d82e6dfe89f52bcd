package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// nextAnswer is the kernel's next answer to a queue that has no thread.
func nextAnswer(t *testing.T, q *RingQueue) uring.CQE {
	t.Helper()
	if err := q.ring.SubmitAndWait(1, false); err != nil {
		t.Fatal(err)
	}
	var c [2]uring.CQE
	if n := q.ring.Reap(c[:]); n != 1 {
		t.Fatalf("%d completions, want 1", n)
	}
	return c[0]
}

// endPause wants a pause to end, and goes on with its operation.
func endPause(t *testing.T, q *RingQueue) {
	t.Helper()
	if q.inFlight == 0 {
		t.Fatal("done after ECANCELED, want a pause")
	}
	c := nextAnswer(t, q)
	if c.UserData&kindMask != kindPause || c.Res != -int32(unix.ETIME) {
		t.Fatalf("after ECANCELED: %+v, want a pause", c)
	}
	q.issue(uint32(c.UserData))
}

// TestRingCancels: a file that always says ECANCELED is believed in the end. A block
// device is not, and neither is a file that did a part meanwhile.
func TestRingCancels(t *testing.T) {
	f := diskFile(t, t.TempDir(), 8192, 0)
	q := manualQueue(t, RingConfig{Depth: 1})
	for _, block := range []bool{false, true} {
		calls := 0
		op := &Op{Kind: Read, File: &OSFile{fd: f.fd, block: block}, Len: 8192, Buf: MemBuf(mapped(t, 8192)), Done: func(*Op) { calls++ }}
		q.Submit(op)
		sl := &q.slots[0]
		for _, cancels := range []uint16{0, 1, maxCancels - 1} {
			sl.cancels = cancels
			q.completed(uint32(nextAnswer(t, q).UserData), -int32(unix.ECANCELED))
			endPause(t, q)
		}
		q.completed(uint32(nextAnswer(t, q).UserData), 4096)
		if sl.cancels != 0 {
			t.Errorf("block %v: after a part %d times cancelled, want 0", block, sl.cancels)
		}
		sl.cancels = maxCancels
		q.completed(uint32(nextAnswer(t, q).UserData), -int32(unix.ECANCELED))
		want := unix.ECANCELED
		if block {
			endPause(t, q)
			q.completed(uint32(nextAnswer(t, q).UserData), 4096)
			want = 0
		}
		if calls != 1 || op.Err != want {
			t.Errorf("block %v: done %d times with %v, want once with %v", block, calls, op.Err, want)
		}
	}
}

// workerlessQueue starts a queue whose thread has no worker of the kernel yet, as
// another test's thread may have that Go uses again.
func workerlessQueue(t *testing.T, cfg RingConfig) *RingQueue {
	t.Helper()
	for {
		q := startQueue(t, cfg)
		var tid int
		onThread(t, q, func() { tid = unix.Gettid() })
		names, err := filepath.Glob("/proc/self/task/*/comm")
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(names, func(path string) bool {
			name, _ := os.ReadFile(path)
			return string(name) == fmt.Sprintf("iou-wrk-%d\n", tid)
		}) {
			return q
		}
	}
}

// TestRingNoWorker: a kernel that can make no worker for the queue's thread makes an
// operation wait that needs one, and does not make it fail.
func TestRingNoWorker(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make threads other users'")
	}
	f := diskFile(t, t.TempDir(), 4096, 0)
	q := workerlessQueue(t, RingConfig{Name: "no worker", Depth: 1})
	// The limit holds for the queue's thread alone, because root has none.
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &was); err != nil {
		t.Fatal(err)
	}
	limit := func(n uint64) {
		t.Helper()
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: n, Max: was.Max}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { limit(was.Cur) })
	const nobody = 65534
	onThread(t, q, func() {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			t.Errorf("become another user: %v", errno)
		}
	})
	limit(0)
	done := make(chan unix.Errno, 1)
	q.Post(&Task{Run: func() {
		q.Submit(&Op{Kind: Flush, File: f, Done: func(op *Op) { done <- op.Err }})
	}})
	for cancels := uint16(0); cancels < 2; {
		onThread(t, q, func() { cancels = q.slots[0].cancels })
		select {
		case errno := <-done:
			t.Fatalf("without a worker: %v", errno)
		case <-time.After(time.Millisecond):
		}
	}
	limit(was.Cur)
	if errno := <-done; errno != 0 {
		t.Fatalf("with a worker: %v", errno)
	}
}
