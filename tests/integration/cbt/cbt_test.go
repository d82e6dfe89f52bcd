package cbt

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// nth is the take of number n in the generation of a map.
func nth(i control.CBTInfo, n int) control.Take {
	return control.Take{Generation: i.Take.Generation, Number: uint64(n)}
}

// TestChangesExact is the plain case of I3: the marked blocks are exactly those
// that were written, whatever wrote them; the map stands still while a snapshot
// is held.
func TestChangesExact(t *testing.T) {
	guest.NeedEither(t)
	const size = 40<<20 + 3<<10 // 641 blocks, the last one short
	disk := guest.LoopDisk(t, size, 512)
	d := program.Start(t)
	dev := d.Add(disk, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 32))
	i := d.CBT(dev)
	if i.BlockSize != 64<<10 || i.BlockCount != 641 || i.DeviceCapacity != size || i.ChangesNumber != 0 {
		t.Fatalf("cbt info %+v", i)
	}
	first := d.Take(0, dev)
	if got := d.CBT(dev); got.ChangesNumber != 1 || got.GenerationID != i.GenerationID ||
		*first.Images[0].Take != nth(i, 1) || got.Take != nth(i, 1) {
		t.Fatalf("after the first take: %+v, image %+v", got, first.Images[0])
	}

	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, direct.BufferSize)
	rnd := rand.New(rand.NewSource(11))
	written := map[int64]bool{}
	last := first
	for round := range 6 {
		was := d.Map(dev)
		clear(written)
		for k := range 24 {
			from := rnd.Int63n(size / stamp.SectorSize)
			n := min(1+rnd.Int63n(1<<uint(rnd.Intn(11))), size/stamp.SectorSize-from)
			if k == 0 { // across the border of the last block
				from, n = size/stamp.SectorSize-7, 7
			}
			var err error
			switch p := buf[:n*stamp.SectorSize]; k % 6 {
			case 1:
				err = guest.IoctlRange(f.FD, unix.BLKDISCARD, from*stamp.SectorSize, n*stamp.SectorSize)
			case 2:
				err = f.Zero(from*stamp.SectorSize, n*stamp.SectorSize, k%4 == 0)
			case 3: // reads are no changes
				err = f.ReadAt(p, from*stamp.SectorSize)
				n = 0
			default:
				err = f.WriteAt(p, from*stamp.SectorSize)
			}
			if err != nil {
				t.Fatal(err)
			}
			for b := from * stamp.SectorSize / i.BlockSize; n > 0 && b <= ((from+n)*stamp.SectorSize-1)/i.BlockSize; b++ {
				written[b] = true
			}
		}
		if !slices.Equal(d.Map(dev), was) {
			t.Error("the map changes while a snapshot is held")
		}
		s := d.Take(0, dev)
		d.Destroy(last.ID)
		last = s
		got, err := d.Changed(dev, nth(i, 1+round))
		if err != nil {
			t.Fatal(err)
		}
		var want []int64
		for b := range written {
			want = append(want, b)
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("I3, round %d: changed %v, written %v", round, got, want)
		}
		for b, n := range d.Map(dev) {
			if (n == uint8(2+round)) != written[int64(b)] {
				t.Errorf("I3, round %d: block %d has number %d, written %v", round, b, n, written[int64(b)])
			}
		}
	}
	if got := d.CBT(dev); got.ChangesNumber != 7 || got.GenerationID != i.GenerationID {
		t.Errorf("after seven takes: %+v", got)
	}

	// A write to the image makes it differ: it is shown at once.
	clean := int64(slices.IndexFunc(d.Map(dev), func(n byte) bool { return n < 7 }))
	g := direct.MustOpen(t, last.Images[0].Path, unix.O_RDWR)
	if err := g.WriteAt(buf[:512], clean*i.BlockSize+512); err != nil {
		t.Fatal(err)
	}
	g.Close()
	if got, err := d.Changed(dev, nth(i, 6)); err != nil || !slices.Contains(got, clean) {
		t.Errorf("changed after a write to block %d of the image: %v, %v", clean, got, err)
	}
	d.Destroy(last.ID)
	d.Destroy(d.Take(0, dev).ID)
	if got, err := d.Changed(dev, nth(i, 7)); err != nil || !slices.Contains(got, clean) {
		t.Errorf("I3: the original is not marked where it differs from the image that was copied: %v, %v", got, err)
	}

	// Numbers that do not exist.
	_, err := d.Changed(dev, nth(i, 100))
	program.WantError(t, err, control.NotFound)
	_, err = d.Changed(dev, control.Take{Generation: uuid.New(), Number: 1})
	program.WantError(t, err, control.GenerationEnded, "copy the whole device")
	f.Close()
	d.Remove(dev)

	// A script that kept a take asks again when the history has been lost, because
	// somebody wrote to the disk without the filter: as many takes later an increment
	// would be small, and wrong.
	behind := direct.MustOpen(t, disk, unix.O_RDWR)
	if err := behind.WriteAt(buf[:512], 512); err != nil {
		t.Fatal(err)
	}
	behind.Close()
	dev = d.Add(disk)
	if dev.History.Continued || dev.History.Reason != control.HistoryWritten {
		t.Errorf("added again after a write past the filter: history %+v", dev.History)
	}
	for range 7 {
		d.Destroy(d.Take(0, dev).ID)
	}
	if a := d.Call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", i.Take.String()); a.Status != 6 || a.Out != "" {
		t.Errorf("since a take of a generation that has ended: %+v", a)
	}
	if a := d.Call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", "3"); a.Status != 2 || !strings.Contains(a.Err, "GENERATION:N") {
		t.Errorf("since a bare number: %+v", a)
	}
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
	if a := d.Call("ublk-blksnap", "snapshot", "take", s.ID); a.Status != 0 || a.Out != d.Show(s.ID).Images[0].Link+"\n" {
		t.Errorf("snapshot take: %+v", a)
	}
	a := d.Call("ublk-blksnap", "snapshot", "info", s.ID, "--field", "take")
	token := strings.TrimSpace(a.Out)
	if a.Status != 0 || token != d.CBT(dev).Take.String() || token != nth(d.CBT(dev), 8).String() {
		t.Errorf("snapshot info printed %q, the last take is %v", a.Out, d.CBT(dev).Take)
	}
	if a := d.Call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", token); a.Status != 0 || a.Out != "" {
		t.Errorf("since the last take: %+v", a)
	}
	if a := d.Call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", nth(d.CBT(dev), 9).String()); a.Status != 3 {
		t.Errorf("since a take to come: %+v", a)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}

