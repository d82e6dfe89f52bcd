package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// The daemon is killed under all that it does, again and again. Those who use its
// devices notice a pause.

// survival is a daemon that is killed, and what goes on meanwhile.
type survival struct {
	*program.Daemon
	t      *testing.T
	dev    control.Device
	store  string          // directory of the storage
	kills  atomic.Int64    // begun and over: odd while no daemon lives
	late   time.Duration   // how long the next daemon is kept from starting
	pauses []time.Duration // of the filters
	images []time.Duration // of the images
}

// interrupted says whether a call that began at kills may have failed for a kill.
func (s *survival) interrupted(kills int64) bool { return kills%2 == 1 || s.kills.Load() != kills }

// killAndRestart kills the daemon and starts the next.
func (s *survival) killAndRestart() {
	s.t.Helper()
	s.kills.Add(1)
	s.Kill()
	time.Sleep(s.late)
	s.Restart()
	info, err := s.Info(guest.Context(s.t))
	if err != nil || info.Recovered == nil || info.Lost != nil {
		s.t.Fatalf("after kill %d: %+v, %v", len(s.pauses)+1, info, err)
	}
	s.pauses = append(s.pauses, info.Recovered.Pause)
	s.images = append(s.images, info.Recovered.Images)
	s.kills.Add(1)
}

// upgrade has the program take over from itself, in the same process.
func (s *survival) upgrade() {
	s.t.Helper()
	s.kills.Add(1)
	done, err := s.Reload(guest.Context(s.t), control.ReloadRequest{})
	if err != nil {
		s.t.Fatalf("upgrade %d: %v", len(s.pauses)+1, err)
	}
	info, err := s.Info(guest.Context(s.t))
	if err != nil || info.Recovered == nil || info.Lost != nil || info.PID != s.PID {
		s.t.Fatalf("after upgrade %d: %+v, %v", len(s.pauses)+1, info, err)
	}
	s.pauses = append(s.pauses, done.Pause)
	s.images = append(s.images, done.Images)
	s.kills.Add(1)
}

// TestUpgradedUnderLoad is TestKilledUnderLoad with upgrades in place of kills.
func TestUpgradedUnderLoad(t *testing.T) {
	guest.Need(t)
	mode := control.ModeCopy
	if guest.KernelAtLeast(t, 6, 16) {
		mode = control.ModeZeroCopy
	}
	queues := guest.QueueCounts()
	strikeUnderLoad(t, mode, queues[len(queues)-1], int(guest.Span(3, 20)), (*survival).upgrade)
	if guest.Long() && mode != control.ModeCopy {
		strikeUnderLoad(t, control.ModeCopy, 1, 20, (*survival).upgrade)
	}
}

// TestKilledUnderLoad kills the daemon under fio on ext4 and random writers on the bare
// filter, with snapshots held and images read and written: no I/O error, every
// read right, images as at their cut, and a change map that has every change.
func TestKilledUnderLoad(t *testing.T) {
	guest.Need(t)
	modes := []control.Mode{control.ModeCopy}
	if guest.KernelAtLeast(t, 6, 16) {
		modes = append(modes, control.ModeZeroCopy)
	}
	queues := []int{1, guest.QueueCounts()[len(guest.QueueCounts())-1]}
	kills := int(guest.Span(3, 200))
	var pauses []time.Duration
	for i, mode := range modes {
		for _, n := range slices.Compact(queues) {
			if guest.Span(0, 1) == 0 && n != queues[(i+1)%2] {
				continue // the short form has each number of queues once
			}
			t.Run(fmt.Sprintf("%s/%dqueues", mode, n), func(t *testing.T) {
				pauses = append(pauses, strikeUnderLoad(t, mode, n, max(3, kills/len(modes)/2), (*survival).killAndRestart))
			})
		}
	}
	slices.Sort(pauses)
	if len(pauses) > 0 {
		t.Logf("longest pauses: %v", pauses)
	}
}

