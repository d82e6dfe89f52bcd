package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// What a change map has to tell after a kill, and what may be left in the end.

// backedUp is a disk that a backup follows by increments, one after each kill or three. It is
// written to so little that most blocks change once in that time or not at all: what a
// change map forgets is not marked again by the next write. How little is counted from kill
// to kill, as what comes between them takes longer on a slower machine.
type backedUp struct {
	s     *survival
	dev   control.Device
	world *stamp.World
	copy  []byte // the backup
	since control.Take

	mu     sync.Mutex      // held by who marks or takes
	marked []control.Range // acknowledged since the last increment
	turns  chan struct{}   // to write or to mark, until the next kill

	increments, bytes int64
}

const backedUpSize = 6<<20 + 3<<9

// turnsPerKill is small enough that three times as many change less than half of the blocks.
const turnsPerKill = 64

func (s *survival) backUp(dev control.Device) *backedUp {
	s.t.Helper()
	b := &backedUp{s: s, dev: dev, world: stamp.NewWorld(dev.Size), turns: make(chan struct{}, turnsPerKill)}
	if err := b.world.Fill(dev.Path); err != nil {
		s.t.Fatal(err)
	}
	b.since, b.copy = b.take()
	return b
}

// take is a take and what its image holds, which is the disk's cut.
func (b *backedUp) take() (take control.Take, content []byte) {
	t := b.s.t
	t.Helper()
	win := b.world.Open()
	s := b.s.create(control.CreateRequest{Devices: []string{b.dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: b.s.store}}})
	s = b.s.Taken(s.ID)
	win.Close()
	err := direct.Scan(s.Images[0].Path, b.dev.Size, func(p []byte, sector int64) error {
		win.See(0, sector, p)
		content = append(content, p...)
		return nil
	})
	if err = errors.Join(err, win.Err()); err != nil {
		t.Errorf("I1: the image that is backed up: %v", err)
	}
	b.s.Destroy(s.ID)
	return *s.Images[0].Take, content
}

// startLoad writes to the disk and marks, now and then, until stopped.
func (b *backedUp) startLoad(seed int64) (stop func()) {
	b.s.t.Helper()
	f := direct.MustOpen(b.s.t, b.dev.Path, unix.O_RDWR)
	w := stamp.NewWriter(b.world.Disks[0], f, stamp.Mix{Writers: 1, Zeroes: true, Largest: 8 << 10}, 0, seed)
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(2)
	go func() {
		defer wg.Done()
		for b.turn(end, w.Rand) {
			if err := w.Step(); err != nil {
				b.s.t.Errorf("writer of %s: %v", b.dev.Path, err)
				return
			}
		}
	}()
	go func() {
		defer wg.Done()
		for rnd := rand.New(rand.NewSource(seed)); b.turn(end, rnd); {
			b.mark(rnd)
		}
	}()
	stop = sync.OnceFunc(func() {
		close(end)
		wg.Wait()
		f.Close()
	})
	b.s.t.Cleanup(stop)
	return stop
}

// goOn gives the load its turns until the next kill.
func (b *backedUp) goOn() {
	for len(b.turns) < cap(b.turns) {
		b.turns <- struct{}{}
	}
}

// turn waits for one, and rests a little, or says that it is the end.
func (b *backedUp) turn(end <-chan struct{}, rnd *rand.Rand) bool {
	select {
	case <-end:
		return false
	case <-b.turns:
		stamp.Rest(rnd, 100*time.Millisecond)
		return true
	}
}

func (b *backedUp) mark(rnd *rand.Rand) {
	b.mu.Lock()
	defer b.mu.Unlock()
	kills := b.s.kills.Load()
	ctx, done := context.WithTimeout(context.Background(), guest.Patience)
	defer done()
	r := control.Range{Sector: uint64(rnd.Int63n(b.dev.Size>>9 - 8)), Count: 8}
	switch err := b.s.MarkDirty(ctx, control.MarkRequest{Device: b.dev.Name, Ranges: []control.Range{r}}); {
	case err == nil:
		b.marked = append(b.marked, r)
	case !b.s.interrupted(kills):
		b.s.t.Errorf("mark: %v", err)
	}
}

// increment brings the backup up to date by what the change map tells, and compares all
// of it.
func (b *backedUp) increment() {
	t := b.s.t
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	take, now := b.take()
	if len(now) != len(b.copy) {
		t.Fatalf("%d bytes of %d", len(now), len(b.copy))
	}
	info, ranges, err := b.s.Changes(b.dev, b.since)
	if b.s.ranOut(err, b.dev, b.since) { // a full copy is needed
		b.copy, b.marked, b.since = now, nil, take
		return
	}
	if err != nil {
		t.Fatalf("I3: changes since %v: %v", b.since, err)
	}
	for _, r := range ranges {
		from, to := r.Sector*stamp.SectorSize, min((r.Sector+r.Count)*stamp.SectorSize, uint64(len(now)))
		copy(b.copy[from:to], now[from:to])
		b.bytes += int64(to - from)
	}
	if !bytes.Equal(b.copy, now) {
		t.Errorf("I3: the increment since %v does not make the backup the image: the map %+v misses changes", b.since, info)
	}
	for _, m := range b.marked {
		if !slices.ContainsFunc(ranges, func(r control.Range) bool { return r.Sector <= m.Sector && m.Sector+m.Count <= r.Sector+r.Count }) {
			t.Errorf("I3: %+v was marked, and is not told since %v", m, b.since)
		}
	}
	b.increments++
	b.marked, b.since = nil, take
}

