package integration

import (
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// Snapshots under load.

// imageUser reads and writes an image, and knows what it has to show: the cut,
// and over it what has been written to the image.
type imageUser struct {
	win   *window
	disk  int // of the world
	path  string
	over  []version // by sector; zeroes: not written
	last  version
	mu    sync.Mutex
	wrong error
}

// imageStamp is added to a disk's number in what is written to its image.
const imageStamp = 100

func newImageUser(win *window, disk int, path string) *imageUser {
	return &imageUser{win: win, disk: disk, path: path, over: make([]version, win.w.disks[disk].sectors)}
}

// see compares what the image shows from sector on. Nobody may be writing that.
func (u *imageUser) see(p []byte, sector int64) error {
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		if u.over[sector] == zeroes {
			u.win.see(u.disk, sector, p[:sectorSize])
			continue
		}
		v, ok := stampOf(p[:sectorSize], u.disk+imageStamp, sector)
		if !ok || v != u.over[sector] {
			return fmt.Errorf("%s, sector %d: version %d (whole: %v), want %d of the writes to the image", u.path, sector, v, ok, u.over[sector])
		}
	}
	return nil
}

// work reads and writes random pieces until end says so: one writes, another
// reads, each in stripes of its own, with borders in the midst of chunks.
func (u *imageUser) work(seed int64, end <-chan struct{}) {
	var wg sync.WaitGroup
	for k := range int64(2) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := u.workOn(seed+k, k, end); err != nil {
				u.mu.Lock()
				u.wrong = err
				u.mu.Unlock()
			}
		}()
	}
	wg.Wait()
}

func (u *imageUser) workOn(seed, half int64, end <-chan struct{}) error {
	fd, err := unix.Open(u.path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", u.path, err)
	}
	f := &directFile{fd, u.path}
	defer f.close()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	rnd := rand.New(rand.NewSource(seed))
	const stripe = 256 + 3 // sectors
	for {
		select {
		case <-end:
			return nil
		default:
		}
		lo := (2*rnd.Int63n((int64(len(u.over))+2*stripe-1)/(2*stripe)) + half) * stripe
		hi := min(lo+stripe, int64(len(u.over)))
		if lo >= hi {
			continue
		}
		from := lo + rnd.Int63n(hi-lo)
		to := from + 1 + rnd.Int63n(min(hi-from, 1<<uint(rnd.Intn(9))))
		p := (*buf)[:(to-from)*sectorSize]
		if half == 0 && rnd.Intn(3) == 0 {
			u.last++
			stamp(p, u.last, u.disk+imageStamp, from)
			if err := f.write(p, from*sectorSize); err != nil {
				return err
			}
			for s := from; s < to; s++ {
				u.over[s] = u.last
			}
			continue
		}
		if err := f.read(p, from*sectorSize); err != nil {
			return err
		}
		if err := u.see(p, from); err != nil {
			return err
		}
	}
}

// check reads all of the image.
func (u *imageUser) check() error {
	if u.wrong != nil {
		return u.wrong
	}
	if err := scan(u.path, int64(len(u.over))*sectorSize, u.see); err != nil {
		return err
	}
	return u.win.err()
}

// TestRandomWriter is I1 and I2: random writers of all sizes, snapshots taken
// and destroyed in their midst, images read and written at the same time. Every
// image is the original at one instant, sector by sector, and in the end the
// original is as if there had been no snapshot.
func TestRandomWriter(t *testing.T) {
	needVM(t)
	const size = 12<<20 + 3<<10 // a short last chunk of every size
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	for _, chunk := range []int64{4 << 10, 64 << 10, 256 << 10, 1 << 20} {
		for _, queues := range queueCounts() {
			t.Run(fmt.Sprintf("%dKiB/%dqueues", chunk>>10, queues), func(t *testing.T) {
				snapshotsUnder(t, d.in(t), disk, chunk, queues, span(1500*time.Millisecond, time.Minute))
			})
		}
	}
}