func strikeUnderLoad(t *testing.T, mode control.Mode, queues, times int, strike func(*survival)) (worst time.Duration) {
	const size, chunk = 12<<20 + 3<<10, 64 << 10
	disks := guest.RAMDisks(t, 2, 64<<20)
	s := &survival{Daemon: program.Start(t), t: t, store: guest.SmallFS(t, 256<<20)}
	change := func(r *control.AddRequest) { r.Queues, r.Depth, r.Mode = queues, 32, mode }
	small := guest.LoopDisk(t, size, 512)
	s.dev = s.Add(small, change)
	mounted := s.Add(disks[0], change)
	guest.Ext4.Make(t, mounted.Link)
	dir := guest.Mount(t, mounted.Link)
	fio := exec.Command("fio", "--name=verify", "--directory="+dir, "--size=16M", "--ioengine=io_uring", "--direct=1", "--rw=randwrite",
		"--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64", "--loops=100000")
	var said bytes.Buffer
	fio.Stdout, fio.Stderr = &said, &said
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	fioEnd := make(chan error, 1)
	go func() { fioEnd <- fio.Wait() }()

	w := stamp.NewWorld(s.dev.Size)
	if err := w.Fill(s.dev.Path); err != nil {
		t.Fatal(err)
	}
	seed := int64(queues)<<8 + int64(len(mode))
	stop := w.StartWriters(t, seed, stamp.Mix{Writers: 4, Zeroes: true}, s.dev.Path)
	taken := func() (control.Snapshot, *stamp.Window) {
		made := s.Create(control.CreateRequest{Devices: []string{s.dev.Name, mounted.Name}, ChunkSize: chunk, Storage: []control.Storage{{Path: s.store}}})
		win := w.Open()
		made = s.Taken(made.ID)
		win.Close()
		return made, win
	}
	plain, plainWin := taken()
	since := plain.Images[0].Take
	written, win := taken()
	user := newImageUser(win, 0, written.Images[0].Path)
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		user.work(seed, end)
	}()
	reads := make(chan error, 1)
	go func() { reads <- readUntil(plain.Images[1].Path, end) }()

	busy := s.keepBusy(mounted, seed)
	rnd := rand.New(rand.NewSource(seed))
	for i := range times {
		if i == times-1 {
			s.late = guest.Span(3*time.Second, time.Minute)
		}
		time.Sleep(time.Duration(rnd.Intn(600)) * time.Millisecond)
		strike(s)
		select {
		case err := <-fioEnd:
			t.Fatalf("fio ended: %v\n%s", err, said.String())
		default:
		}
	}
	busy()
	w.More(t, 20)
	close(end)
	<-done
	if err := guest.Await(t, "the end of the reader", reads); err != nil {
		t.Errorf("reads of an image: %v", err)
	}
	if err := user.check(); err != nil {
		t.Errorf("I1: the image that was written: %v", err)
	}
	if err := plainWin.Check(plain.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if err := stop(); err != nil {
		t.Errorf("writers: %v", err)
	}
	if err := w.Same(s.dev.Path); err != nil {
		t.Errorf("I2: %v", err)
	}
	last, _ := taken()
	s.compareMap(*since, plain.Images[0].Path, last.Images[0].Path)

	_ = fio.Process.Signal(unix.SIGINT)
	if err := guest.Await(t, "the end of fio", fioEnd); err != nil && fio.ProcessState.ExitCode() != 128 {
		t.Errorf("fio: %v\n%s", err, said.String())
	}
	if bytes.Contains(said.Bytes(), []byte("verify failed")) || bytes.Contains(said.Bytes(), []byte("verify: bad")) || bytes.Contains(said.Bytes(), []byte("error=")) {
		t.Errorf("fio says\n%s", said.String())
	}
	guest.Unmount(t, dir)
	for _, id := range program.SnapshotIDs(t, s.Daemon) {
		s.Destroy(id)
	}
	if st, err := s.DeviceStatus(guest.Context(t), s.dev.Name); err != nil || st.Errors != 0 {
		t.Errorf("the filter has had %d errors, %v", st.Errors, err)
	}
	guest.Ext4.Check(t, mounted.Path)
	s.Remove(s.dev)
	s.Remove(mounted)
	if err := w.Same(small); err != nil {
		t.Errorf("I2: %v", err)
	}
	s.nothingLeft()
	slices.Sort(s.pauses)
	slices.Sort(s.images)
	t.Logf("%d times; I/O of filters waited for %v (median), %v (worst), of images for %v, %v; %d writes", len(s.pauses),
		s.pauses[len(s.pauses)/2], s.pauses[len(s.pauses)-1], s.images[len(s.images)/2], s.images[len(s.images)-1], w.Writes.Load())
	return s.pauses[len(s.pauses)-1]
}

