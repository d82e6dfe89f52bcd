package sim

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// On real threads the order of things is the machine's, not a seed's; what can
// be checked is that each sector behaves as one register: that the history of
// its reads and writes is linearizable. Run it with -race.

// maxSectors is how many a request has: enough to span three chunks.
const maxSectors = 12

// access is a read or a write of one sector.
type access struct {
	sector int64
	write  bool
	v      Version // written
}

// sectorModel is a register per sector; initially it holds what start says.
func sectorModel(start func(sector int64) Version) porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			by := make(map[int64][]porcupine.Operation)
			for _, o := range history {
				s := o.Input.(access).sector
				by[s] = append(by[s], o)
			}
			var parts [][]porcupine.Operation
			for _, p := range by {
				parts = append(parts, p)
			}
			return parts
		},
		Init: func() any { return register1{} },
		Step: func(state, input, output any) (bool, any) {
			s, in := state.(register1), input.(access)
			if !s.set {
				s = register1{true, start(in.sector)}
			}
			if in.write {
				return true, register1{true, in.v}
			}
			return output.(Version) == s.v, s
		},
		Equal: func(a, b any) bool { return a == b },
	}
}

type register1 struct {
	set bool
	v   Version
}

// began is when all of this did.
var began = time.Now()

// history collects what clients did.
type history struct {
	mu  sync.Mutex
	ops []porcupine.Operation
}

func (h *history) add(client int, in access, call, back time.Time, out Version) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{
		// By the clock that is never set.
		ClientId: client, Input: in, Call: int64(call.Sub(began)), Output: out, Return: int64(back.Sub(began)),
	})
}

func (h *history) check(t *testing.T, what string, start func(int64) Version) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if got := porcupine.CheckOperationsTimeout(sectorModel(start), h.ops, time.Minute); got != porcupine.Ok {
		t.Errorf("%s: the history of %d reads and writes is not linearizable: %v", what, len(h.ops), got)
	}
}

// waitFor runs f on a queue's thread and waits for done.
func waitFor(q blockdev.Queue, f func(done func())) {
	over := make(chan struct{})
	q.Post(&blockdev.Task{Run: func() { f(func() { close(over) }) }})
	<-over
}

// client is one user of a device's queue: one tag.
type client struct {
	id     int
	dev    int
	q      blockdev.Queue
	h      ublk.Handler
	r      *ublk.Request
	buf    []byte
	done   func()
	errno  unix.Errno
	random blockdevtest.Random
}

func newClient(id, dev int, q blockdev.Queue, h ublk.Handler, tag int) *client {
	c := &client{id: id, dev: dev, q: q, h: h, buf: make([]byte, maxSectors*sectorSize), random: blockdevtest.NewRandom(uint64(id + 1))}
	c.r = ublk.NewRequest(tag, c)
	return c
}

// Completed takes the result of the client's request.
func (c *client) Completed(_ *ublk.Request, errno unix.Errno) {
	c.errno = errno
	c.done()
}

// do reads or writes n sectors; to the history each is an access of its own.
func (c *client) do(t *testing.T, in access, n int64, h *history) {
	c.r.Op, c.r.Off, c.r.Len = ublk.OpRead, in.sector*sectorSize, n*sectorSize
	c.r.Buf = blockdev.MemBuf(c.buf)
	if in.write {
		c.r.Op = ublk.OpWrite
		fill(c.buf[:n*sectorSize], in.v, c.dev, in.sector)
	}
	call := time.Now()
	waitFor(c.q, func(done func()) {
		c.done = done
		c.h.Handle(c.r)
	})
	back := time.Now()
	if c.errno != 0 {
		t.Errorf("%v of sector %d: %v", c.r.Op, in.sector, c.errno)
		return
	}
	for i := int64(0); i < n; i++ {
		out := Version(0)
		if !in.write {
			out = versionOf(c.buf[i*sectorSize:], c.dev, in.sector)
		}
		h.add(c.id, in, call, back, out)
		in.sector++
	}
}

// run does n accesses to random sectors of those below sectors.
func (c *client) run(t *testing.T, n int, sectors int, writes bool, versions *versionSource, h *history) {
	for i := 0; i < n; i++ {
		in := access{sector: int64(c.random.Intn(sectors)), write: writes && c.random.OneIn(2)}
		if in.write {
			in.v = versions.next()
		}
		c.do(t, in, min(int64(1+c.random.Intn(maxSectors)), int64(sectors)-in.sector), h)
	}
}

