package integration

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// Change tracking.

func (d *daemon) cbt(dev control.Device) control.CBTInfo {
	d.t.Helper()
	i, err := d.CBTInfo(ctx(d.t), dev.Name)
	if err != nil {
		d.t.Fatal(err)
	}
	return i
}

// nth is the take of number n in the generation of a map.
func nth(i control.CBTInfo, n int) control.Take {
	return control.Take{Generation: i.Take.Generation, Number: uint64(n)}
}

func (d *daemon) cbtMap(dev control.Device) []byte {
	d.t.Helper()
	var m bytes.Buffer
	i, err := d.CBTMap(ctx(d.t), dev.Name, &m)
	if err != nil || int64(m.Len()) != i.BlockCount {
		d.t.Fatalf("a map of %d bytes for %d blocks: %v", m.Len(), i.BlockCount, err)
	}
	return m.Bytes()
}

// changes are the ranges that changed since a take.
func (d *daemon) changes(dev control.Device, since control.Take) (i control.CBTInfo, ranges []control.Range, err error) {
	i, err = d.CBTChanges(ctx(d.t), control.ChangesRequest{Device: dev.Name, Since: since}, func(x control.Range) error {
		ranges = append(ranges, x)
		return nil
	})
	return i, ranges, err
}

// changed are the numbers of the blocks that changed between a take and the
// last one.
func (d *daemon) changed(dev control.Device, since control.Take) (blocks []int64, err error) {
	d.t.Helper()
	c, ranges, err := d.changes(dev, since)
	if err != nil {
		return nil, err
	}
	for i, r := range ranges {
		at, n := int64(r.Sector)*sectorSize, int64(r.Count)*sectorSize
		if at%c.BlockSize != 0 || n <= 0 || n%c.BlockSize != 0 && at+n != c.DeviceCapacity {
			d.t.Errorf("range %v is not of blocks of %d", r, c.BlockSize)
		}
		if i > 0 && ranges[i-1].Sector+ranges[i-1].Count >= r.Sector {
			d.t.Errorf("ranges %v and %v are not in order and merged", ranges[i-1], r)
		}
		for b := at / c.BlockSize; b*c.BlockSize < at+n; b++ {
			blocks = append(blocks, b)
		}
	}
	return blocks, nil
}

