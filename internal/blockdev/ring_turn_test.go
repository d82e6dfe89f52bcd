package blockdev

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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

// TestRingAnswers: a thread that does its turns answers, one that is held up does not,
// and one that has ended holds nobody up.
func TestRingAnswers(t *testing.T) {
	q := startQueue(t, RingConfig{Name: "test", Depth: 1})
	if err := q.Answers(context.Background()); err != nil {
		t.Error(err)
	}
	held, release := make(chan struct{}), make(chan struct{})
	q.Post(&Task{Run: func() { close(held); <-release }})
	within(t, "the task", held)
	short, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := q.Answers(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a thread that is held up: %v", err)
	}
	close(release)
	if err := q.Answers(context.Background()); err != nil {
		t.Error(err)
	}
	q.Stop()
	if err := q.Answers(context.Background()); err != nil {
		t.Error(err)
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
				q.Command(tag ^ 0xffff0000) // zeroed, an entry is IORING_OP_NOP
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
	f := diskFile(t, t.TempDir(), 4096, 0)
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