// ranOut says whether the generation of since has ended because its 254 takes were made. For
// no other reason may one end here, whoever was killed when.
func (s *survival) ranOut(err error, dev control.Device, since control.Take) bool {
	s.t.Helper()
	if control.CodeOf(err) != control.GenerationEnded {
		return false
	}
	h := s.CBT(dev).History
	s.t.Logf("%s: the generation of %v has ended: %+v", dev.Name, since, h)
	return h.Reason == control.HistoryNumbers && strings.Contains(h.Text, since.Generation.String())
}

// told says how much the increments were, which must be little for them to prove a thing.
func (b *backedUp) told() string {
	mean := b.bytes / max(1, b.increments)
	if mean > b.dev.Size/2 {
		b.s.t.Errorf("an increment had %d bytes of %d: they prove nothing", mean, b.dev.Size)
	}
	return fmt.Sprintf("%d increments of %d KiB in the mean, of %d", b.increments, mean>>10, b.dev.Size>>10)
}

// compareMap compares two images: the change map has told of every difference.
func (s *survival) compareMap(dev control.Device, before, after control.SnapshotImage) {
	s.t.Helper()
	info, ranges, err := s.Changes(dev, *before.Take)
	if s.ranOut(err, dev, *before.Take) {
		return
	}
	if err != nil {
		s.t.Errorf("changes since %v: %v", before.Take, err)
		return
	}
	a, errA := os.ReadFile(before.Path)
	b, errB := os.ReadFile(after.Path)
	if errA != nil || errB != nil || len(a) != len(b) {
		s.t.Fatalf("%d and %d bytes, %v, %v", len(a), len(b), errA, errB)
	}
	missed, changed := 0, 0
	for n := 0; n < len(a); n += stamp.SectorSize {
		if bytes.Equal(a[n:n+stamp.SectorSize], b[n:n+stamp.SectorSize]) {
			continue
		}
		changed++
		at := uint64(n / stamp.SectorSize)
		for len(ranges) > 0 && at >= ranges[0].Sector+ranges[0].Count { // they are in order
			ranges = ranges[1:]
		}
		if len(ranges) == 0 || at < ranges[0].Sector {
			missed++
		}
	}
	if missed > 0 || changed == 0 {
		s.t.Errorf("I3: of %d sectors that have changed the map %+v misses %d", changed, info, missed)
	}
}

// leftovers is what is there that the daemon's devices and snapshots need.
type leftovers struct {
	program.Held
	files  []string // open
	mounts int
	store  uint64 // bytes in the storage's filesystem
	state  uint64 // in that of the state
}

func (s *survival) left() (l leftovers) {
	s.t.Helper()
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", s.PID))
	if err != nil {
		s.t.Fatal(err)
	}
	var files []string
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.PID))
	for _, l := range links {
		name, _ := os.Readlink(l)
		files = append(files, name)
	}
	return leftovers{s.Held(), files, strings.Count(string(mounts), string(s.RunDir)), used(s.t, s.store), used(s.t, s.RunDir.State())}
}

func used(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return (st.Blocks - st.Bfree) * uint64(st.Bsize)
}

// nothingLeft: nothing outlives devices and snapshots: no file, no memory of a pool or a
// key, no space in the storage, no process, thread, mount or device.
func (s *survival) nothingLeft(before leftovers) {
	s.t.Helper()
	for _, dir := range []string{"cbt", "counters", "devices", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(s.RunDir.State(), dir)); err != nil || len(left) > 0 {
			s.t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	for _, dir := range []string{s.store, filepath.Join(s.store, busyDir), filepath.Join(string(s.RunDir), "udev")} {
		left, err := os.ReadDir(dir)
		left = slices.DeleteFunc(left, func(e os.DirEntry) bool { return e.Name() == busyDir })
		if err != nil || len(left) > 0 {
			s.t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	for _, pattern := range []string{"/dev/ublk-blksnap/*", "/dev/ublk-blksnap/images/*"} {
		links, _ := filepath.Glob(pattern)
		if links = slices.DeleteFunc(links, func(l string) bool { return filepath.Base(l) == "images" }); len(links) > 0 {
			s.t.Errorf("links left: %v", links)
		}
	}
	guest.WaitFor(s.t, "the end of all processes but the daemon and its prober", func() bool {
		return len(program.Processes("ublk-blksnap")) == 1 && len(program.Processes("ublk-probe")) <= 1
	})
	s.Settled(before.Held, 32) // threads that the runtime has once needed
	if now := s.left(); now.FDs > before.FDs {
		s.t.Errorf("open are %q, and were %q", now.files, before.files)
	}
	// The record of events grows a little; a pool has 8 MiB.
	if now := s.left(); now.mounts > before.mounts || now.store > before.store || now.state > before.state+1<<20 {
		s.t.Errorf("left behind: now %+v, before %+v", now, before)
	}
}
