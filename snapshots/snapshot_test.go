package snapshots

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// original is a disk, a file, under a filter with one queue.
type original struct {
	t      *testing.T
	filter *filter.Filter
	ring   *holding
	queue  *filter.Queue
}

// holding is a queue that can keep back what is submitted.
type holding struct {
	*blockdev.RingQueue
	keeps bool // on the queue's thread, as what follows
	kept  []*blockdev.Op
}

func (h *holding) Submit(op *blockdev.Op) {
	if h.keeps {
		h.kept = append(h.kept, op)
		return
	}
	h.RingQueue.Submit(op)
}

func ring(t *testing.T, name string) *blockdev.RingQueue {
	t.Helper()
	q, err := blockdev.NewRingQueue(blockdev.RingConfig{Name: name, Depth: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Stop)
	return q
}

func newOriginal(t *testing.T, content []byte) *original {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	writeFile(t, path, string(content), 0o600)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := blockdev.NewOSFile(fd, path)
	t.Cleanup(func() { f.Close() })
	m, err := cbtmap.NewMemory(int64(len(content)), cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	o := &original{t: t, ring: &holding{RingQueue: ring(t, "filter")}}
	o.filter = filter.New(filter.Config{Orig: f, Size: int64(len(content)), CBT: m, Queues: 1})
	o.queue = o.filter.NewQueue(0, o.ring)
	return o
}

// result plays the kernel for one request.
type result chan unix.Errno

func (r result) Completed(_ *ublk.Request, errno unix.Errno) { r <- errno }

// start has a request served by h on the thread of q.
func start(q blockdev.Queue, h ublk.Handler, op ublk.Op, b []byte) result {
	done := make(result, 1)
	r := ublk.NewRequest(0, done)
	r.Op, r.Len, r.Buf = op, int64(len(b)), blockdev.MemBuf(b)
	q.Post(&blockdev.Task{Run: func() { h.Handle(r) }})
	return done
}

func (o *original) write(b []byte) {
	o.t.Helper()
	if errno := <-start(o.ring, o.queue, ublk.OpWrite, b); errno != 0 {
		o.t.Fatal(errno)
	}
}

// keep keeps back what the filter submits from now on, or lets it go.
func (o *original) keep(keeps bool) {
	done := make(chan struct{})
	o.ring.Post(&blockdev.Task{Run: func() {
		o.ring.keeps = keeps
		for _, op := range o.ring.kept {
			o.ring.RingQueue.Submit(op)
		}
		o.ring.kept = nil
		close(done)
	}})
	<-done
}

// disk1 is the device of an original.
var disk1 = Device{Name: "disk1", Number: 1, Block: 512}

// newSnapshot makes a snapshot whose state is in a directory on a tmpfs.
func newSnapshot(t *testing.T) (s *Snapshot, state string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: storage is kept by a mount")
	}
	state = memoryDir(t)
	s, err := New(Config{
		ID: uuid.New(), ChunkSize: 4 << 10, PoolSize: 64 << 10, Portion: 64 << 10,
		StateDir: state, StorageTimeout: time.Minute, Control: ring(t, "snapshots"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, state
}

func appendDir(t *testing.T, s *Snapshot, dir string) {
	t.Helper()
	p, err := disk.Machine().OpenPlace(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Append(StorageConfig{Place: p, RealPath: dir}); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshot is a snapshot's life: its image shows what the disk held, what it
// must not do it refuses, and nothing of it is left.
func TestSnapshot(t *testing.T) {
	was := bytes.Repeat([]byte("before  "), 8<<10)
	o := newOriginal(t, was)
	s, state := newSnapshot(t)
	all := TakeOptions{Limit: time.Minute}
	take := func() error { _, err := s.Take(context.Background(), all); return err }

	if err := take(); !errors.Is(err, snapimage.ErrNoDevices) {
		t.Errorf("without devices: %v", err)
	}
	if err := s.Add(o.filter, disk1); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(o.filter, disk1); !errors.Is(err, snapimage.ErrAdded) {
		t.Errorf("the device again: %v", err)
	}
	if err := take(); !errors.Is(err, snapimage.ErrNoStorage) || s.Taken() {
		t.Errorf("without storage: %v, taken: %v", err, s.Taken())
	}
	dir := t.TempDir()
	appendDir(t, s, dir)
	if err := take(); err != nil || !s.Taken() {
		t.Fatalf("%v, taken: %v", err, s.Taken())
	}
	if err := take(); !errors.Is(err, snapimage.ErrTaken) {
		t.Errorf("again: %v", err)
	}
	if n := s.TakeInfo(0).ChangesNumber; n != 1 {
		t.Errorf("the take has number %d", n)
	}

	o.write(bytes.Repeat([]byte("after   "), 8<<10))
	if u := s.Usage(); u.Regions != int64(len(was))/u.ChunkSize {
		t.Errorf("%d chunks are copied of %d", u.Regions, int64(len(was))/u.ChunkSize)
	}
	got := make([]byte, len(was))
	q := ring(t, "image")
	if errno := <-start(q, s.Image(0).NewQueue(q), ublk.OpRead, got); errno != 0 || !bytes.Equal(got, was) {
		t.Errorf("the image reads %q…, %v", got[:8], errno)
	}

	if err := s.Abort(); err != nil {
		t.Error(err)
	}
	if s.Err() == 0 {
		t.Error("given up, and whole")
	}
	s.Destroy()()
	if o.filter.Held() {
		t.Error("destroyed, and its filter holds it")
	}
	if err := s.GiveBack(); err != nil {
		t.Error(err)
	}
	if back := s.Returning(); len(back) != 0 {
		t.Errorf("on its way back: %q", back)
	}
	for _, d := range []string{dir, state} {
		if left, err := os.ReadDir(d); err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", d, left, err)
		}
	}
}

// TestTakeCancelled: a take that a write holds up beyond the limit is none, nor is one that
// nobody waits for any more when it begins, and the cancelling does not reach the next one.
func TestTakeCancelled(t *testing.T) {
	o := newOriginal(t, make([]byte, 64<<10))
	s, state := newSnapshot(t)
	if err := s.Add(o.filter, disk1); err != nil {
		t.Fatal(err)
	}
	appendDir(t, s, t.TempDir())
	o.keep(true)
	b := bytes.Repeat([]byte{1}, 4<<10)
	written := start(o.ring, o.queue, ublk.OpWrite, b)
	over, end := context.WithCancel(context.Background())
	end()
	for _, c := range []struct {
		ctx   context.Context
		limit time.Duration
	}{{context.Background(), time.Millisecond}, {over, time.Minute}} {
		for range 200 {
			if _, err := s.Take(c.ctx, TakeOptions{Limit: c.limit}); !errors.Is(err, snapimage.ErrCancelled) || s.Taken() {
				t.Fatalf("%v, taken: %v", err, s.Taken())
			}
		}
	}
	if left, err := LeftBehind(state); err != nil || len(left) != 1 || left[0].Stage != Created {
		t.Errorf("on record is %+v, %v", left, err)
	}
	o.keep(false)
	if errno := <-written; errno != 0 {
		t.Error(errno)
	}
	if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil || !s.Taken() {
		t.Errorf("without the write: %v, taken: %v", err, s.Taken())
	}
	s.Destroy()()
	if err := s.GiveBack(); err != nil {
		t.Error(err)
	}
}