// TestChangesExact is the plain case of I3: the marked blocks are exactly those
// that were written, whatever wrote them; the map stands still while a snapshot
// is held.
func TestChangesExact(t *testing.T) {
	needVM(t)
	const size = 40<<20 + 3<<10 // 641 blocks, the last one short
	disk := loopDisk(t, size, 512)
	d := startDaemon(t)
	dev := d.add(disk, with(queueCounts()[len(queueCounts())-1], 32))
	i := d.cbt(dev)
	if i.BlockSize != 64<<10 || i.BlockCount != 641 || i.DeviceCapacity != size || i.ChangesNumber != 0 {
		t.Fatalf("cbt info %+v", i)
	}
	first := d.take(0, dev)
	if got := d.cbt(dev); got.ChangesNumber != 1 || got.GenerationID != i.GenerationID ||
		*first.Images[0].Take != nth(i, 1) || got.Take != nth(i, 1) {
		t.Fatalf("after the first take: %+v, image %+v", got, first.Images[0])
	}

	f := openDirect(t, dev.Path, unix.O_RDWR)
	buf := ublkPages(t, maxWrite)
	rnd := rand.New(rand.NewSource(11))
	written := map[int64]bool{}
	last := first
	for round := range 6 {
		was := d.cbtMap(dev)
		clear(written)
		for k := range 24 {
			from := rnd.Int63n(size / sectorSize)
			n := min(1+rnd.Int63n(1<<uint(rnd.Intn(11))), size/sectorSize-from)
			if k == 0 { // across the border of the last block
				from, n = size/sectorSize-7, 7
			}
			var err error
			switch p := buf[:n*sectorSize]; k % 6 {
			case 1:
				err = ioctlRange(f.fd, unix.BLKDISCARD, from*sectorSize, n*sectorSize)
			case 2:
				err = f.zero(from*sectorSize, n*sectorSize, k%4 == 0)
			case 3: // reads are no changes
				err = f.read(p, from*sectorSize)
				n = 0
			default:
				err = f.write(p, from*sectorSize)
			}
			if err != nil {
				t.Fatal(err)
			}
			for b := from * sectorSize / i.BlockSize; n > 0 && b <= ((from+n)*sectorSize-1)/i.BlockSize; b++ {
				written[b] = true
			}
		}
		if !slices.Equal(d.cbtMap(dev), was) {
			t.Error("the map changes while a snapshot is held")
		}
		s := d.take(0, dev)
		d.destroy(last.ID)
		last = s
		got, err := d.changed(dev, nth(i, 1+round))
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
		for b, n := range d.cbtMap(dev) {
			if (n == uint8(2+round)) != written[int64(b)] {
				t.Errorf("I3, round %d: block %d has number %d, written %v", round, b, n, written[int64(b)])
			}
		}
	}
	if got := d.cbt(dev); got.ChangesNumber != 7 || got.GenerationID != i.GenerationID {
		t.Errorf("after seven takes: %+v", got)
	}

	// A write to the image makes it differ: it is shown at once.
	clean := int64(slices.IndexFunc(d.cbtMap(dev), func(n byte) bool { return n < 7 }))
	g := openDirect(t, last.Images[0].Path, unix.O_RDWR)
	if err := g.write(buf[:512], clean*i.BlockSize+512); err != nil {
		t.Fatal(err)
	}
	g.close()
	if got, err := d.changed(dev, nth(i, 6)); err != nil || !slices.Contains(got, clean) {
		t.Errorf("changed after a write to block %d of the image: %v, %v", clean, got, err)
	}
	d.destroy(last.ID)
	d.destroy(d.take(0, dev).ID)
	if got, err := d.changed(dev, nth(i, 7)); err != nil || !slices.Contains(got, clean) {
		t.Errorf("I3: the original is not marked where it differs from the image that was copied: %v, %v", got, err)
	}

	// Numbers that do not exist.
	_, err := d.changed(dev, nth(i, 100))
	want(t, err, control.NotFound)
	_, err = d.changed(dev, control.Take{Generation: uuid.New(), Number: 1})
	want(t, err, control.GenerationEnded, "copy the whole device")
	f.close()
	d.remove(dev)

	// A script that kept a take asks again when the history has been lost: as many
	// takes later an increment would be small, and wrong.
	dev = d.add(disk)
	for range 7 {
		d.destroy(d.take(0, dev).ID)
	}
	if a := d.call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", i.Take.String()); a.status != 6 || a.out != "" {
		t.Errorf("since a take of a generation that has ended: %+v", a)
	}
	if a := d.call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", "3"); a.status != 2 || !strings.Contains(a.errout, "GENERATION:N") {
		t.Errorf("since a bare number: %+v", a)
	}
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
	a := d.call("ublk-blksnap", "snapshot", "take", s.ID)
	token := strings.TrimSpace(a.out[strings.LastIndexByte(a.out, ' ')+1:])
	if a.status != 0 || token != d.cbt(dev).Take.String() || token != nth(d.cbt(dev), 8).String() {
		t.Errorf("snapshot take printed %q, the last take is %v", a.out, d.cbt(dev).Take)
	}
	if a := d.call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", token); a.status != 0 || a.out != "" {
		t.Errorf("since the last take: %+v", a)
	}
	if a := d.call("ublk-blksnap", "cbt", "changes", dev.Name, "--since", nth(d.cbt(dev), 9).String()); a.status != 3 {
		t.Errorf("since a take to come: %+v", a)
	}
	d.destroy(s.ID)
	d.remove(dev)
}

