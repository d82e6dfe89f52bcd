package integration

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Contents that tell who wrote them, and a model of disks under random writers
// that can say whether an image is a cut: what all disks held at one instant.
//
//	writer ── lock: new version, tick ── pwrite ── lock: tick, now it is there ──>
//	                 │ also into every open window
//	take:  open window ───────────── TakeSnapshot ───────────── close window
//	                                      ↑ the cut, some time here
//
// A sector of the image may hold what it held when the window was opened, or
// what was written to it until the window was closed. Finding the content of a
// write says that the cut came after the write was started; finding that of its
// predecessor says that the cut came before it was done. If all of them together
// leave an instant for the cut, the image is right, on one disk or on several. And
// what has been seen of it once is seen ever after.

const sectorSize = 512

// version names the content of a sector; every write has its own.
type version uint64

// zeroes is the version of a sector of zeroes.
const zeroes version = 0

// stamp fills the sectors of p, of which the first is number sector of disk,
// with version v.
func stamp(p []byte, v version, disk int, sector int64) {
	if v == zeroes {
		clear(p)
		return
	}
	w := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(p))), len(p)/8)
	for ; len(w) > 0; w, sector = w[sectorSize/8:], sector+1 {
		at := uint64(disk+1)<<48 | uint64(sector)
		w[0], w[1] = uint64(v), at
		x := uint64(v)*0x9e3779b97f4a7c15 ^ at
		for i := 2; i < sectorSize/8; i++ {
			x += 0x9e3779b97f4a7c15
			w[i] = x
		}
	}
}

// stampOf is the version in one sector, and whether all of it is that version's
// and belongs here.
func stampOf(p []byte, disk int, sector int64) (version, bool) {
	w := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(p))), sectorSize/8)
	if w[0] == 0 {
		for _, x := range w {
			if x != 0 {
				return 0, false
			}
		}
		return zeroes, true
	}
	at := uint64(disk+1)<<48 | uint64(sector)
	if w[1] != at {
		return version(w[0]), false
	}
	x := w[0]*0x9e3779b97f4a7c15 ^ at
	for _, y := range w[2:] {
		if x += 0x9e3779b97f4a7c15; x != y {
			return version(w[0]), false
		}
	}
	return version(w[0]), true
}

// world is some disks under random writers.
type world struct {
	mu       sync.Mutex
	disks    []*worldDisk
	tick     uint64
	last     version
	inFlight map[*written]bool
	windows  map[*window]bool

	writes, reads atomic.Int64
}

// worldDisk is what one disk holds.
type worldDisk struct {
	w       *world
	number  int
	sectors int64
	now     []version // by sector, of writes that are done
}

// written is one write.
type written struct {
	disk       *worldDisk
	from, to   int64   // sectors
	v          version // unique, also that of a write of zeroes
	content    version // v, or zeroes
	start, end uint64  // ticks; end is 0 while it is under way
}

// window is the time of one take.
type window struct {
	w      *world
	before [][]version // by disk
	writes []*written  // under way when it was opened, or begun until it was closed
	chains []map[int64][]*written

	mu       sync.Mutex
	seen     map[[2]int64]version // what images show of sectors that were written in the window
	after    uint64               // the cut came after this tick
	until    uint64               // and before this one
	afterBy  string
	untilBy  string
	findings []string
}

// newWorld is a world of disks with sizes in bytes, all zeroes.
func newWorld(sizes ...int64) *world {
	w := &world{inFlight: map[*written]bool{}, windows: map[*window]bool{}}
	for i, size := range sizes {
		n := size / sectorSize
		w.disks = append(w.disks, &worldDisk{w: w, number: i, sectors: n, now: make([]version, n)})
	}
	return w
}

// begin registers a write of sectors [from, to), before it is submitted. Nobody
// else may write any of them until done.
func (d *worldDisk) begin(from, to int64, zero bool) *written {
	w := d.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	w.tick++
	x := &written{disk: d, from: from, to: to, v: w.last, content: w.last, start: w.tick}
	if zero {
		x.content = zeroes
	}
	w.inFlight[x] = true
	for win := range w.windows {
		win.writes = append(win.writes, x)
	}
	return x
}

