package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// pretend makes a Control whose commands are what prep makes of them.
func pretend(t *testing.T, prep func(*uring.SQE, int, *command)) *Control {
	t.Helper()
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := newControl(fd, prep)
	if err != nil {
		t.Skipf("no io_uring here: %v", err)
	}
	t.Cleanup(c.Close)
	return c
}

// pipeOps pretends that a command with data 1 reads from a pipe, which waits,
// and any other one does nothing, as an entry of zeroes does (IORING_OP_NOP).
func pipeOps(r int) func(*uring.SQE, int, *command) {
	return func(sqe *uring.SQE, _ int, cmd *command) {
		if cmd.arg.Data[0] == 1 {
			sqe.PrepRead(r, cmd.arg.Addr, uint32(cmd.arg.Len), 0, 0)
		}
	}
}

func testPipe(t *testing.T) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}

func TestPrepCommand(t *testing.T) {
	var sqe [2]uring.SQE // 128 bytes
	cmd := &command{op: uapi.UBLK_U_CMD_START_DEV, arg: uapi.UblksrvCtrlCmd{
		DevID: 0x11223344, QueueID: 0x5566, Len: 0x7788, Addr: 0x1020304050607080, Data: [1]uint64{42}, DevPathLen: 9}}
	prepCommand(&sqe[0], 7, cmd)
	if sqe[0].Opcode != uring.IORING_OP_URING_CMD || sqe[0].Fd != 7 || uint32(sqe[0].Off) != 0xc0207506 {
		t.Errorf("entry %+v", sqe[0])
	}
	want := "\x44\x33\x22\x11\x66\x55\x88\x77\x80\x70\x60\x50\x40\x30\x20\x10\x2a\x00\x00\x00\x00\x00\x00\x00\x09\x00"
	if got := string(sqe[0].Cmd80()[:len(want)]); got != want {
		t.Errorf("command area %q, want %q", got, want)
	}
}

func TestControlBuffers(t *testing.T) {
	r, w := testPipe(t)
	c := pretend(t, pipeOps(r))
	if _, err := unix.Write(w, []byte("answer")); err != nil {
		t.Fatal(err)
	}
	buf := []byte("......")
	if err := c.do(context.Background(), uapi.UBLK_U_CMD_GET_DEV_INFO, uapi.UblksrvCtrlCmd{Data: [1]uint64{1}}, buf); err != nil {
		t.Fatal(err)
	}
	if string(buf) != "answer" {
		t.Errorf("buffer %q", buf)
	}
}

func TestControlErrno(t *testing.T) {
	c := pretend(t, func(sqe *uring.SQE, _ int, _ *command) { sqe.PrepRead(-1, 0, 0, 0, 0) })
	err := c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 3, 0)
	if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "stop device 3") {
		t.Errorf("error %v", err)
	}
}

// TestCommandErr: what a driver of Linux 6.6 says to an unknown command must be
// known for what it is.
func TestCommandErr(t *testing.T) {
	for res, want := range map[int32]error{0: nil, 5: nil, -int32(unix.EBUSY): unix.EBUSY, -524: unix.EOPNOTSUPP, notRun: ErrClosed} {
		if err := (&command{res: res}).err(); !errors.Is(err, want) {
			t.Errorf("%d: %v, want %v", res, err, want)
		}
	}
}

// TestControlGivesUp leaves commands that never end, more of them than there
// are slots, while others go on.
func TestControlGivesUp(t *testing.T) {
	r, _ := testPipe(t)
	c := pretend(t, pipeOps(r))
	for i := range 2 * commandSlots {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		var buf [8]byte
		err := c.do(ctx, uapi.UBLK_U_CMD_START_DEV, uapi.UblksrvCtrlCmd{Data: [1]uint64{1}}, buf[:])
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("command %d: %v", i, err)
		}
		if err := c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 0, 0); err != nil {
			t.Fatalf("after command %d: %v", i, err)
		}
	}
}

