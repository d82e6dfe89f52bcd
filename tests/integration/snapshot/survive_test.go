package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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
	again  int             // deaths of the next daemon, at its start or soon after it
	rnd    *rand.Rand
	calls  int // of keepBusy, to a daemon that lived
	cut    int // of them, in whose midst it was killed

	creating sync.Mutex // held by who creates what keepBusy must not destroy
}

// interrupted says whether a call that began at kills may have failed for a kill.
func (s *survival) interrupted(kills int64) bool { return kills%2 == 1 || s.kills.Load() != kills }

// killAndRestart kills the daemon and starts the next. Of three times there is one when all
// processes of ours die at once, and one when the next daemon dies too, most often while
// it takes over.
func (s *survival) killAndRestart() {
	s.t.Helper()
	s.kills.Add(1)
	if len(s.pauses)%3 == 2 {
		_ = unix.Kill(s.PID, unix.SIGSTOP) // so that it does not notice
		for _, pid := range program.Processes("ublk-probe") {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	s.Kill()
	time.Sleep(s.late)
	if len(s.pauses)%3 == 1 {
		s.Launch()
		time.Sleep(time.Duration(s.rnd.Int63n(int64(longestTakeOver))))
		s.Kill()
		s.again++
	}
	s.Restart()
	info, err := s.Info(guest.Context(s.t))
	if err != nil || info.Recovered == nil || info.Lost != nil {
		s.t.Fatalf("after kill %d: %+v, %v", len(s.pauses)+1, info, err)
	}
	s.pauses = append(s.pauses, info.Recovered.Pause)
	s.images = append(s.images, info.Recovered.Images)
	s.kills.Add(1)
}

// longestTakeOver is how long the next daemon lives at most that dies too: on a small
// machine it takes most of this time to take over.
const longestTakeOver = 2 * time.Second

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
	upgrades := func(mode control.Mode, queues int) {
		t.Run(fmt.Sprintf("%s/%dqueues", mode, queues), func(t *testing.T) {
			strikeUnderLoad(t, mode, queues, int(guest.Span(2, 20)), (*survival).upgrade)
		})
	}
	upgrades(mode, queues[len(queues)-1])
	if guest.Long() && mode != control.ModeCopy {
		upgrades(control.ModeCopy, 1)
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
	if !guest.Long() && len(modes) == 1 && guest.Shares() {
		t.Skip("the other machine runs it: it has processors for four queues")
	}
	queues := []int{1, guest.QueueCounts()[len(guest.QueueCounts())-1]}
	kills := int(guest.Span(3, 200))
	if n, err := strconv.Atoi(os.Getenv("UBLK_BLKSNAP_KILLS")); err == nil {
		kills = n
	}
	var pauses []time.Duration // of all
	for i, mode := range modes {
		for _, n := range slices.Compact(queues) {
			if !guest.Long() && (n != queues[(i+1)%2] || i < len(modes)-1) {
				continue // the short form: 6.12 copies with more queues, a newer kernel has zero copy with one
			}
			t.Run(fmt.Sprintf("%s/%dqueues", mode, n), func(t *testing.T) {
				pauses = append(pauses, strikeUnderLoad(t, mode, n, max(3, kills/len(modes)/2), (*survival).killAndRestart)...)
			})
		}
	}
	if len(pauses) > 0 {
		t.Logf("%d times the next daemon lived: I/O of filters waited for %s", len(pauses), medianAndWorst(pauses))
	}
}

func medianAndWorst(pauses []time.Duration) string {
	sorted := slices.Sorted(slices.Values(pauses))
	return fmt.Sprintf("%v (median), %v (worst)", sorted[len(sorted)/2], sorted[len(sorted)-1])
}

// rest is how long those who write or read rest at most between two requests. They are so
// many that some requests are under way at any moment; and without a rest they would leave
// nothing of a small machine to the daemon and to who kills it.
const rest = 100 * time.Millisecond

func strikeUnderLoad(t *testing.T, mode control.Mode, queues, times int, strike func(*survival)) (pauses []time.Duration) {
	const size, chunk, firstStorage = 12<<20 + 3<<10, 64 << 10, 1 << 20
	disks := guest.RAMDisks(t, 2, 64<<20)
	small, quiet := guest.LoopDisk(t, size, 512), guest.LoopDisk(t, backedUpSize, 512)
	s := &survival{Daemon: program.Start(t, "tracking_block_minimum_shift=12"), t: t, store: guest.SmallFS(t, 512<<20)}
	if err := os.Mkdir(filepath.Join(s.store, busyDir), 0o700); err != nil {
		t.Fatal(err)
	}
	before := s.left()
	change := func(r *control.AddRequest) { r.Queues, r.Depth, r.Mode = queues, 32, mode }
	s.dev = s.Add(small, change)
	backup := s.backUp(s.Add(quiet, change))
	mounted := s.Add(disks[0], change)
	guest.Ext4.Make(t, mounted.Link)
	dir := guest.Mount(t, mounted.Link)
	fio := exec.Command("fio", "--name=verify", "--directory="+dir, "--size=16M", "--ioengine=io_uring", "--direct=1", "--rw=randwrite",
		"--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64", "--loops=100000",
		"--rate_iops=40")
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
	if guest.Long() {
		seed = time.Now().UnixNano()
		t.Logf("seed %d", seed)
	}
	stop := sync.OnceValue(w.StartWriters(t, seed, stamp.Mix{Writers: 4, Zeroes: true, Largest: 256 << 10, Pause: rest}, s.dev.Path))
	taken := func(encrypt bool, appended ...control.Storage) (control.Snapshot, *stamp.Window) {
		first := control.Storage{Path: s.store}
		if len(appended) > 0 {
			first.Limit = firstStorage
		}
		made := s.create(control.CreateRequest{Devices: []string{s.dev.Name, mounted.Name}, ChunkSize: chunk, Storage: []control.Storage{first}, Encrypt: &encrypt})
		for _, more := range appended {
			if _, err := s.AppendStorage(guest.Context(t), control.StorageRequest{ID: made.ID, Storage: more}); err != nil {
				t.Fatal(err)
			}
		}
		win := w.Open()
		made = s.Taken(made.ID)
		win.Close()
		return made, win
	}
	plain, plainWin := taken(false, control.Storage{Path: filepath.Join(s.store, "appended")})
	written, win := taken(queues == 1) // encrypted, its images copy their payloads
	user := newImageUser(win, 0, written.Images[0].Path)
	user.pause = rest
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		user.work(seed, end)
	}()
	reads := make(chan error, 1)
	go func() { reads <- readUntil(plain.Images[1].Path, end) }()

	last := plain
	compareMaps := func() {
		t.Helper()
		next, _ := taken(false)
		for i, dev := range []control.Device{s.dev, mounted}[:guest.Span(1, 2)] {
			s.compareMap(dev, last.Images[i], next.Images[i])
		}
		if last.ID != plain.ID {
			s.Destroy(last.ID)
		}
		last = next
	}
	stopBackup := sync.OnceFunc(backup.startLoad(seed))
	busy := s.keepBusy([]control.Device{s.dev, mounted, backup.dev}, seed)
	s.rnd = rand.New(rand.NewSource(seed))
	for i := range times {
		if i == times-1 {
			s.late = guest.Span(3*time.Second, time.Minute)
		}
		backup.goOn()
		time.Sleep(time.Duration(s.rnd.Intn(600)) * time.Millisecond)
		strike(s)
		if i%int(guest.Span(1, 3)) == 0 { // because to kill takes less time than to compare
			backup.increment()
		}
		if i%10 == 9 {
			compareMaps()
			t.Logf("%d times so far: I/O of filters waited for %s, of images for %s", i+1, medianAndWorst(s.pauses), medianAndWorst(s.images))
		}
		select {
		case err := <-fioEnd:
			t.Fatalf("fio ended: %v\n%s", err, said.String())
		default:
		}
	}
	busy()
	w.More(t, 20)
	if !guest.Long() { // because what follows takes long beside them
		stopBackup()
		_ = stop() // see below
	}
	close(end)
	<-done
	if err := guest.Await(t, "the end of the reader", reads); err != nil {
		t.Errorf("reads of an image: %v", err)
	}
	if err := user.check(); err != nil {
		t.Errorf("I1: the image that was written: %v", err)
	}
	var err error
	if plain, err = s.Snapshot(guest.Context(t), plain.ID); err != nil { // with the paths of now
		t.Fatal(err)
	}
	if plain.Usage.Stored <= 2*firstStorage {
		t.Errorf("%d bytes are stored: next to nothing lies in storage that was appended", plain.Usage.Stored)
	}
	if err := plainWin.Check(plain.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	guest.Ext4.Check(t, plain.Images[1].Path)
	stopBackup()
	backup.increment()
	if err := stop(); err != nil {
		t.Errorf("writers: %v", err)
	}
	if err := w.Same(s.dev.Path); err != nil {
		t.Errorf("I2: %v", err)
	}
	compareMaps()

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
	guest.Ext4.Check(t, mounted.Path)
	for _, dev := range []control.Device{s.dev, mounted, backup.dev} {
		if st, err := s.DeviceStatus(guest.Context(t), dev.Name); err != nil || st.Errors != 0 {
			t.Errorf("the filter %s has had %d errors, %v", dev.Name, st.Errors, err)
		}
		s.Remove(dev)
	}
	for disk, held := range map[string]*stamp.World{small: w, quiet: backup.world} {
		if err := held.Same(disk); err != nil {
			t.Errorf("I2: %v", err)
		}
	}
	s.nothingLeft(before)
	t.Logf("%d times, the next daemon died too %d times; I/O of filters waited for %s, of images for %s; %d writes; %d calls, %d of them interrupted; %s",
		len(s.pauses), s.again, medianAndWorst(s.pauses), medianAndWorst(s.images), w.Writes.Load(), s.calls, s.cut, backup.told())
	return s.pauses
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
		case <-time.After(rest / 2):
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

// create is Create of what is not keepBusy's.
func (s *survival) create(r control.CreateRequest) control.Snapshot {
	s.t.Helper()
	s.creating.Lock()
	defer s.creating.Unlock()
	return s.Create(r)
}

// busyDir is the directory of the storage of what keepBusy makes.
const busyDir = "busy"

// keepBusy takes, appends, marks and destroys until stopped.
func (s *survival) keepBusy(devs []control.Device, seed int64) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		rnd := rand.New(rand.NewSource(seed))
		store := filepath.Join(s.store, busyDir)
		var mine []string
		unknown := false // there may be what a call made whose answer a kill has cut off
		for ctx.Err() == nil {
			kills := s.kills.Load()
			limited, done := context.WithTimeout(context.Background(), guest.Patience)
			var err error
			switch k := rnd.Intn(5); {
			case k < 2:
				var made control.Snapshot
				encrypt := rnd.Intn(2) == 0
				made, err = s.CreateSnapshot(limited, control.CreateRequest{Devices: program.Names(devs)[:1+rnd.Intn(len(devs))], ChunkSize: 64 << 10,
					Storage: []control.Storage{{Path: store}}, Take: k == 0, NoFreeze: rnd.Intn(2) == 0, Encrypt: &encrypt})
				if err == nil {
					mine = append(mine, made.ID)
				}
			case k == 2 && len(mine) > 0:
				_, err = s.AppendStorage(limited, control.StorageRequest{ID: mine[rnd.Intn(len(mine))], Storage: control.Storage{Path: filepath.Join(store, fmt.Sprint("named", rnd.Int63()))}})
			case k == 3:
				err = s.MarkDirty(limited, control.MarkRequest{Device: s.dev.Name, Ranges: []control.Range{{Sector: uint64(rnd.Intn(1000)), Count: 8}}})
			case len(mine) > 0:
				at := rnd.Intn(len(mine))
				if err = s.DestroySnapshot(limited, control.DestroyRequest{ID: mine[at], Force: true}); err == nil || s.interrupted(kills) {
					mine = slices.Delete(mine, at, at+1)
				}
			}
			if len(mine) > 3 {
				_ = s.DestroySnapshot(limited, control.DestroyRequest{ID: mine[0], Force: true})
				mine = mine[1:]
			}
			if kills%2 == 0 {
				s.calls++
			}
			switch {
			case s.interrupted(kills):
				unknown = true
				if kills%2 == 0 {
					s.cut++
				}
			case err != nil && control.CodeOf(err) != control.NotFound:
				s.t.Errorf("a call that nobody interrupted: %v", err)
			}
			if unknown {
				unknown = s.destroyUnknown(limited, store, mine) != nil
			}
			done()
			stamp.Rest(rnd, 10*rest) // to make a snapshot is more work than all else here
		}
	}()
	stop = func() {
		cancel()
		wg.Wait()
	}
	s.t.Cleanup(stop)
	return stop
}

// destroyUnknown destroys the snapshots in a storage but for those that are known. One
// that has no storage yet was being created when its daemon was killed.
func (s *survival) destroyUnknown(ctx context.Context, store string, known []string) error {
	s.creating.Lock()
	defer s.creating.Unlock()
	all, err := s.Snapshots(ctx)
	for _, x := range all {
		if (len(x.Storage) == 0 || x.Storage[0].Path == store) && !slices.Contains(known, x.ID) {
			err = errors.Join(err, s.DestroySnapshot(ctx, control.DestroyRequest{ID: x.ID, Force: true}))
		}
	}
	return err
}