type versionSource struct {
	mu sync.Mutex
	v  Version
}

func (s *versionSource) next() Version {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.v++
	return s.v
}

// TestLinearizable drives one device through three queues, with snapshots
// taken and destroyed meanwhile, and the snapshots' images through two: every
// sector of the device is a register, and so is every sector of each image,
// beginning with what the device held at the cut.
func TestLinearizable(t *testing.T) {
	defer mixThreads()()
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	linearizable(t, rounds, 7)
	for began := time.Now(); time.Since(began) < *flagNative && !t.Failed(); {
		linearizable(t, rounds, uint64(time.Now().UnixNano()))
	}
}

func linearizable(t *testing.T, rounds int, seed uint64) {
	const (
		diskSectors = 61
		queues      = 3
	)
	const accesses = 60
	disk := blockdevtest.NewMemoryDevice("disk", diskSectors*sectorSize)
	p := make([]byte, diskSectors*sectorSize)
	fill(p, initial, 0, 0)
	if _, err := disk.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	cbt, err := cbtmap.NewMemory(diskSectors*sectorSize, cbtmap.Params{MinimumShift: 9, MaximumShift: 9, MaximumCount: diskSectors})
	if err != nil {
		t.Fatal(err)
	}
	var threads []*blockdevtest.MemoryThread
	thread := func() *blockdevtest.MemoryThread {
		q := blockdevtest.NewMemoryThread(uint64(len(threads)) + seed)
		threads = append(threads, q)
		return q
	}
	control := thread()
	log := newNativeLog(t, thread(), disk, cbt)
	f := filter.New(filter.Config{Orig: disk, Size: diskSectors * sectorSize, CBT: cbt, Intent: log.log, Queues: queues})
	versions := &versionSource{v: initial}
	var whole history
	var work sync.Mutex
	var clients []*client
	for i := 0; i < queues; i++ {
		q := thread()
		h := f.NewQueue(i, q)
		for tag := 0; tag < 2; tag++ {
			clients = append(clients, newClient(len(clients), 0, q, h, tag))
		}
	}
	for round := 0; round < rounds; round++ {
		var writers sync.WaitGroup
		for _, c := range clients {
			writers.Add(1)
			go func() {
				defer writers.Done()
				c.run(t, accesses, diskSectors, true, versions, &whole)
			}()
		}
		for i := 0; i < 2; i++ {
			// Two snapshots at a time, with chunks of 4 and 8 KiB.
			s := &nativeSnapshot{t: t, n: 2*round + i, f: f, disk: disk, control: control, work: &work, accesses: accesses}
			for range 2 {
				s.queues = append(s.queues, thread())
			}
			s.stores, s.encrypted = thread(), (round+i)%2 == 0
			writers.Add(1)
			go func() {
				defer writers.Done()
				s.live(versions)
			}()
		}
		writers.Add(1)
		go func() {
			defer writers.Done()
			for range 3 {
				log.makeBase()
			}
		}()
		writers.Wait()
		log.check()
	}
	whole.check(t, "device", func(int64) Version { return initial })
	for _, q := range threads {
		q.Close()
	}
}

// nativeLog is the write-intent log of a disk, on a real thread.
type nativeLog struct {
	t    *testing.T
	cbt  *cbtmap.Map
	file *blockdevtest.Memory
	log  *intentlog.Log
	base []byte
}

