package blockdev

import (
	"fmt"
	"math"
	"runtime"
	"testing"
	"time"
)

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
	q.beginRaw()
	if !q.raw {
		t.Fatal("does not wait raw")
	}
	defer q.endRaw()
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