// TestChangesUnderLoad is I3 where it is not exact: whatever differs between two
// images that were cut in the midst of writes is marked.
func TestChangesUnderLoad(t *testing.T) {
	guest.NeedEither(t)
	const size = 24 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t, "tracking_block_minimum_shift=12")
	dev := d.Add(disk, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 32))
	block := d.CBT(dev).BlockSize
	if block != 4096 {
		t.Fatalf("blocks of %d", block)
	}
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stop := w.StartWriters(t, 12, stamp.Mix{Writers: 4, Zeroes: true, Largest: 128 << 10}, dev.Path)
	last := d.Take(64<<10, dev)
	for range int(guest.Span(4, 60)) {
		time.Sleep(100 * time.Millisecond)
		s := d.Take(4<<10, dev)
		changed, err := d.Changed(dev, *last.Images[0].Take)
		if err != nil {
			t.Fatal(err)
		}
		marked := make([]bool, size/block)
		for _, b := range changed {
			marked[b] = true
		}
		old := direct.MustOpen(t, last.Images[0].Path, unix.O_RDONLY)
		buf := direct.Buffers.Get().(*[]byte)
		differ, missing := 0, 0
		err = direct.Scan(s.Images[0].Path, size, func(p []byte, sector int64) error {
			q := (*buf)[:len(p)]
			if err := old.ReadAt(q, sector*stamp.SectorSize); err != nil {
				return err
			}
			for at := int64(0); at < int64(len(p)); at += block {
				if string(p[at:at+block]) != string(q[at:at+block]) {
					differ++
					if !marked[(sector*stamp.SectorSize+at)/block] {
						missing++
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		direct.Buffers.Put(buf)
		old.Close()
		if missing > 0 || differ == 0 {
			t.Errorf("I3: %d blocks differ, %d of them are not marked", differ, missing)
		}
		d.Destroy(last.ID)
		last = s
	}
	d.Destroy(last.ID)
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.Remove(dev)
}

// TestNumberWraps takes past the end of a generation and keeps a copy up to date by
// increments alone: it always equals the image. The kernel module told its take
// number 255 under the generation that followed it, so that the next increment
// found nothing.
func TestNumberWraps(t *testing.T) {
	guest.NeedEither(t)
	const size, perGeneration = 2<<20 + 1<<10, 255
	rounds, skipped := 275, 0
	if !guest.Long() {
		rounds, skipped = 40, 225
	}
	p := plug(t, size)
	state := filepath.Join(t.TempDir(), "state")
	d := program.Start(t, "state_dir="+state, "tracking_block_minimum_shift=12", "diff_buffer_pool_size=1M")
	dev := d.Add(p.disk, program.Queues(1, 4))
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewSource(13))
	write := func() int64 {
		f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
		defer f.Close()
		n := w.Writes.Load()
		r := stamp.NewWriter(w.Disks[0], f, stamp.Mix{Writers: 1, Largest: 16 << 10}, 0, rnd.Int63())
		for range 1 + rnd.Intn(3) {
			if err := r.Step(); err != nil {
				t.Fatal(err)
			}
		}
		return w.Writes.Load() - n
	}
	copied := direct.Pages(t, (size+4095)&^4095)[:size]
	var last control.SnapshotImage
	var lastID string
	generations, incremental, blocks := 0, 0, 0
	for round := range rounds {
		if round == 20 && skipped > 0 {
			d.Destroy(lastID)
			lastID = ""
			d.Remove(dev)
			takeMore(t, state, skipped)
			dev = d.Add(p.disk, program.Queues(1, 4))
			wants(t, "after many takes", dev, "", "goes on")
		}
		n := write()
		s := d.Take(16<<10, dev)
		im := s.Images[0]
		info := d.CBT(dev)
		if info.Take != *im.Take {
			t.Fatalf("round %d: map %+v, image %+v", round, info, im)
		}
		image := direct.MustOpen(t, im.Path, unix.O_RDONLY)
		take := func(from, n int64) {
			// Direct I/O needs aligned memory, which the copy has at multiples of a sector.
			if err := image.ReadAt(copied[from:from+n], from); err != nil {
				t.Fatal(err)
			}
		}
		if last.Take == nil || im.Take.Generation != last.Take.Generation {
			if last.Take != nil {
				if last.Take.Number < perGeneration-1 || im.Take.Number != 0 {
					t.Errorf("round %d: take %d of a generation is followed by take %d of the next", round, last.Take.Number, im.Take.Number)
				}
				// Who asks for an increment must not be told that nothing changed.
				_, err := d.Changed(dev, *last.Take)
				program.WantError(t, err, control.GenerationEnded, "copy the whole device")
				if h := info.History; h.Reason != control.HistoryNumbers || !strings.Contains(h.Text, last.Take.Generation.String()) {
					t.Errorf("round %d: why there is a new generation: %+v", round, h)
				}
			}
			generations++
			take(0, size)
		} else {
			_, ranges, err := d.Changes(dev, *last.Take)
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			if n > 0 && len(ranges) == 0 {
				t.Errorf("I3, round %d: %d writes, and nothing changed", round, n)
			}
			for _, x := range ranges {
				take(int64(x.Sector)*stamp.SectorSize, int64(x.Count)*stamp.SectorSize)
				blocks += int(x.Count / 8)
			}
			incremental++
		}
		image.Close()
		if err := w.Disks[0].Compare(copied, 0); err != nil {
			t.Fatalf("I3, round %d, take %v: the copy differs: %v", round, im.Take, err)
		}
		if round%32 == 0 {
			if err := w.Same(im.Path); err != nil {
				t.Errorf("I1, round %d: %v", round, err)
			}
		}
		if lastID != "" {
			d.Destroy(lastID)
		}
		last, lastID = im, s.ID
	}
	if want := 1 + (rounds+skipped)/perGeneration; generations != want || incremental != rounds-want {
		t.Errorf("%d generations, %d increments", generations, incremental)
	}
	if blocks > incremental*size/4096/4 {
		t.Errorf("increments of %d blocks on average", blocks/incremental)
	}
	d.Destroy(lastID)
	d.Remove(dev)
}

// takeMore makes the change map that is kept in the directory one that has n more
// takes, with nothing written between them.
func takeMore(t *testing.T, state string, n int) {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(state, "*.json"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records %v, %v", records, err)
	}
	text, err := os.ReadFile(records[0])
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ = bytes.Cut(text, []byte("\n"))
	var kept cbtstate.Record
	if err := json.Unmarshal(text, &kept); err != nil {
		t.Fatal(err)
	}
	store, err := cbtstate.Open("/", state, false)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	r, saved, err := store.Find(kept.Identity, kept.Name, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	m, err := cbtmap.NewMemory(r.Size, cbtmap.Params{MinimumShift: 12, MaximumShift: 12, MaximumCount: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Load(saved); err != nil {
		t.Fatal(err)
	}
	for range n {
		m.Switch()
	}
	if saved, err = m.Save(); err != nil {
		t.Fatal(err)
	}
	if err := store.Save(*r, saved, func() bool { return true }); err != nil {
		t.Fatal(err)
	}
}

// TestMarkDirty marks by hand: all ranges or none.
func TestMarkDirty(t *testing.T) {
	guest.NeedEither(t)
	const size = 8 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	d.Destroy(d.Take(0, dev).ID)
	mark := func(r ...control.Range) error {
		return d.MarkDirty(guest.Context(t), control.MarkRequest{Device: dev.Name, Ranges: r})
	}
	shown := func() []int64 {
		blocks, err := d.Changed(dev, nth(d.CBT(dev), 0))
		if err != nil {
			t.Fatal(err)
		}
		return blocks
	}
	before := shown()
	for _, r := range [][]control.Range{
		{{Sector: 0, Count: 8}, {Sector: size / 512, Count: 1}},
		{{Sector: 128, Count: 8}, {Sector: size/512 - 1, Count: 2}},
		{{Sector: 256, Count: 1}, {Sector: 1 << 60, Count: 1 << 60}},
		{{Sector: 256, Count: 1}, {Sector: 8, Count: 1<<64 - 4}},
		{{Sector: 256, Count: 1}, {Sector: 8, Count: 0}},
	} {
		program.WantError(t, mark(r...), control.Invalid)
		if got := shown(); !slices.Equal(got, before) {
			t.Errorf("a refused request with %v marked %v", r, got)
		}
	}
	if err := mark(control.Range{Sector: 129, Count: 1}, control.Range{Sector: 5*128 - 1, Count: 2}, control.Range{Sector: size/512 - 1, Count: 1}); err != nil {
		t.Fatal(err)
	}
	d.Destroy(d.Take(0, dev).ID)
	got, err := d.Changed(dev, nth(d.CBT(dev), 1))
	if want := []int64{1, 4, 5, 127}; err != nil || !slices.Equal(got, want) {
		t.Errorf("marked %v, %v, want %v", got, err, want)
	}
	d.Remove(dev)
}

// TestTrackingParameters: block size and count follow from the parameters.
func TestTrackingParameters(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.LoopDisk(t, 64<<20, 512)
	for _, c := range []struct {
		params []string
		block  int64
	}{
		{nil, 64 << 10},
		{[]string{"tracking_block_minimum_shift=20"}, 1 << 20},
		{[]string{"tracking_block_minimum_shift=12", "tracking_block_maximum_count=1000"}, 128 << 10},
		{[]string{"tracking_block_minimum_shift=12", "tracking_block_maximum_count=1000", "tracking_block_maximum_shift=14"}, 16 << 10},
	} {
		d := program.Start(t, c.params...)
		dev := d.Add(disk)
		if got := d.CBT(dev); got.BlockSize != c.block || got.BlockCount != (64<<20+c.block-1)/c.block {
			t.Errorf("%v: %+v, want blocks of %d", c.params, got, c.block)
		}
		d.Remove(dev)
		d.StopAndWait()
	}
	// The same through the program, as text.
	d := program.Start(t)
	dev := d.Add(disk)
	file := filepath.Join(t.TempDir(), "map")
	if a := d.Call("blksnap", "readcbtmap", "-d", disk, "-f", file); a.Status != 0 || a.Out != "" {
		t.Errorf("readcbtmap: %+v", a)
	}
	if a := d.Call("blksnap", "readcbtmap", "-d", "/dev/null", "-f", file); a.Status != 1 || a.Err == "" {
		t.Errorf("readcbtmap of no disk: %+v", a)
	}
	if _, err := d.CBTMap(guest.Context(t), "nobody", io.Discard); !errors.Is(err, unix.ENODEV) {
		t.Errorf("map of a device without a filter: %v", err)
	}
	d.Remove(dev)
}

// TestEveryRangeMarked marks several ranges by blksnap's own command; TestMarkDirty
// does the same through the API. The kernel module marked the first of them as
// often as there were ranges.
func TestEveryRangeMarked(t *testing.T) {
	guest.NeedEither(t)
	const size = 4 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	file := filepath.Join(t.TempDir(), "map")
	marked := func() []int {
		d.Destroy(d.Take(0, dev).ID)
		if a := d.Call("blksnap", "readcbtmap", "-d", disk, "-f", file); a.Status != 0 {
			t.Fatalf("readcbtmap: %+v", a)
		}
		m, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := d.CBT(dev).ChangesNumber
		var out []int
		for i, x := range m {
			if x == n {
				out = append(out, i)
			}
		}
		return out
	}
	marked()
	if a := d.Call("blksnap", "markdirtyblock", "-d", disk, "-r", "0:1", "1280:128", "8191:1"); a.Status != 0 || a.Out != "" {
		t.Errorf("markdirtyblock: %+v", a)
	}
	if got := marked(); !slices.Equal(got, []int{0, 10, 63}) {
		t.Errorf("marked %v", got)
	}
	if a := d.Call("blksnap", "markdirtyblock", "-d", disk, "-r", "0:1", "8191:2"); a.Status != 1 || a.Err == "" {
		t.Errorf("markdirtyblock beyond the end: %+v", a)
	}
	if got := marked(); len(got) > 0 {
		t.Errorf("a refused request marked %v", got)
	}
	d.Remove(dev)
}