// done registers that a write has been acknowledged.
func (x *written) done() {
	w := x.disk.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tick++
	x.end = w.tick
	delete(w.inFlight, x)
	for s := x.from; s < x.to; s++ {
		x.disk.now[s] = x.content
	}
	w.writes.Add(1)
}

// open opens a window for a take that begins now.
func (w *world) open() *window {
	w.mu.Lock()
	defer w.mu.Unlock()
	win := &window{w: w, until: math.MaxUint64, seen: map[[2]int64]version{}}
	for _, d := range w.disks {
		win.before = append(win.before, slices.Clone(d.now))
		win.chains = append(win.chains, nil)
	}
	for x := range w.inFlight {
		win.writes = append(win.writes, x)
	}
	w.tick++
	win.after, win.afterBy = w.tick, "the start of the take"
	w.windows[win] = true
	return win
}

// close ends the window: the take is done.
func (win *window) close() {
	w := win.w
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.windows, win)
	w.tick++
	win.until, win.untilBy = w.tick, "the end of the take"
	slices.SortFunc(win.writes, func(a, b *written) int { return int(int64(a.v) - int64(b.v)) })
	for i := range win.chains {
		win.chains[i] = map[int64][]*written{}
	}
	for _, x := range win.writes {
		chain := win.chains[x.disk.number]
		for s := x.from; s < x.to; s++ {
			chain[s] = append(chain[s], x)
		}
	}
}

// see takes note of what the image of a disk shows, from the given sector on.
func (win *window) see(disk int, sector int64, p []byte) {
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		v, ok := stampOf(p[:sectorSize], disk, sector)
		chain := win.chains[disk][sector]
		before := win.before[disk][sector]
		if ok && len(chain) == 0 && v == before {
			continue
		}
		win.judge(disk, sector, v, ok, before, chain)
	}
}

func (win *window) judge(disk int, sector int64, v version, ok bool, before version, chain []*written) {
	win.mu.Lock()
	defer win.mu.Unlock()
	if !ok {
		win.find("disk %d, sector %d: torn, or of another place (looks like version %d); at the start of the take version %d", disk, sector, v, before)
		return
	}
	place := [2]int64{int64(disk), sector}
	if was, ok := win.seen[place]; ok && was != v {
		win.find("disk %d, sector %d: version %d, which was %d before: the image has changed", disk, sector, v, was)
		return
	}
	win.seen[place] = v
	// The places in the chain where it fits; -1 is before all writes of the window.
	var fits []int
	if v == before {
		fits = append(fits, -1)
	}
	for i, x := range chain {
		if x.content == v {
			fits = append(fits, i)
		}
	}
	switch len(fits) {
	case 0:
		win.find("disk %d, sector %d: version %d, want %d or one of the %d written during the take", disk, sector, v, before, len(chain))
		return
	case 1:
	default: // zeroes several times: no telling which
		return
	}
	w := win.w
	w.mu.Lock()
	defer w.mu.Unlock()
	i := fits[0]
	if i >= 0 && chain[i].start > win.after {
		win.after = chain[i].start
		win.afterBy = fmt.Sprintf("disk %d, sector %d shows version %d", disk, sector, v)
	}
	if i+1 < len(chain) && chain[i+1].end != 0 && chain[i+1].end < win.until {
		win.until = chain[i+1].end
		win.untilBy = fmt.Sprintf("disk %d, sector %d shows version %d, not %d", disk, sector, v, chain[i+1].v)
	}
}

func (win *window) find(format string, args ...any) {
	if len(win.findings) < 8 {
		win.findings = append(win.findings, fmt.Sprintf(format, args...))
	}
}

// err is what speaks against the images seen so far being one cut.
func (win *window) err() error {
	win.mu.Lock()
	defer win.mu.Unlock()
	if len(win.findings) > 0 {
		return fmt.Errorf("%d or more wrong sectors: %q", len(win.findings), win.findings)
	}
	if win.after > win.until {
		return fmt.Errorf("no instant of a cut: after %d because %s, before %d because %s", win.after, win.afterBy, win.until, win.untilBy)
	}
	return nil
}

// compare says where the disk does not hold what was written last. No write may
// be under way.
func (d *worldDisk) compare(p []byte, sector int64) error {
	for ; len(p) > 0; p, sector = p[sectorSize:], sector+1 {
		if v, ok := stampOf(p[:sectorSize], d.number, sector); !ok || v != d.now[sector] {
			return fmt.Errorf("disk %d, sector %d: version %d (whole: %v), want %d", d.number, sector, v, ok, d.now[sector])
		}
	}
	return nil
}