func snapshotsUnder(t *testing.T, d *daemon, disk string, chunk int64, queues int, long time.Duration) {
	dev := d.add(disk, with(queues, 64))
	w := newWorld(dev.Size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	seed := chunk + int64(queues)
	rnd := rand.New(rand.NewSource(seed))
	stop := w.writers(t, seed, mix{writers: 5, zeroes: true}, dev.Path)

	type held struct {
		s    control.Snapshot
		user *imageUser
		end  chan struct{}
		done chan struct{}
	}
	var all []*held
	finish := func(i int) {
		h := all[i]
		all = append(all[:i], all[i+1:]...)
		close(h.end)
		<-h.done
		if err := h.user.check(); err != nil {
			t.Errorf("I1: %v", err)
		}
		d.destroy(h.s.ID)
	}
	rounds := 0
	for end := time.Now().Add(long); time.Now().Before(end) || rounds < 3; rounds++ {
		win := w.open()
		s := d.take(chunk, dev)
		win.close()
		if s.ChunkSize != chunk || len(s.Images) != 1 {
			t.Fatalf("snapshot %+v", s)
		}
		h := &held{s, newImageUser(win, 0, s.Images[0].Path), make(chan struct{}), make(chan struct{})}
		go func() {
			defer close(h.done)
			h.user.work(seed+int64(rounds)*16, h.end)
		}()
		all = append(all, h)
		if len(all) == 3 || rnd.Intn(2) == 0 {
			finish(rnd.Intn(len(all)))
		}
	}
	for len(all) > 0 {
		finish(rnd.Intn(len(all)))
	}
	n := w.writes.Load()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := w.same(dev.Path); err != nil {
		t.Errorf("I2: %v", err)
	}
	d.remove(dev)
	if err := w.same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
	t.Logf("%d snapshots, %d writes", rounds, n)
}

// TestSlowOriginal has an original whose reads take long, and its writes do not:
// a write that is forwarded before the copy of what it overwrites has landed
// would be seen in the image (I4). Then one whose writes take longer than a take:
// a cut that does not wait for those in flight would let them into the image
// when it is there already.
func TestSlowOriginal(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	ram := ramDisks(t, 1, size)[0]
	run(t, "modprobe", "dm-delay")
	for _, c := range []struct {
		name          string
		reads, writes int // milliseconds
		queues        int
		chunk         int64
	}{
		{"reads/4KiB", 15, 0, 1, 4 << 10},
		{"reads/64KiB", 15, 0, queueCounts()[len(queueCounts())-1], 64 << 10},
		{"writes/64KiB", 0, 800, queueCounts()[len(queueCounts())-1], 64 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := dmDisk(t, "slow", fmt.Sprintf("0 %d delay %s 0 %d %s 0 %d", size>>9, ram, c.reads, ram, c.writes))
			w := newWorld(size)
			if err := w.fill(ram); err != nil {
				t.Fatal(err)
			}
			d := startDaemon(t)
			dev := d.add(disk, with(c.queues, 32))
			stop := w.writers(t, 4, mix{writers: 6, largest: 64 << 10}, dev.Path)
			for range 3 {
				win := w.open()
				s := d.take(c.chunk, dev)
				win.close()
				if err := win.check(s.Images[0].Path); err != nil {
					t.Errorf("I4: at once: %v", err)
				}
				time.Sleep(max(span(300*time.Millisecond, 5*time.Second), time.Duration(c.writes)*time.Millisecond))
				if err := win.check(s.Images[0].Path); err != nil {
					t.Errorf("I4: %v", err)
				}
				d.destroy(s.ID)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			d.remove(dev)
			if err := w.same(ram); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestSmallPool has little memory and a slow storage: writes wait until there is
// room for the old data, and none goes by uncopied.
func TestSmallPool(t *testing.T) {
	needVM(t)
	const size = 16 << 20
	ram := ramDisks(t, 2, size+4<<20)
	run(t, "modprobe", "dm-delay")
	store := dmDisk(t, "slowstore", fmt.Sprintf("0 %d delay %s 0 0 %s 0 30", (size+4<<20)>>9, ram[1], ram[1]))
	d := startDaemon(t, "diff_buffer_pool_size=1M")
	disk := dmDisk(t, "small", fmt.Sprintf("0 %d linear %s 0", size>>9, ram[0]))
	dev := d.add(disk, with(1, 32))
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: store}}})
	stop := w.writers(t, 5, mix{writers: 6}, dev.Path)
	win := w.open()
	s = d.taken(s.ID)
	win.close()
	waitFor(t, "12 MiB of copies", func() bool { return d.snapshot(s.ID).Usage.Copied >= 12<<20 })
	if err := win.check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if got := d.snapshot(s.ID); got.Errno != 0 {
		t.Errorf("%+v", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.destroy(s.ID)
	d.remove(dev)
	if err := w.same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestEightSnapshots holds eight snapshots of one device at once, with chunks of
// several sizes, and destroys them in any order.
func TestEightSnapshots(t *testing.T) {
	needVM(t)
	const size = 16<<20 + 1<<10
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	queues := queueCounts()
	dev := d.add(disk, with(queues[len(queues)-1], 64))
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stop := w.writers(t, 8, mix{writers: 5, zeroes: true, largest: 256 << 10}, dev.Path)
	type one struct {
		id    string
		image string
		win   *window
	}
	var all []one
	before := d.held()
	for i := range 8 {
		win := w.open()
		s := d.take(4<<10<<(2*(i%4)), dev)
		win.close()
		all = append(all, one{s.ID, s.Images[0].Path, win})
		time.Sleep(50 * time.Millisecond)
	}
	list, err := d.Devices(ctx(t))
	if err != nil || len(list) != 1 || len(list[0].Snapshots) != 8 {
		t.Errorf("devices: %+v, %v", list, err)
	}
	rand.New(rand.NewSource(8)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, x := range all {
		if err := x.win.check(x.image); err != nil {
			t.Errorf("I1: %v", err)
		}
		d.destroy(x.id)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.settled(before, 12+8*dev.Queues)
	d.remove(dev)
	if err := w.same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestThreeDevices is I7: a snapshot of three devices under load shows them at
// one instant. Besides the random writers, one writes the number of its step to
// the last sector of each in turn.
func TestThreeDevices(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	disks := ramDisks(t, 3, size+4096)
	d := startDaemon(t)
	var devs []control.Device
	var paths []string
	for i, disk := range disks {
		queues := queueCounts()
		dev := d.add(disk, with(queues[i%len(queues)], 32))
		devs, paths = append(devs, dev), append(paths, dev.Path)
	}
	w := newWorld(size, size, size)
	if err := w.fill(paths...); err != nil {
		t.Fatal(err)
	}
	stop := w.writers(t, 7, mix{writers: 2, largest: 256 << 10}, paths...)

	end := make(chan struct{})
	var steps version
	stepped := make(chan error, 1)
	go func() {
		var fs []*directFile
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		for _, p := range paths {
			fd, err := unix.Open(p, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
			if err != nil {
				stepped <- err
				return
			}
			f := &directFile{fd, p}
			defer f.close()
			fs = append(fs, f)
		}
		for {
			select {
			case <-end:
				stepped <- nil
				return
			default:
			}
			steps++
			for i, f := range fs {
				p := (*buf)[:sectorSize]
				stamp(p, steps, i, size/sectorSize)
				if err := f.write(p, size); err != nil {
					stepped <- err
					return
				}
			}
		}
	}()
	for range int(span(4, 50)) {
		time.Sleep(100 * time.Millisecond)
		win := w.open()
		s := d.take(64<<10, devs...)
		win.close()
		var images []string
		var at [3]version
		for i, im := range s.Images {
			if im.Device != devs[i].Name {
				t.Fatalf("image %d is of %s, want %s", i, im.Device, devs[i].Name)
			}
			images = append(images, im.Path)
			f := openDirect(t, im.Path, unix.O_RDONLY)
			buf := buffers.Get().(*[]byte)
			if err := f.read((*buf)[:sectorSize], size); err != nil {
				t.Fatal(err)
			}
			v, ok := stampOf(*buf, i, size/sectorSize)
			if !ok {
				t.Errorf("counter of device %d is torn", i)
			}
			at[i] = v
			buffers.Put(buf)
			f.close()
		}
		if at[0] < at[1] || at[1] < at[2] || at[2]+1 < at[0] || at[0] == 0 {
			t.Errorf("I7: the counters are %v", at)
		}
		if err := win.check(images...); err != nil {
			t.Errorf("I7: %v", err)
		}
		d.destroy(s.ID)
	}
	close(end)
	if err := <-stepped; err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, dev := range devs {
		d.remove(dev)
	}
	if err := w.same(disks...); err != nil {
		t.Errorf("I2: %v", err)
	}
	t.Logf("%d steps", steps)
}

// TestSnapshotRounds takes and destroys 30 times: it leaves nothing.
func TestSnapshotRounds(t *testing.T) {
	needVM(t)
	leakTest(t)
	const size = 4 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk, with(1, 8))
	w := newWorld(size)
	round := func() {
		if err := w.fill(dev.Path); err != nil {
			t.Fatal(err)
		}
		win := w.open()
		s := d.take(64<<10, dev)
		win.close()
		if err := w.fill(dev.Path); err != nil {
			t.Fatal(err)
		}
		if err := win.check(s.Images[0].Path); err != nil {
			t.Errorf("I1: %v", err)
		}
		d.destroy(s.ID)
	}
	for range 6 {
		round()
	}
	before, memory := d.held(), d.memory()
	rounds := int(span(30, 300))
	for range rounds {
		round()
	}
	d.settled(before, 3)
	grown := d.memory() - memory
	t.Logf("%d KiB more after %d rounds", grown>>10, rounds)
	if grown > 4<<20 {
		t.Errorf("I9: %d bytes more memory", grown)
	}
	if left := entries(d.dir.State() + "/snapshots"); left > 0 {
		t.Errorf("%d snapshots' state is left", left)
	}
	if left := entries("/dev/ublk-blksnap/images"); left > 0 {
		t.Errorf("%d links to images are left", left)
	}
	d.remove(dev)
}

// TestImageFilesystem mounts the image of a frozen filesystem beside its
// original: sound, as it was, and writable.
func TestImageFilesystem(t *testing.T) {
	for _, k := range []fsKind{ext4FS, xfsFS, btrfsFS} {
		t.Run(k.name, func(t *testing.T) {
			needVM(t)
			disk := ramDisks(t, 1, max(k.minimum, 128<<20))[0]
			d := startDaemon(t)
			dev := d.add(disk)
			k.make(t, dev.Link)
			dir := mount(t, dev.Link)
			old := someFiles(t, dir, 1)
			stop := busyFiles(t, dir)
			s := d.take(0, dev)
			if s.Frozen <= 0 || s.Frozen > patience {
				t.Errorf("frozen for %v", s.Frozen)
			}
			stop()
			if err := os.RemoveAll(filepath.Join(dir, "set1/3")); err != nil {
				t.Fatal(err)
			}
			newer := someFiles(t, dir, 2)
			unix.Sync()
			image := s.Images[0].Path

			if k.name != "xfs" { // which leaves its counters to the log, frozen or not
				k.clean(t, image)
			}
			if k.name == "btrfs" {
				imageOfBtrfs(t, d, dev, dir, image, old, newer)
				return
			}
			at := mount(t, image, k.beside...)
			sameFiles(t, filepath.Join(at, "set1"), below("set1", old))
			if _, err := os.Stat(filepath.Join(at, "set2")); err == nil {
				t.Error("the image shows what was written after the take")
			}
			more := someFiles(t, at, 3)
			umount(t, at)
			at = mount(t, image, k.beside...)
			sameFiles(t, filepath.Join(at, "set3"), below("set3", more))
			sameFiles(t, filepath.Join(at, "set1"), below("set1", old))
			umount(t, at)
			k.clean(t, image)

			dropCaches(t)
			sameFiles(t, filepath.Join(dir, "set2"), below("set2", newer))
			if _, err := os.Stat(filepath.Join(dir, "set3")); err == nil {
				t.Error("the original shows what was written to the image")
			}
			d.destroy(s.ID)
			umount(t, dir)
			k.clean(t, dev.Link)
			d.remove(dev)
			k.clean(t, disk)
		})
	}
}

// imageOfBtrfs: btrfs knows its devices by their UUID, and takes an image for
// the original: until the kernel learned to tell them apart it refuses to mount
// one beside the other.
func imageOfBtrfs(t *testing.T, d *daemon, dev control.Device, dir, image string, old, newer map[string][32]byte) {
	at, err := tryMount(t, image)
	if err == nil {
		sameFiles(t, filepath.Join(at, "set1"), below("set1", old))
		if _, err := os.Stat(filepath.Join(at, "set2")); err == nil {
			t.Error("the image shows what was written after the take")
		}
		umount(t, at)
	} else {
		t.Logf("beside its original it is refused: %v", err)
		// Alone it can be mounted.
		umount(t, dir)
		run(t, "btrfs", "device", "scan", "--forget")
		at = mount(t, image)
		sameFiles(t, filepath.Join(at, "set1"), below("set1", old))
		umount(t, at)
		run(t, "btrfs", "device", "scan", "--forget")
		dir = mount(t, dev.Link)
	}
	sameFiles(t, filepath.Join(dir, "set2"), below("set2", newer))
	for _, id := range snapshotIDs(t, d) {
		d.destroy(id)
	}
	umount(t, dir)
	btrfsFS.clean(t, dev.Link)
	d.remove(dev)
}

func snapshotIDs(t testing.TB, d *daemon) []string {
	t.Helper()
	all, err := d.Snapshots(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, s := range all {
		ids = append(ids, s.ID)
	}
	return ids
}

// below are the sums of the files below a directory, named from there.
func below(dir string, sums map[string][32]byte) map[string][32]byte {
	out := map[string][32]byte{}
	for name, sum := range sums {
		if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
			out[rest] = sum
		}
	}
	return out
}

// busyFiles makes, syncs and removes files below dir/busy until stopped.
func busyFiles(t testing.TB, dir string) (stop func()) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "busy"), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	for n := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, 40<<10)
			for i := 0; ; i++ {
				select {
				case <-end:
					return
				default:
				}
				name := filepath.Join(dir, "busy", fmt.Sprintf("%d-%d", n, i%16))
				f, err := os.Create(name)
				if err == nil {
					_, err = f.Write(p[:1+i*977%len(p)])
				}
				if err == nil && i%4 == 0 {
					err = f.Sync()
				}
				f.Close()
				if err == nil && i%3 == 0 {
					err = os.Remove(name)
				}
				if err != nil {
					t.Errorf("busy files: %v", err)
					return
				}
			}
		}()
	}
	var once sync.Once
	stop = func() { once.Do(func() { close(end); wg.Wait() }) }
	t.Cleanup(stop)
	return stop
}

// TestNoFreeze takes without freezing: the image is as after a power failure,
// and its journal brings it back.
func TestNoFreeze(t *testing.T) {
	for _, k := range []fsKind{ext4FS, xfsFS} {
		t.Run(k.name, func(t *testing.T) {
			needVM(t)
			disk := ramDisks(t, 1, max(k.minimum, 128<<20))[0]
			d := startDaemon(t)
			dev := d.add(disk)
			k.make(t, dev.Link)
			dir := mount(t, dev.Link)
			old := someFiles(t, dir, 1)
			unix.Sync() // what is synced has to be there
			stop := busyFiles(t, dir)
			time.Sleep(500 * time.Millisecond)
			s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
			s, err := d.TakeSnapshot(ctx(t), control.TakeRequest{ID: s.ID, NoFreeze: true})
			if err != nil {
				t.Fatal(err)
			}
			if s.Frozen != 0 {
				t.Errorf("frozen for %v", s.Frozen)
			}
			image := s.Images[0].Path
			if k.name == "ext4" {
				if out, err := try("dumpe2fs", "-h", image); err != nil || !strings.Contains(out, "needs_recovery") {
					t.Errorf("the image does not look as after a power failure: %v\n%s", err, out)
				}
				// Status 1: errors were corrected.
				out, err := try("e2fsck", "-f", "-y", image)
				if n := status(t, err); n > 1 || !strings.Contains(out, "recovering journal") {
					t.Errorf("e2fsck: status %d\n%s", n, out)
				}
			}
			at := mount(t, image, k.beside...)
			sameFiles(t, filepath.Join(at, "set1"), below("set1", old))
			umount(t, at)
			k.clean(t, image)
			stop()
			d.destroy(s.ID)
			umount(t, dir)
			k.clean(t, dev.Link)
			d.remove(dev)
		})
	}
}