// readUntil reads all of an image again and again: it is always the same.
func readUntil(path string, end <-chan struct{}) error {
	f, err := direct.Open(path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := direct.Buffers.Get().(*[]byte)
	defer direct.Buffers.Put(buf)
	const piece, pieces = 64 << 10, 256
	first := map[int][]byte{}
	for n := 0; ; n = (n + 1) % pieces {
		select {
		case <-end:
			return nil
		default:
		}
		p := (*buf)[:piece]
		if err := f.ReadAt(p, int64(n)*piece); err != nil {
			return err
		}
		if first[n] == nil {
			first[n] = bytes.Clone(p)
		} else if !bytes.Equal(first[n], p) {
			return fmt.Errorf("%s: the %d bytes at %d have changed", path, piece, n*piece)
		}
	}
}

// keepBusy takes, appends, marks and destroys until stopped.
func (s *survival) keepBusy(mounted control.Device, seed int64) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		rnd := rand.New(rand.NewSource(seed))
		var mine []string
		for ctx.Err() == nil {
			kills := s.kills.Load()
			limited, done := context.WithTimeout(context.Background(), guest.Patience)
			var err error
			switch k := rnd.Intn(5); {
			case k < 2:
				var made control.Snapshot
				made, err = s.CreateSnapshot(limited, control.CreateRequest{Devices: []string{s.dev.Name, mounted.Name}[:1+rnd.Intn(2)], ChunkSize: 64 << 10,
					Storage: []control.Storage{{Path: s.store}}, Take: k == 0, NoFreeze: rnd.Intn(2) == 0})
				if err == nil {
					mine = append(mine, made.ID)
				}
			case k == 2 && len(mine) > 0:
				_, err = s.AppendStorage(limited, control.StorageRequest{ID: mine[rnd.Intn(len(mine))], Storage: control.Storage{Path: filepath.Join(s.store, fmt.Sprint("named", rnd.Int63()))}})
			case k == 3:
				err = s.MarkDirty(limited, control.MarkRequest{Device: s.dev.Name, Ranges: []control.Range{{Sector: uint64(rnd.Intn(1000)), Count: 8}}})
			case len(mine) > 0:
				at := rnd.Intn(len(mine))
				if err = s.DestroySnapshot(limited, mine[at]); err == nil || s.interrupted(kills) {
					mine = slices.Delete(mine, at, at+1)
				}
			}
			done()
			if len(mine) > 3 {
				_ = s.DestroySnapshot(context.Background(), mine[0])
				mine = mine[1:]
			}
			if err != nil && !s.interrupted(kills) && control.CodeOf(err) != control.NotFound {
				s.t.Errorf("a call that nobody interrupted: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	stop = func() {
		cancel()
		wg.Wait()
	}
	s.t.Cleanup(stop)
	return stop
}

// compareMap compares two images: the change map has told of every difference.
func (s *survival) compareMap(since control.Take, before, after string) {
	s.t.Helper()
	info, ranges, err := s.Changes(s.dev, since)
	if err != nil {
		s.t.Errorf("changes since %v: %v", since, err)
		return
	}
	a, errA := os.ReadFile(before)
	b, errB := os.ReadFile(after)
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
		if !slices.ContainsFunc(ranges, func(r control.Range) bool { return at >= r.Sector && at < r.Sector+r.Count }) {
			missed++
		}
	}
	if missed > 0 || changed == 0 {
		s.t.Errorf("I3: of %d sectors that have changed the map %+v misses %d", changed, info, missed)
	}
}

// nothingLeft: no file of the daemon's outlives its devices and snapshots.
func (s *survival) nothingLeft() {
	s.t.Helper()
	for _, kind := range []string{"cbt", "counters", "devices", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(s.RunDir.State(), kind)); err != nil || len(left) > 0 {
			s.t.Errorf("left in %s: %v, %v", kind, left, err)
		}
	}
	left, err := os.ReadDir(s.store)
	left = slices.DeleteFunc(left, func(e os.DirEntry) bool { return e.Name() == "lost+found" })
	if err != nil || len(left) > 0 {
		s.t.Errorf("left in the storage: %v, %v", left, err)
	}
	if notes, err := os.ReadDir(filepath.Join(string(s.RunDir), "udev")); err != nil || len(notes) > 0 {
		s.t.Errorf("notes left: %v, %v", notes, err)
	}
}