// directFile is a disk opened without the page cache.
type directFile struct {
	fd   int
	path string
}

func openDirect(t testing.TB, path string, flags int) *directFile {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	f := &directFile{fd, path}
	t.Cleanup(f.close)
	return f
}

func (f *directFile) close() {
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
	}
}

func (f *directFile) read(p []byte, off int64) error {
	n, err := unix.Pread(f.fd, p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d", n, len(p))
	}
	if err != nil {
		err = fmt.Errorf("read %d bytes of %s at %d: %w", len(p), f.path, off, err)
	}
	return err
}

func (f *directFile) write(p []byte, off int64) error {
	n, err := unix.Pwrite(f.fd, p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d", n, len(p))
	}
	if err != nil {
		err = fmt.Errorf("write %d bytes to %s at %d: %w", len(p), f.path, off, err)
	}
	return err
}

// zero writes zeroes without a payload; hole lets the disk forget the place.
func (f *directFile) zero(off, n int64, hole bool) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if hole {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	err := unix.Fallocate(f.fd, mode, off, n)
	if hole && errors.Is(err, unix.EOPNOTSUPP) { // not every disk can
		err = unix.Fallocate(f.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if err != nil {
		return fmt.Errorf("zero %d bytes of %s at %d: %w", n, f.path, off, err)
	}
	return nil
}

// buffers are of maxWrite bytes, fit for direct I/O, and used again.
const maxWrite = 1 << 20

var buffers = sync.Pool{New: func() any {
	p, err := unix.Mmap(-1, 0, maxWrite, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return &p
}}

// scan reads the first size bytes of a disk in order and shows them piece by
// piece.
func scan(path string, size int64, show func(p []byte, sector int64) error) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	f := &directFile{fd, path}
	defer f.close()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for off := int64(0); off < size; off += maxWrite {
		p := (*buf)[:min(maxWrite, size-off)]
		if err := f.read(p, off); err != nil {
			return err
		}
		if err := show(p, off/sectorSize); err != nil {
			return err
		}
	}
	return nil
}

// check reads all of the images of a snapshot, in the order of the world's
// disks, and says whether they are the cut of win.
func (win *window) check(images ...string) error {
	for i, path := range images {
		err := scan(path, win.w.disks[i].sectors*sectorSize, func(p []byte, sector int64) error {
			win.see(i, sector, p)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return win.err()
}

// same says whether the disks at paths hold exactly what was written last.
func (w *world) same(paths ...string) error {
	for i, path := range paths {
		d := w.disks[i]
		if err := scan(path, d.sectors*sectorSize, d.compare); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// mix is what random writers do.
type mix struct {
	block   int64 // logical block in bytes; sectorSize if 0
	writers int   // per disk
	zeroes  bool  // also write zeroes without a payload
	largest int64 // bytes; maxWrite if 0
}

// writers write random pieces to the disks at paths until stopped, and read
// back what they have written. stop waits for them and returns what failed.
//
// Each writer has stripes of its own, so that no two write the same sector at a
// time; their borders lie in the midst of chunks of any size, so that they do
// write the same chunk.
func (w *world) writers(t testing.TB, seed int64, m mix, paths ...string) (stop func() error) {
	t.Helper()
	m.block = max(m.block, sectorSize)
	if m.largest == 0 {
		m.largest = maxWrite
	}
	ctx, cancel := context.WithCancel(context.Background())
	errs := make(chan error, len(paths)*m.writers)
	var wg sync.WaitGroup
	for i, path := range paths {
		for n := range m.writers {
			f := openDirect(t, path, unix.O_RDWR)
			r := &randomWriter{d: w.disks[i], f: f, m: m, n: int64(n), rnd: rand.New(rand.NewSource(seed<<16 + int64(i<<8+n)))}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer f.close()
				for ctx.Err() == nil {
					if err := r.step(); err != nil {
						errs <- err
						return
					}
				}
			}()
		}
	}
	var once sync.Once
	var err error
	stop = func() error {
		once.Do(func() {
			cancel()
			wg.Wait()
			close(errs)
			for e := range errs {
				if err == nil {
					err = e
				}
			}
		})
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

type randomWriter struct {
	d   *worldDisk
	f   *directFile
	m   mix
	n   int64 // of the writers
	rnd *rand.Rand
}

// place picks a random piece of one of the writer's stripes, in sectors. Small
// ones are as frequent as large ones.
func (r *randomWriter) place() (from, to int64) {
	block := r.m.block / sectorSize
	stripe := (maxWrite/sectorSize + 8*17) / block * block // sectors
	total := r.d.sectors / block * block
	count := (total + stripe - 1) / stripe
	mine := (count - r.n + int64(r.m.writers) - 1) / int64(r.m.writers)
	if mine < 1 {
		panic("disk too small for so many writers")
	}
	k := r.n + int64(r.m.writers)*r.rnd.Int63n(mine)
	lo := k * stripe
	hi := min(lo+stripe, total)
	longest := min(hi-lo, r.m.largest/sectorSize) / block
	size := int64(1)
	for size < longest && r.rnd.Intn(8) != 0 {
		size *= 2
	}
	size = (1 + r.rnd.Int63n(min(size, longest))) * block
	from = lo + r.rnd.Int63n((hi-lo-size)/block+1)*block
	return from, from + size
}

func (r *randomWriter) step() error {
	from, to := r.place()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	p := (*buf)[:(to-from)*sectorSize]
	switch k := r.rnd.Intn(16); {
	case k == 0:
		if err := r.f.read(p, from*sectorSize); err != nil {
			return err
		}
		r.d.w.reads.Add(1)
		return r.d.compare(p, from)
	case k == 1 && r.m.zeroes:
		x := r.d.begin(from, to, true)
		if err := r.f.zero(from*sectorSize, (to-from)*sectorSize, r.rnd.Intn(2) == 0); err != nil {
			return err
		}
		x.done()
	default:
		x := r.d.begin(from, to, false)
		stamp(p, x.v, r.d.number, from)
		if err := r.f.write(p, from*sectorSize); err != nil {
			return err
		}
		x.done()
	}
	return nil
}

// more waits until the writers have written n times more.
func (w *world) more(t testing.TB, n int64) {
	t.Helper()
	n += w.writes.Load()
	waitFor(t, "writes to go on", func() bool { return w.writes.Load() >= n })
}

// fill writes all of the disks once, so that no sector is zeroes any more.
func (w *world) fill(paths ...string) error {
	for i, path := range paths {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		buf := buffers.Get().(*[]byte)
		defer buffers.Put(buf)
		d := w.disks[i]
		for from := int64(0); from < d.sectors; from += maxWrite / sectorSize {
			to := min(from+maxWrite/sectorSize, d.sectors)
			p := (*buf)[:(to-from)*sectorSize]
			x := d.begin(from, to, false)
			stamp(p, x.v, i, from)
			if _, err := f.WriteAt(p, from*sectorSize); err != nil {
				return err
			}
			x.done()
		}
	}
	return nil
}

// The rest proves that the model finds what it is for.

func TestStamp(t *testing.T) {
	p := make([]byte, 4*sectorSize)
	stamp(p, 7, 1, 100)
	for i := range int64(4) {
		s := p[i*sectorSize:][:sectorSize]
		if v, ok := stampOf(s, 1, 100+i); v != 7 || !ok {
			t.Errorf("sector %d: version %d, %v", i, v, ok)
		}
		if _, ok := stampOf(s, 0, 100+i); ok {
			t.Errorf("sector %d: taken for that of another disk", i)
		}
		if _, ok := stampOf(s, 1, 101+i); ok {
			t.Errorf("sector %d: taken for the next", i)
		}
	}
	binary.LittleEndian.PutUint64(p[300&^7:], 1)
	if _, ok := stampOf(p, 1, 100); ok {
		t.Error("torn sector taken for whole")
	}
	stamp(p, zeroes, 1, 100)
	if v, ok := stampOf(p, 1, 100); v != zeroes || !ok {
		t.Errorf("zeroes: version %d, %v", v, ok)
	}
	p[511] = 1
	if _, ok := stampOf(p, 1, 100); ok {
		t.Error("torn zeroes taken for whole")
	}
}

// TestCut plays takes over two disks of three sectors and looks at images that
// are cuts and at such that are not.
func TestCut(t *testing.T) {
	type state [2][3]version
	image := func(win *window, s state) error {
		win.after, win.until, win.findings = 0, math.MaxUint64, nil
		clear(win.seen)
		for d := range s {
			for i, v := range s[d] {
				p := make([]byte, sectorSize)
				stamp(p, v, d, int64(i))
				win.see(d, int64(i), p)
			}
		}
		return win.err()
	}
	w := newWorld(3*sectorSize, 3*sectorSize)
	a, b := w.disks[0], w.disks[1]
	a.begin(0, 3, false).done()       // 1
	before := a.begin(0, 1, false)    // 2, under way at the start
	win := w.open()                   //
	x := a.begin(1, 2, false)         // 3
	x.done()                          //
	y := b.begin(0, 2, false)         // 4, after 3
	y.done()                          //
	unfinished := b.begin(2, 3, true) // 5
	win.close()
	for _, c := range []struct {
		name  string
		image state
		good  bool
	}{
		{"start", state{{1, 1, 1}, {0, 0, 0}}, true},
		{"end", state{{2, 3, 1}, {4, 4, 0}}, true},
		{"unfinished at the start, alone", state{{2, 1, 1}, {0, 0, 0}}, true},
		{"the first only", state{{1, 3, 1}, {0, 0, 0}}, true},
		{"the second without the first", state{{1, 1, 1}, {4, 4, 0}}, false},
		{"half of the second", state{{1, 3, 1}, {4, 0, 0}}, true}, // as the write was under way
		{"half of the second without the first", state{{1, 1, 1}, {4, 0, 0}}, false},
		{"older than the start", state{{0, 1, 1}, {0, 0, 0}}, false},
		{"never written", state{{9, 1, 1}, {0, 0, 0}}, false},
	} {
		if err := image(win, c.image); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := image(win, state{{1, 1, 1}, {0, 0, 0}}); err != nil {
		t.Error(err)
	}
	p := make([]byte, 3*sectorSize)
	stamp(p, 2, 0, 0)
	if win.see(0, 0, p[:sectorSize]); win.err() == nil {
		t.Error("an image that changes is not noticed")
	}
	before.done()
	unfinished.done()
	if a.now[0] != before.v || b.now[2] != zeroes {
		t.Errorf("now %v %v", a.now, b.now)
	}
	stamp(p[:512], 2, 0, 0)
	stamp(p[512:1024], 3, 0, 1)
	stamp(p[1024:], 1, 0, 2)
	if err := a.compare(p, 0); err != nil {
		t.Error(err)
	}
	stamp(p[1024:], 3, 0, 2)
	if err := a.compare(p, 0); err == nil {
		t.Error("wrong sector not noticed")
	}
}

// TestRandomPlaces looks at where writers write: only in their own stripes, and
// everywhere.
func TestRandomPlaces(t *testing.T) {
	const size = 6<<20 + 7*sectorSize
	for _, block := range []int64{512, 4096} {
		d := newWorld(size).disks[0]
		owner := make([]int64, d.sectors)
		for n := range int64(3) {
			r := &randomWriter{d: d, m: mix{block: block, writers: 3, largest: maxWrite}, n: n, rnd: rand.New(rand.NewSource(1))}
			for range 20000 {
				from, to := r.place()
				if from < 0 || to > d.sectors || from >= to || to-from > maxWrite/sectorSize || from*sectorSize%block != 0 || to*sectorSize%block != 0 {
					t.Fatalf("sectors %d to %d", from, to)
				}
				for s := from; s < to; s++ {
					if owner[s] != 0 && owner[s] != n+1 {
						t.Fatalf("sector %d is written by %d and %d", s, owner[s], n+1)
					}
					owner[s] = n + 1
				}
			}
		}
		if i := slices.Index(owner[:d.sectors*sectorSize/block*block/sectorSize], 0); i >= 0 {
			t.Errorf("sector %d is never written", i)
		}
	}
}

func newRand(seed int64) *rand.Rand { return rand.New(rand.NewSource(seed)) }

func le64(p []byte) uint64 { return binary.LittleEndian.Uint64(p) }

// digest is the checksum of all of a disk.
func digest(t testing.TB, path string) [32]byte {
	t.Helper()
	h := sha256.New()
	err := scan(path, sizeOf(t, path), func(p []byte, _ int64) error {
		h.Write(p)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}