// TestControlQueuedLikeHung: of commands that were queued before one like them was
// found to hang, none follows it into the kernel until it has ended.
func TestControlQueuedLikeHung(t *testing.T) {
	r, w := testPipe(t)
	pipe := pipeOps(r)
	var started atomic.Int64
	begun := make(chan struct{})
	c := pretend(t, func(sqe *uring.SQE, dev int, cmd *command) {
		pipe(sqe, dev, cmd)
		switch cmd.op {
		case uapi.UBLK_U_CMD_GET_DEV_INFO:
			close(begun)
		case uapi.UBLK_U_CMD_START_DEV:
			started.Add(1)
		}
	})
	const alike = 2 * commandSlots
	ended := make(chan error, alike+1)
	go func() {
		var buf [4]byte
		ended <- c.do(context.Background(), uapi.UBLK_U_CMD_GET_DEV_INFO, uapi.UblksrvCtrlCmd{Data: [1]uint64{1}}, buf[:])
	}()
	<-begun
	for range alike {
		go func() { ended <- c.command(context.Background(), uapi.UBLK_U_CMD_START_DEV, 3, 0) }()
	}
	for queued := 0; queued < alike; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		queued = len(c.queue)
		c.mu.Unlock()
	}
	hung := &command{op: uapi.UBLK_U_CMD_START_DEV, arg: uapi.UblksrvCtrlCmd{DevID: 3}}
	c.mu.Lock()
	c.givenUp[hung.key()] = hung
	c.mu.Unlock()
	if _, err := unix.Write(w, []byte("done")); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 3, 0); err != nil {
		t.Errorf("another command: %v", err)
	}
	if n := started.Load(); n != 0 {
		t.Errorf("%d commands followed one that hangs", n)
	}
	c.mu.Lock()
	delete(c.givenUp, hung.key())
	c.mu.Unlock()
	c.notify()
	for range alike {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// TestControlNoWorker: a command for which the kernel can make no worker is given again,
// until there is one or nobody waits for the command any more.
func TestControlNoWorker(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a thread another user's")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var given atomic.Int64
	c := pretend(t, func(sqe *uring.SQE, _ int, _ *command) {
		// The limit below holds for this thread alone, because root has none.
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 && given.Load() == 0 {
			t.Errorf("become another user: %v", errno)
		}
		given.Add(1)
		sqe.PrepFsync(int(f.Fd()), 0) // needs a worker
	})
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
	limit(0)
	for _, givenUp := range []bool{true, false} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		before, ended := given.Load(), make(chan error, 1)
		go func() { ended <- c.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, 3, 0) }()
		for given.Load() < before+3 {
			select {
			case err := <-ended:
				t.Fatalf("without a worker: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
		if givenUp {
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Fatalf("given up: %v", err)
			}
			continue
		}
		limit(was.Cur)
		if err := <-ended; err != nil {
			t.Fatalf("with a worker: %v", err)
		}
	}
}

// TestControlReminds: while somebody waits for long, the kernel is reminded of its workers,
// and the command ends as it would have.
func TestControlReminds(t *testing.T) {
	r, w := testPipe(t)
	thread := make(chan int, 1)
	c := pretend(t, func(sqe *uring.SQE, _ int, _ *command) {
		thread <- unix.Gettid()
		sqe.PrepPollAdd(r, unix.POLLIN) // needs no worker
	})
	ended := make(chan error, 1)
	go func() { ended <- c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 3, 0) }()
	worker := fmt.Sprintf("iou-wrk-%d\n", <-thread)
	for found := false; !found; {
		select {
		case err := <-ended:
			t.Fatal("ended before its time:", err)
		case <-time.After(10 * time.Millisecond):
		}
		tasks, _ := filepath.Glob("/proc/self/task/*/comm")
		found = slices.ContainsFunc(tasks, func(path string) bool {
			comm, _ := os.ReadFile(path)
			return string(comm) == worker
		})
	}
	if _, err := unix.Write(w, []byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestAddGivesUp: a driver that does not make the device is given up, and the
// device that it makes in the end is deleted.
func TestAddGivesUp(t *testing.T) {
	r, w := testPipe(t)
	begun, deleted := make(chan struct{}, 1), make(chan uint32, 2)
	c := pretend(t, func(sqe *uring.SQE, _ int, cmd *command) {
		switch cmd.op {
		case uapi.UBLK_U_CMD_ADD_DEV:
			sqe.PrepRead(r, cmd.arg.Addr, uint32(cmd.arg.Len), 0, 0)
			begun <- struct{}{}
		case uapi.UBLK_U_CMD_DEL_DEV_ASYNC:
			deleted <- cmd.arg.DevID
		}
	})
	add := func(ctx context.Context) error {
		_, err := Add(ctx, c, Config{ID: AnyID, Queues: 1, Depth: 1, MaxIO: DefaultMaxIO, Mode: ModeCopy,
			Geometry:   Geometry{Size: 1 << 20, LogicalBlock: 512, PhysicalBlock: 512, IOMin: 512},
			NewHandler: func(int, blockdev.Queue) Handler { return nil }})
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := add(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	<-begun

	// The kernel would not let it be cancelled as this one does: it is given up and
	// has made the device at once.
	ctx, cancel = context.WithCancel(context.Background())
	added := make(chan error, 1)
	go func() { added <- add(ctx) }()
	<-begun
	c.mu.Lock()
	cancel()
	time.Sleep(10 * time.Millisecond) // for who gives up to be the first in line
	info := uapi.UblksrvCtrlDevInfo{DevID: 5}
	if _, err := unix.Write(w, bytesOf(&info)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Millisecond)
	c.mu.Unlock()
	if err := <-added; err == nil {
		t.Error("no error")
	}
	if id := <-deleted; id != 5 {
		t.Errorf("device %d is deleted, want 5", id)
	}
}

// TestControlMany runs commands from many goroutines and gives some up before
// their turn.
func TestControlMany(t *testing.T) {
	c := pretend(t, func(*uring.SQE, int, *command) {}) // an entry of zeroes does nothing
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 200 {
				ctx, cancel := context.WithCancel(context.Background())
				if (g+i)%5 == 0 {
					cancel()
				}
				err := c.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, g, 0)
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				cancel()
			}
		}()
	}
	wg.Wait()
}

func TestControlClose(t *testing.T) {
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := fds()
	r, w := testPipe(t)
	begun := make(chan struct{})
	pipe := pipeOps(r)
	c := pretend(t, func(sqe *uring.SQE, slot int, cmd *command) {
		pipe(sqe, slot, cmd)
		if cmd.op == uapi.UBLK_U_CMD_START_DEV {
			close(begun)
		}
	})
	running := make(chan error)
	go func() {
		var buf [4]byte
		running <- c.do(context.Background(), uapi.UBLK_U_CMD_START_DEV, uapi.UblksrvCtrlCmd{Data: [1]uint64{1}}, buf[:])
	}()
	<-begun
	waiting := make(chan error)
	go func() { waiting <- c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 0, 0) }()
	for {
		c.mu.Lock()
		queued := len(c.queue) == 1
		c.mu.Unlock()
		if queued {
			break
		}
		time.Sleep(time.Millisecond)
	}
	closed := make(chan bool)
	go func() { c.Close(); close(closed) }()
	select {
	case <-closed:
		t.Error("closed while a command was running")
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := unix.Write(w, []byte("done")); err != nil {
		t.Fatal(err)
	}
	if err := <-running; err != nil {
		t.Errorf("the running command: %v", err)
	}
	if err := <-waiting; !errors.Is(err, ErrClosed) {
		t.Errorf("the waiting command: %v", err)
	}
	<-closed
	c.Close()
	if err := c.command(context.Background(), uapi.UBLK_U_CMD_STOP_DEV, 0, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("a command after the end: %v", err)
	}
	if n := fds(); n > before+2 { // the pipe
		t.Errorf("%d files open, %d before", n, before)
	}
}
