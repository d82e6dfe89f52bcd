package snapshot

import (
	"fmt"
	"math/rand"
	"os/exec"
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

// TestWriterKilled kills writers in the midst of their writes: the snapshot is not
// harmed. With the kernel module it could be; TestSmallPool has the other half of
// that, writes that went by uncopied because there was no memory.
func TestWriterKilled(t *testing.T) {
	guest.Need(t)
	const size = 32 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 64))
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	win := w.Open()
	s := d.Take(256<<10, dev)
	win.Close()
	for i := range int(guest.Span(6, 100)) {
		c := exec.Command("fio", "--name=test", "--filename="+dev.Path, "--ioengine=io_uring", "--direct=1", "--rw=randwrite",
			"--bsrange=4k-512k", "--iodepth=32", "--thread", "--time_based", "--runtime=60", fmt.Sprintf("--randseed=%d", i))
		if i%2 == 1 {
			c = exec.Command("dd", "if=/dev/urandom", "of="+dev.Path, "bs=1M", "conv=notrunc", fmt.Sprintf("seek=%d", 3*i))
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(300+i*37) * time.Millisecond)
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if got := d.Show(s.ID); got.Errno != 0 || got.Usage.Copied == 0 {
		t.Errorf("%+v", got)
	}
	d.Destroy(s.ID)
	guest.WaitFor(t, "the end of the last request", func() bool {
		st, err := d.DeviceStatus(guest.Context(t), dev.Name)
		if err != nil || st.Errors != 0 {
			t.Fatalf("%d errors, %v", st.Errors, err)
		}
		return st.InFlight == 0
	})
	d.Remove(dev)
}

// Snapshots under load.

// imageUser reads and writes an image, and knows what it has to show: the cut,
// and over it what has been written to the image.
type imageUser struct {
	win   *stamp.Window
	disk  int // of the world
	path  string
	over  []stamp.Version // by sector; zeroes: not written
	last  stamp.Version
	pause time.Duration // longest between two steps
	mu    sync.Mutex
	wrong error
}

// imageStamp is added to a disk's number in what is written to its image.
const imageStamp = 100

func newImageUser(win *stamp.Window, disk int, path string) *imageUser {
	return &imageUser{win: win, disk: disk, path: path, over: make([]stamp.Version, win.Sectors(disk))}
}