func newNativeLog(t *testing.T, q blockdev.Queue, disk *blockdevtest.Memory, cbt *cbtmap.Map) *nativeLog {
	const zone = 12
	size := intentlog.FileSize(disk.Size(), zone)
	n := &nativeLog{t: t, cbt: cbt, file: blockdevtest.NewMemoryDevice("log", size)}
	n.file.LoseUnsynced()
	var err error
	n.log, err = intentlog.New(intentlog.Config{
		Size: disk.Size(), ZoneShift: zone, Orig: disk, Queue: q, File: n.file, Memory: make([]byte, size),
		Failed: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	n.log.Follow(cbt)
	waitFor(q, func(done func()) {
		n.log.Start(uuid.New(), func(err error) {
			if err != nil {
				t.Error(err)
			}
			done()
		})
	})
	n.makeBase()
	return n
}

func (n *nativeLog) makeBase() {
	base, err := n.log.Base(n.cbt)
	if err == nil {
		err = n.log.Committed(base)
	}
	if err != nil {
		n.t.Error(err)
	}
	n.base = base
}

// check looks, when nobody writes, whether a power failure would leave every mark.
func (n *nativeLog) check() {
	left := n.file.Left(func(int) int { return 0 })
	h, err := intentlog.Recover(n.base, contentOf(left, left.Size()))
	if err != nil {
		n.t.Error(err)
		return
	}
	now, err := n.cbt.Copy()
	if err != nil || h.Info != now.Info {
		n.t.Errorf("a power failure would leave %v of %v, %v", h.Info, now.Info, err)
	}
	for b, m := range now.Marks {
		if h.Marks[b] < m {
			n.t.Errorf("block %d: a power failure would leave mark %d of %d", b, h.Marks[b], m)
		}
	}
}

// nativeSnapshot is a snapshot on real threads.
type nativeSnapshot struct {
	t        *testing.T
	n        int
	f        *filter.Filter
	disk     *blockdevtest.Memory
	control  blockdev.Queue
	work     *sync.Mutex // one piece of control work at a time
	queues   []*blockdevtest.MemoryThread
	stores   *blockdevtest.MemoryThread
	accesses int

	encrypted bool
}

// live is its life: taken, read and written, destroyed.
func (n *nativeSnapshot) live(versions *versionSource) {
	t := n.t
	chunk := int64(diffarea.MinChunkSize) << (n.n % 2)
	pool, state := words(chunk*int64(1+n.n/2%3)), words(diffarea.LogStateSize)
	mem := [][]byte{pool, state}
	var seal *diffarea.Seal
	if n.encrypted {
		mem = append(mem, words(diffarea.SealMemory))
		seal = &diffarea.Seal{Cipher: &cipher{key: uint64(n.n)}, Memory: mem[2]}
	}
	var s *snapimage.Snapshot
	var cut *blockdevtest.Memory
	fail := func(what string, err error) {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	n.work.Lock()
	waitFor(n.control, func(done func()) {
		var err error
		s, err = snapimage.New(snapimage.Config{
			ID: uuid.New(),
			Log: diffarea.LogConfig{
				ChunkSize: chunk, State: state, Portion: 1 << 14, Stores: n.stores, Seal: seal,
				Pool:    diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory(fmt.Sprint("pool", n.n), pool)},
				OnEvent: func(e diffarea.Event) { t.Errorf("event %v %v", e.Kind, e.Errno) },
			},
			Memory: func(_ string, size int64) ([]byte, error) {
				mem = append(mem, words(size))
				return mem[len(mem)-1], nil
			},
		}, n.control)
		fail("new", err)
		fail("add", s.Add(n.f, 1))
		s.Append(diffarea.Storage{File: blockdevtest.NewMemoryFile(fmt.Sprint("store", n.n), 1<<30)}, func(err error) {
			fail("append", err)
			s.Take(func() { cut = n.disk.Clone() }, func(err error) {
				fail("take", err)
				n.f.Intent().Taken(s.TakeInfo(0), func(err error) {
					fail("make the take durable", err)
					done()
				})
			})
		})
	})
	n.work.Unlock()
	base := &image{base: cut}
	var h history
	var users sync.WaitGroup
	for i, q := range n.queues {
		hq := s.Image(0).NewQueue(q)
		for tag := 0; tag < 2; tag++ {
			c := newClient(100+2*i+tag, 0, q, hq, tag)
			users.Add(1)
			go func() {
				defer users.Done()
				// Reads alone first: what is read is what was there at the cut.
				c.run(t, n.accesses/2, int(cut.Size()/sectorSize), false, versions, &h)
				c.run(t, n.accesses/2, int(cut.Size()/sectorSize), true, versions, &h)
			}()
		}
	}
	users.Wait()
	h.check(t, fmt.Sprint("image ", n.n), base.version)
	n.work.Lock()
	waitFor(n.control, func(done func()) { s.Destroy(done) })
	n.work.Unlock()
	unmap(mem...) // whoever still looks there dies of it
}
