package filter_test

import (
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// nullFile is a disk that moves no data.
type nullFile string

func (f nullFile) Name() string { return string(f) }

// nullQueue is a queue whose operations are over at the next turn. Its turns have
// the order of blockdev.RingQueue's: posted tasks, then completions.
type nullQueue struct {
	ops, doneOps []*blockdev.Op

	mu               sync.Mutex
	tasks, doneTasks []*blockdev.Task // tasks: posted, from any thread
}

func (q *nullQueue) Submit(op *blockdev.Op) { q.ops = append(q.ops, op) }

func (q *nullQueue) Post(t *blockdev.Task) {
	q.mu.Lock()
	q.tasks = append(q.tasks, t)
	q.mu.Unlock()
}

// turn says whether there was anything to do.
func (q *nullQueue) turn() bool {
	q.mu.Lock()
	q.tasks, q.doneTasks = q.doneTasks[:0], q.tasks
	q.mu.Unlock()
	for _, t := range q.doneTasks {
		t.Run()
	}
	q.ops, q.doneOps = q.doneOps[:0], q.ops
	for _, op := range q.doneOps {
		op.Err = 0
		op.Done(op)
	}
	return len(q.doneTasks)+len(q.doneOps) > 0
}

// client keeps depth writes of a chunk each under way at a queue.
type client struct {
	handle func(*ublk.Request)
	q      *nullQueue
	idle   []*ublk.Request
	depth  int
}

func (c *client) Completed(r *ublk.Request, errno unix.Errno) {
	if errno != 0 {
		panic(errno)
	}
	c.idle = append(c.idle, r)
}

// write writes the chunks of [from, to) in the order that permute gives them.
func (c *client) write(from, to int64, permute func(int64) int64) {
	for from < to || len(c.idle) < c.depth {
		for n := len(c.idle); n > 0 && from < to; n = len(c.idle) {
			r := c.idle[n-1]
			c.idle = c.idle[:n-1]
			r.Off = permute(from) * chunk
			from++
			c.handle(r)
		}
		c.q.turn()
	}
	for c.q.turn() {
	}
}

// BenchmarkFirstTouch is what filter and difference areas cost a write to a chunk
// that is copied, the copy's store included, over disks that cost nothing.
func BenchmarkFirstTouch(b *testing.B) {
	const random, inOrder = 12345, 1 // chunks from one write to the next
	for _, c := range []struct{ stride, queues, depth, snapshots int }{
		{random, 1, 1, 1},
		{random, 1, 32, 1},
		{random, 1, 32, 3},
		{random, 2, 32, 1},
		{inOrder, 1, 1, 1},
		{inOrder, 1, 32, 1},
	} {
		name := fmt.Sprintf("stride=%d/queues=%d/depth=%d/snapshots=%d", c.stride, c.queues, c.depth, c.snapshots)
		b.Run(name, func(b *testing.B) {
			const chunks = 1 << 16 // a power of two, so that an odd stride meets each once
			permute := func(i int64) int64 { return i * int64(c.stride) % chunks }
			b.ReportAllocs()
			for done := 0; done < b.N; done += chunks {
				b.StopTimer()
				clients := newBenchClients(b, chunks*chunk, c.queues, c.depth, c.snapshots)
				n := min(int64(b.N-done), chunks)
				b.StartTimer()
				var all sync.WaitGroup
				for i, cl := range clients {
					all.Add(1)
					go func() {
						defer all.Done()
						i, queues := int64(i), int64(c.queues)
						cl.write(n*i/queues, n*(i+1)/queues, permute)
					}()
				}
				all.Wait()
			}
		})
	}
}

// newBenchClients makes a filter with snapshots that have copied nothing, and a
// client for each of its queues.
func newBenchClients(b *testing.B, size int64, queues, depth, snapshots int) []*client {
	disk := nullFile("disk")
	f := filter.New(filter.Config{Orig: disk, Size: size, CBT: must(cbtmap.NewMemory(size, cbtmap.DefaultParams())), Queues: queues})
	clients := make([]*client, queues)
	for i := range clients {
		q := &nullQueue{}
		c := &client{handle: f.NewQueue(i, q).Handle, q: q, depth: depth}
		for tag := range depth {
			r := ublk.NewRequest(tag, c)
			r.Op, r.Len, r.Buf = ublk.OpWrite, chunk, blockdev.MemBuf(make([]byte, chunk))
			c.idle = append(c.idle, r)
		}
		clients[i] = c
	}
	control := &nullQueue{}
	w := diffarea.NewWorker(control)
	for range snapshots {
		l, err := diffarea.NewLog(diffarea.LogConfig{
			ChunkSize: chunk, Pool: diffarea.Pool{Mem: make([]byte, 1024*chunk), File: nullFile("pool")},
			State: make([]byte, diffarea.LogStateSize), Portion: 1 << 20,
			OnEvent: func(e diffarea.Event) { b.Error(e) },
		})
		if err != nil {
			b.Fatal(err)
		}
		l.Append(w, diffarea.Storage{File: nullFile("storage"), Size: size, Fixed: true}, func(err error) {
			if err != nil {
				b.Error(err)
			}
		})
		a := diffarea.NewArea(diffarea.AreaConfig{
			Log: l, Orig: disk, Size: size,
			Words: make([]byte, diffarea.TableSize(diffarea.Chunks(size, chunk))),
		})
		held := false
		filter.StartCut([]*filter.Filter{f}, []*diffarea.Area{a}, func() {}, func(ok bool) { held = ok })
		for range 8 {
			control.turn()
			for _, c := range clients {
				c.q.turn()
			}
		}
		if !held {
			b.Fatal("the cut did not happen")
		}
	}
	return clients
}