// see compares what the image shows from sector on. Nobody may be writing that.
func (u *imageUser) see(p []byte, sector int64) error {
	for ; len(p) > 0; p, sector = p[stamp.SectorSize:], sector+1 {
		if u.over[sector] == stamp.Zeroes {
			u.win.See(u.disk, sector, p[:stamp.SectorSize])
			continue
		}
		v, ok := stamp.Of(p[:stamp.SectorSize], u.disk+imageStamp, sector)
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
	f, err := direct.Open(u.path, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := direct.Buffers.Get().(*[]byte)
	defer direct.Buffers.Put(buf)
	rnd := rand.New(rand.NewSource(seed))
	const stripe = 256 + 3 // sectors
	for {
		select {
		case <-end:
			return nil
		default:
		}
		stamp.Rest(rnd, u.pause)
		lo := (2*rnd.Int63n((int64(len(u.over))+2*stripe-1)/(2*stripe)) + half) * stripe
		hi := min(lo+stripe, int64(len(u.over)))
		if lo >= hi {
			continue
		}
		from := lo + rnd.Int63n(hi-lo)
		to := from + 1 + rnd.Int63n(min(hi-from, 1<<uint(rnd.Intn(9))))
		p := (*buf)[:(to-from)*stamp.SectorSize]
		if half == 0 && rnd.Intn(3) == 0 {
			u.last++
			stamp.Fill(p, u.last, u.disk+imageStamp, from)
			if err := f.WriteAt(p, from*stamp.SectorSize); err != nil {
				return err
			}
			for s := from; s < to; s++ {
				u.over[s] = u.last
			}
			continue
		}
		if err := f.ReadAt(p, from*stamp.SectorSize); err != nil {
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
	if err := direct.Scan(u.path, int64(len(u.over))*stamp.SectorSize, u.see); err != nil {
		return err
	}
	return u.win.Err()
}

// TestRandomWriter is I1 and I2: random writers of all sizes, snapshots taken
// and destroyed in their midst, images read and written at the same time. Every
// image is the original at one instant, sector by sector, and in the end the
// original is as if there had been no snapshot.
func TestRandomWriter(t *testing.T) {
	guest.Need(t)
	const size = 12<<20 + 3<<10 // a short last chunk of every size
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	for i, chunk := range []int64{4 << 10, 64 << 10, 256 << 10, 1 << 20} {
		for j, queues := range guest.QueueCounts() {
			if !guest.Long() && i > 0 && i%2 != j%2 {
				continue // the short form has each size, and the smallest with each number of queues
			}
			t.Run(fmt.Sprintf("%dKiB/%dqueues", chunk>>10, queues), func(t *testing.T) {
				snapshotsUnder(t, d.In(t), disk, chunk, queues, guest.Span(1500*time.Millisecond, time.Minute))
			})
		}
	}
}

func snapshotsUnder(t *testing.T, d *program.Daemon, disk string, chunk int64, queues int, long time.Duration) {
	dev := d.Add(disk, program.Queues(queues, 64))
	w := stamp.NewWorld(dev.Size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	seed := chunk + int64(queues)
	rnd := rand.New(rand.NewSource(seed))
	stop := w.StartWriters(t, seed, stamp.Mix{Writers: 5, Zeroes: true}, dev.Path)

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
			t.Errorf("I1: %v; the snapshot: %+v", err, d.Show(h.s.ID))
		}
		d.Destroy(h.s.ID)
	}
	rounds := 0
	for end := time.Now().Add(long); time.Now().Before(end) || rounds < 3; rounds++ {
		win := w.Open()
		s := d.Take(chunk, dev)
		win.Close()
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
	n := w.Writes.Load()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := w.Same(dev.Path); err != nil {
		t.Errorf("I2: %v", err)
	}
	d.Remove(dev)
	if err := w.Same(disk); err != nil {
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
	guest.NeedEither(t)
	const size = 8 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	guest.Run(t, "modprobe", "dm-delay")
	for _, c := range []struct {
		name          string
		reads, writes int // milliseconds
		queues        int
		chunk         int64
	}{
		{"reads/4KiB", 15, 0, 1, 4 << 10},
		{"reads/64KiB", 15, 0, guest.QueueCounts()[len(guest.QueueCounts())-1], 64 << 10},
		{"writes/64KiB", 0, 800, guest.QueueCounts()[len(guest.QueueCounts())-1], 64 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := guest.DMDisk(t, "slow", fmt.Sprintf("0 %d delay %s 0 %d %s 0 %d", size>>9, ram, c.reads, ram, c.writes))
			w := stamp.NewWorld(size)
			if err := w.Fill(ram); err != nil {
				t.Fatal(err)
			}
			d := program.Start(t)
			dev := d.Add(disk, program.Queues(c.queues, 32))
			stop := w.StartWriters(t, 4, stamp.Mix{Writers: 6, Largest: 64 << 10}, dev.Path)
			for range 3 {
				win := w.Open()
				s := d.Take(c.chunk, dev)
				win.Close()
				if err := win.Check(s.Images[0].Path); err != nil {
					t.Errorf("I4: at once: %v", err)
				}
				time.Sleep(max(guest.Span(300*time.Millisecond, 5*time.Second), time.Duration(c.writes)*time.Millisecond))
				if err := win.Check(s.Images[0].Path); err != nil {
					t.Errorf("I4: %v", err)
				}
				d.Destroy(s.ID)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
			d.Remove(dev)
			if err := w.Same(ram); err != nil {
				t.Errorf("I2: %v", err)
			}
		})
	}
}

// TestSmallPool has little memory and a slow storage: writes wait until there is
// room for the old data, and none goes by uncopied.
func TestSmallPool(t *testing.T) {
	guest.Need(t)
	const size = 16 << 20
	ram := guest.RAMDisks(t, 2, size+4<<20)
	guest.Run(t, "modprobe", "dm-delay")
	store := guest.DMDisk(t, "slowstore", fmt.Sprintf("0 %d delay %s 0 0 %s 0 30", (size+4<<20)>>9, ram[1], ram[1]))
	d := program.Start(t, "diff_buffer_pool_size=1M")
	disk := guest.DMDisk(t, "small", fmt.Sprintf("0 %d linear %s 0", size>>9, ram[0]))
	dev := d.Add(disk, program.Queues(1, 32))
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: store}}})
	stop := w.StartWriters(t, 5, stamp.Mix{Writers: 6}, dev.Path)
	win := w.Open()
	s = d.Taken(s.ID)
	win.Close()
	guest.WaitFor(t, "12 MiB of copies", func() bool { return d.Show(s.ID).Usage.Copied >= 12<<20 })
	if err := win.Check(s.Images[0].Path); err != nil {
		t.Errorf("I1: %v", err)
	}
	if got := d.Show(s.ID); got.Errno != 0 {
		t.Errorf("%+v", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
	if err := w.Same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}

// TestEightSnapshots holds eight snapshots of one device at once, with chunks of
// several sizes, and destroys them in any order.
func TestEightSnapshots(t *testing.T) {
	guest.NeedEither(t)
	const size = 16<<20 + 1<<10
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	queues := guest.QueueCounts()
	dev := d.Add(disk, program.Queues(queues[len(queues)-1], 64))
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stop := w.StartWriters(t, 8, stamp.Mix{Writers: 5, Zeroes: true, Largest: 256 << 10}, dev.Path)
	type one struct {
		id    string
		image string
		win   *stamp.Window
	}
	var all []one
	before := d.Held()
	for i := range 8 {
		win := w.Open()
		s := d.Take(4<<10<<(2*(i%4)), dev)
		win.Close()
		all = append(all, one{s.ID, s.Images[0].Path, win})
		time.Sleep(50 * time.Millisecond)
	}
	list, err := d.Devices(guest.Context(t))
	if err != nil || len(list) != 1 || len(list[0].Snapshots) != 8 {
		t.Errorf("devices: %+v, %v", list, err)
	}
	rand.New(rand.NewSource(8)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, x := range all {
		if err := x.win.Check(x.image); err != nil {
			t.Errorf("I1: %v", err)
		}
		d.Destroy(x.id)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.Settled(before, 12+8*dev.Queues)
	d.Remove(dev)
	if err := w.Same(disk); err != nil {
		t.Errorf("I2: %v", err)
	}
}