// TestChangesUnderLoad is I3 where it is not exact: whatever differs between two
// images that were cut in the midst of writes is marked.
func TestChangesUnderLoad(t *testing.T) {
	needVM(t)
	const size = 24 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t, "tracking_block_minimum_shift=12")
	dev := d.add(disk, with(queueCounts()[len(queueCounts())-1], 32))
	block := d.cbt(dev).BlockSize
	if block != 4096 {
		t.Fatalf("blocks of %d", block)
	}
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stop := w.writers(t, 12, mix{writers: 4, zeroes: true, largest: 128 << 10}, dev.Path)
	last := d.take(64<<10, dev)
	for range int(span(4, 60)) {
		time.Sleep(100 * time.Millisecond)
		s := d.take(4<<10, dev)
		changed, err := d.changed(dev, *last.Images[0].Take)
		if err != nil {
			t.Fatal(err)
		}
		marked := make([]bool, size/block)
		for _, b := range changed {
			marked[b] = true
		}
		old := openDirect(t, last.Images[0].Path, unix.O_RDONLY)
		buf := buffers.Get().(*[]byte)
		differ, missing := 0, 0
		err = scan(s.Images[0].Path, size, func(p []byte, sector int64) error {
			q := (*buf)[:len(p)]
			if err := old.read(q, sector*sectorSize); err != nil {
				return err
			}
			for at := int64(0); at < int64(len(p)); at += block {
				if string(p[at:at+block]) != string(q[at:at+block]) {
					differ++
					if !marked[(sector*sectorSize+at)/block] {
						missing++
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		buffers.Put(buf)
		old.close()
		if missing > 0 || differ == 0 {
			t.Errorf("I3: %d blocks differ, %d of them are not marked", differ, missing)
		}
		d.destroy(last.ID)
		last = s
	}
	d.destroy(last.ID)
	if err := stop(); err != nil {
		t.Error(err)
	}
	d.remove(dev)
}

// TestMistake1NumberWraps takes 300 times and keeps a copy up to date by
// increments alone: it always equals the image. The kernel module told its take
// number 255 under the generation that followed it, so that the next increment
// found nothing.
func TestMistake1NumberWraps(t *testing.T) {
	needVM(t)
	const size = 2<<20 + 1<<10
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t, "tracking_block_minimum_shift=12", "diff_buffer_pool_size=1M")
	dev := d.add(disk, with(1, 4))
	w := newWorld(size)
	if err := w.fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	r := &randomWriter{d: w.disks[0], f: openDirect(t, dev.Path, unix.O_RDWR), m: mix{block: sectorSize, writers: 1, largest: 16 << 10}, rnd: newRand(13)}
	copied := ublkPages(t, (size+4095)&^4095)[:size]
	var last control.SnapshotImage
	var lastID string
	generations, incremental, blocks := 0, 0, 0
	for round := range 300 {
		n := w.writes.Load()
		for range 1 + r.rnd.Intn(3) {
			if err := r.step(); err != nil {
				t.Fatal(err)
			}
		}
		n = w.writes.Load() - n
		s := d.take(16<<10, dev)
		im := s.Images[0]
		info := d.cbt(dev)
		if info.Take != *im.Take {
			t.Fatalf("round %d: map %+v, image %+v", round, info, im)
		}
		image := openDirect(t, im.Path, unix.O_RDONLY)
		take := func(from, n int64) {
			// Direct I/O needs aligned memory, which the copy has at multiples of a sector.
			if err := image.read(copied[from:from+n], from); err != nil {
				t.Fatal(err)
			}
		}
		if last.Take == nil || im.Take.Generation != last.Take.Generation {
			if lastID != "" {
				if last.Take.Number < 254 || im.Take.Number != 0 {
					t.Errorf("round %d: take %d of a generation is followed by take %d of the next", round, last.Take.Number, im.Take.Number)
				}
				// Who asks for an increment must not be told that nothing changed.
				_, err := d.changed(dev, *last.Take)
				want(t, err, control.GenerationEnded, "copy the whole device")
			}
			generations++
			take(0, size)
		} else {
			_, ranges, err := d.changes(dev, *last.Take)
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			if n > 0 && len(ranges) == 0 {
				t.Errorf("I3, round %d: %d writes, and nothing changed", round, n)
			}
			for _, x := range ranges {
				take(int64(x.Sector)*sectorSize, int64(x.Count)*sectorSize)
				blocks += int(x.Count / 8)
			}
			incremental++
		}
		image.close()
		if err := w.disks[0].compare(copied, 0); err != nil {
			t.Fatalf("I3, round %d, take %v: the copy differs: %v", round, im.Take, err)
		}
		if round%32 == 0 {
			if err := w.same(im.Path); err != nil {
				t.Errorf("I1, round %d: %v", round, err)
			}
		}
		if lastID != "" {
			d.destroy(lastID)
		}
		last, lastID = im, s.ID
	}
	if generations != 2 || incremental != 298 {
		t.Errorf("%d generations, %d increments", generations, incremental)
	}
	if blocks > incremental*size/4096/4 {
		t.Errorf("increments of %d blocks on average", blocks/incremental)
	}
	d.destroy(lastID)
	r.f.close()
	d.remove(dev)
}

// TestMarkDirty marks by hand: all ranges or none.
func TestMarkDirty(t *testing.T) {
	needVM(t)
	const size = 8 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	d.destroy(d.take(0, dev).ID)
	mark := func(r ...control.Range) error {
		return d.MarkDirty(ctx(t), control.MarkRequest{Device: dev.Name, Ranges: r})
	}
	shown := func() []int64 {
		blocks, err := d.changed(dev, nth(d.cbt(dev), 0))
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
		want(t, mark(r...), control.Invalid)
		if got := shown(); !slices.Equal(got, before) {
			t.Errorf("a refused request with %v marked %v", r, got)
		}
	}
	if err := mark(control.Range{Sector: 129, Count: 1}, control.Range{Sector: 5*128 - 1, Count: 2}, control.Range{Sector: size/512 - 1, Count: 1}); err != nil {
		t.Fatal(err)
	}
	d.destroy(d.take(0, dev).ID)
	got, err := d.changed(dev, nth(d.cbt(dev), 1))
	if want := []int64{1, 4, 5, 127}; err != nil || !slices.Equal(got, want) {
		t.Errorf("marked %v, %v, want %v", got, err, want)
	}
	d.remove(dev)
}

// TestTrackingParameters: block size and count follow from the parameters.
func TestTrackingParameters(t *testing.T) {
	needVM(t)
	disk := loopDisk(t, 64<<20, 512)
	for _, c := range []struct {
		params []string
		block  int64
	}{
		{nil, 64 << 10},
		{[]string{"tracking_block_minimum_shift=20"}, 1 << 20},
		{[]string{"tracking_block_minimum_shift=12", "tracking_block_maximum_count=1000"}, 128 << 10},
		{[]string{"tracking_block_minimum_shift=12", "tracking_block_maximum_count=1000", "tracking_block_maximum_shift=14"}, 16 << 10},
	} {
		d := startDaemon(t, c.params...)
		dev := d.add(disk)
		if got := d.cbt(dev); got.BlockSize != c.block || got.BlockCount != (64<<20+c.block-1)/c.block {
			t.Errorf("%v: %+v, want blocks of %d", c.params, got, c.block)
		}
		d.remove(dev)
		d.stop()
	}
	// The same through the program, as text.
	d := startDaemon(t)
	dev := d.add(disk)
	file := filepath.Join(t.TempDir(), "map")
	if a := d.call("blksnap", "readcbtmap", "-d", disk, "-f", file); a.status != 0 || a.out != "" {
		t.Errorf("readcbtmap: %+v", a)
	}
	if a := d.call("blksnap", "readcbtmap", "-d", "/dev/null", "-f", file); a.status != 1 || a.errout == "" {
		t.Errorf("readcbtmap of no disk: %+v", a)
	}
	if _, err := d.CBTMap(ctx(t), "nobody", io.Discard); !errors.Is(err, unix.ENODEV) {
		t.Errorf("map of a device without a filter: %v", err)
	}
	d.remove(dev)
}
