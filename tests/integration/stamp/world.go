package stamp

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
)

// World is some disks under random writers.
type World struct {
	Disks []*Disk

	mu       sync.Mutex
	tick     uint64
	last     Version
	inFlight map[*Write]bool
	windows  map[*Window]bool

	Writes, reads atomic.Int64 // that were done
}

// Disk is what one disk holds.
type Disk struct {
	w       *World
	number  int
	sectors int64
	now     []Version // by sector, of writes that are done
}

// Write is one write.
type Write struct {
	disk       *Disk
	From, To   int64   // sectors
	Version    Version // unique, also that of a write of zeroes
	content    Version // Version, or Zeroes
	start, end uint64  // ticks; end is 0 while it is under way
}

// Window is the time of one take.
type Window struct {
	w      *World
	before [][]Version // by disk
	writes []*Write    // under way when it was opened, or begun until it was closed
	chains []map[int64][]*Write

	mu       sync.Mutex
	seen     map[[2]int64]Version // what images show of sectors that were written in the window
	after    uint64               // the cut came after this tick
	until    uint64               // and before this one
	afterBy  string
	untilBy  string
	findings []string
}

// NewWorld is a world of disks with sizes in bytes, all zeroes.
func NewWorld(sizes ...int64) *World {
	w := &World{inFlight: map[*Write]bool{}, windows: map[*Window]bool{}}
	for i, size := range sizes {
		n := size / SectorSize
		w.Disks = append(w.Disks, &Disk{w: w, number: i, sectors: n, now: make([]Version, n)})
	}
	return w
}

// Fork is a world of its own with the same disks, which hold what w's do now. Its
// writes are none of w's.
func (w *World) Fork() *World {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := &World{inFlight: map[*Write]bool{}, windows: map[*Window]bool{}, last: w.last + 1<<32}
	for _, d := range w.Disks {
		f.Disks = append(f.Disks, &Disk{w: f, number: d.number, sectors: d.sectors, now: slices.Clone(d.now)})
	}
	return f
}

// Begin registers a write of sectors [from, to), before it is submitted. Nobody
// else may write any of them until done.
func (d *Disk) Begin(from, to int64, zero bool) *Write {
	w := d.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	w.tick++
	x := &Write{disk: d, From: from, To: to, Version: w.last, content: w.last, start: w.tick}
	if zero {
		x.content = Zeroes
	}
	w.inFlight[x] = true
	for win := range w.windows {
		win.writes = append(win.writes, x)
	}
	return x
}

// Done registers that a write has been acknowledged.
func (x *Write) Done() {
	w := x.disk.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tick++
	x.end = w.tick
	delete(w.inFlight, x)
	for s := x.From; s < x.To; s++ {
		x.disk.now[s] = x.content
	}
	w.Writes.Add(1)
}

// Open opens a window for a take that begins now.
func (w *World) Open() *Window {
	w.mu.Lock()
	defer w.mu.Unlock()
	win := &Window{w: w, until: math.MaxUint64, seen: map[[2]int64]Version{}}
	for _, d := range w.Disks {
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

// Sectors is the size of a disk in sectors.
func (win *Window) Sectors(disk int) int64 { return win.w.Disks[disk].sectors }

// Close ends the window: the take is done.
func (win *Window) Close() {
	w := win.w
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.windows, win)
	w.tick++
	win.until, win.untilBy = w.tick, "the end of the take"
	slices.SortFunc(win.writes, func(a, b *Write) int { return int(int64(a.Version) - int64(b.Version)) })
	for i := range win.chains {
		win.chains[i] = map[int64][]*Write{}
	}
	for _, x := range win.writes {
		chain := win.chains[x.disk.number]
		for s := x.From; s < x.To; s++ {
			chain[s] = append(chain[s], x)
		}
	}
}

// See takes note of what the image of a disk shows, from the given sector on.
func (win *Window) See(disk int, sector int64, p []byte) {
	for ; len(p) > 0; p, sector = p[SectorSize:], sector+1 {
		v, ok := Of(p[:SectorSize], disk, sector)
		chain := win.chains[disk][sector]
		before := win.before[disk][sector]
		if ok && len(chain) == 0 && v == before {
			continue
		}
		win.judge(disk, sector, v, ok, before, chain)
	}
}

func (win *Window) judge(disk int, sector int64, v Version, ok bool, before Version, chain []*Write) {
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
		win.untilBy = fmt.Sprintf("disk %d, sector %d shows version %d, not %d", disk, sector, v, chain[i+1].Version)
	}
}

func (win *Window) find(format string, args ...any) {
	if len(win.findings) < 8 {
		win.findings = append(win.findings, fmt.Sprintf(format, args...))
	}
}

// Err is what speaks against the images seen so far being one cut.
func (win *Window) Err() error {
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

// Compare says where the disk does not hold what was written last. No write may
// be under way.
func (d *Disk) Compare(p []byte, sector int64) error {
	for ; len(p) > 0; p, sector = p[SectorSize:], sector+1 {
		if v, ok := Of(p[:SectorSize], d.number, sector); !ok || v != d.now[sector] {
			return fmt.Errorf("disk %d, sector %d: version %d (whole: %v), want %d", d.number, sector, v, ok, d.now[sector])
		}
	}
	return nil
}

// Check reads all of the images of a snapshot, in the order of the world's
// disks, and says whether they are the cut of win.
func (win *Window) Check(images ...string) error {
	for i, path := range images {
		err := direct.Scan(path, win.w.Disks[i].sectors*SectorSize, func(p []byte, sector int64) error {
			win.See(i, sector, p)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return win.Err()
}

// Same says whether the disks at paths hold exactly what was written last.
func (w *World) Same(paths ...string) error {
	for i, path := range paths {
		d := w.Disks[i]
		if err := direct.Scan(path, d.sectors*SectorSize, d.Compare); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}
