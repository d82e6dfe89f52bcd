package cbtmap

import (
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// sectorBlocks makes every sector a block.
var sectorBlocks = Params{MinimumShift: 9, MaximumShift: 9, MaximumCount: 1}

func newMap(t testing.TB, sectors int64) *Map {
	t.Helper()
	m, err := NewMemory(sectors*sector.Size, sectorBlocks)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func info(t testing.TB, m *Map) Info {
	t.Helper()
	i, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// readAll is the readable map.
func readAll(t testing.TB, m *Map) []byte {
	t.Helper()
	i := info(t, m)
	b := make([]byte, i.BlockCount)
	if n, err := m.ReadMap(i.GenerationID, b, 0); n != len(b) || err != nil {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// changedBlocks are the blocks that readers are told, found through Changes.
func changedBlocks(t testing.TB, m *Map, generation uuid.UUID, since uint8) []bool {
	t.Helper()
	seq, err := m.Changes(generation, uint64(since))
	if err != nil {
		t.Fatal(err)
	}
	i := info(t, m)
	set := make([]bool, i.BlockCount)
	end := int64(-1)
	for r, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		if r.Length <= 0 || r.Offset <= end || r.Offset%i.BlockSize != 0 || r.Offset+r.Length > i.DeviceCapacity {
			t.Fatalf("range %+v after one that ends at %d", r, end)
		}
		if end = r.Offset + r.Length; end%i.BlockSize != 0 && end != i.DeviceCapacity {
			t.Fatalf("range %+v ends within a block", r)
		}
		for b := r.Offset / i.BlockSize; b*i.BlockSize < end; b++ {
			set[b] = true
		}
	}
	return set
}

func TestMarkedBlocksAreExactlyTheTouchedOnes(t *testing.T) {
	// 21 blocks of 4 KiB, the last one of a single sector.
	const size = 20*4096 + 512
	for _, c := range []struct {
		off, length int64
		first, last int // blocks; last < first: none
	}{
		{0, 1, 0, 0},
		{0, 4096, 0, 0},
		{4095, 1, 0, 0},
		{4095, 2, 0, 1},
		{4096, 4096, 1, 1},
		{6 * 4096, 3 * 4096, 6, 8}, // over a word's edge
		{7*4096 + 512, 4096 * 9, 7, 16},
		{20 * 4096, 512, 20, 20},
		{0, size, 0, 20},
		{size, 0, 1, 0},
		{5, 0, 1, 0},
	} {
		m, err := NewMemory(size, Params{12, 12, 1})
		if err != nil {
			t.Fatal(err)
		}
		m.Mark(c.off, c.length)
		m.Switch()
		for b, v := range readAll(t, m) {
			if (v == 1) != (b >= c.first && b <= c.last) {
				t.Errorf("mark %d+%d: block %d has %d", c.off, c.length, b, v)
			}
		}
		if pad := m.memory[headerSize+21 : headerSize+64]; slices.Max(pad) != 0 {
			t.Errorf("mark %d+%d: wrote behind the map", c.off, c.length)
		}
	}
}

func TestMarkOffTheDeviceCorrupts(t *testing.T) {
	for _, c := range [][2]int64{{-1, 1}, {0, -1}, {0, 10*512 + 1}, {10 * 512, 1}, {10*512 - 1, 2},
		{math.MaxInt64, 1}, {1, math.MaxInt64}, {math.MinInt64, math.MinInt64}} {
		m := newMap(t, 10)
		m.Mark(c[0], c[1])
		if !m.Corrupted() {
			t.Errorf("mark %d+%d: map is not corrupted", c[0], c[1])
		}
	}
}

func TestImageWriteOffTheDeviceIsClipped(t *testing.T) {
	for _, c := range []struct {
		off, length int64
		want        []byte
	}{
		{-512, 1024, []byte{1, 0, 0}},
		{1024, 4096, []byte{0, 0, 1}},
		{1024, math.MaxInt64, []byte{0, 0, 1}},
		{1536, 512, []byte{0, 0, 0}},
		{math.MinInt64, math.MinInt64, []byte{0, 0, 0}},
		{-1, math.MinInt64, []byte{0, 0, 0}},
		{512, -512, []byte{0, 0, 0}},
		{math.MinInt64, math.MaxInt64, []byte{0, 0, 0}},
	} {
		m := newMap(t, 3)
		m.MarkBoth(c.off, c.length)
		m.Switch()
		if got := readAll(t, m); !slices.Equal(got, c.want) {
			t.Errorf("image write %d+%d: %v, want %v", c.off, c.length, got, c.want)
		}
	}
}

func TestNumbersFollowTheTable(t *testing.T) {
	m := newMap(t, 4)
	first := info(t, m)
	if first.ChangesNumber != 0 || first.DeviceCapacity != 2048 || first.BlockSize != 512 || first.BlockCount != 4 {
		t.Fatalf("new map: %+v", first)
	}
	seen := map[uuid.UUID]bool{first.GenerationID: true}
	generation := first.GenerationID
	for take := 1; take <= 600; take++ {
		m.Mark(0, 512)
		got := m.Switch()
		if got != info(t, m) {
			t.Fatalf("take %d: switch says %+v, info %+v", take, got, info(t, m))
		}
		if take%255 == 0 {
			if seen[got.GenerationID] {
				t.Fatalf("take %d: generation did not change", take)
			}
			generation = got.GenerationID
			seen[generation] = true
		}
		if got.GenerationID != generation || int(got.ChangesNumber) != take%255 {
			t.Fatalf("take %d: %+v", take, got)
		}
		if b := readAll(t, m); int(b[0]) != take%255 || b[1] != 0 {
			t.Fatalf("take %d: map %v", take, b)
		}
	}
}

// At the wrap blksnap reports number 255 under the new generation. An increment
// from that base finds nothing for the next 255 takes.
func TestIncrementAfterTheWrapIsNotEmpty(t *testing.T) {
	m := newMap(t, 4)
	var base Info
	for range 255 {
		base = m.Switch()
	}
	m.Mark(1024, 512)
	now := m.Switch()
	if now.GenerationID != base.GenerationID {
		t.Fatal("the wrap take is no base for the next one")
	}
	if got := changedBlocks(t, m, base.GenerationID, base.ChangesNumber); !slices.Equal(got, []bool{false, false, true, false}) {
		t.Errorf("changed since the wrap: %v", got)
	}
}

func TestReadersOfAnotherGenerationAreRefused(t *testing.T) {
	for name, end := range map[string]func(*Map){
		"wrap": func(m *Map) {
			for range 255 {
				m.Switch()
			}
		},
		"new generation": (*Map).NewGeneration,
		"resize": func(m *Map) {
			if err := m.Resize(1024); err != nil {
				t.Error(err)
			}
		},
		"corruption and take": func(m *Map) { m.SetCorrupted(); m.Switch() },
	} {
		m := newMap(t, 4)
		old := info(t, m).GenerationID
		end(m)
		if _, err := m.Changes(old, 0); !errors.Is(err, ErrGeneration) {
			t.Errorf("%s: changes: %v", name, err)
		}
		if n, err := m.ReadMap(old, make([]byte, 1), 0); n != 0 || !errors.Is(err, ErrGeneration) {
			t.Errorf("%s: read map: %d, %v", name, n, err)
		}
		if i := info(t, m); i.ChangesNumber != 0 || i.GenerationID == old {
			t.Errorf("%s: %+v", name, i)
		}
	}
}

func TestGenerationOutsideATakeCountsAllAsChanged(t *testing.T) {
	m := newMap(t, 4)
	m.Switch()
	held := func() []bool { // what a reader of the held image keeps as its base
		i := info(t, m)
		m.Mark(512, 512)
		m.Switch()
		return changedBlocks(t, m, i.GenerationID, i.ChangesNumber)
	}
	m.Mark(0, 512)
	m.NewGeneration()
	if got := held(); slices.Contains(got, false) {
		t.Errorf("after a new generation: %v", got)
	}
	if err := m.Resize(6 * 512); err != nil {
		t.Fatal(err)
	}
	if got := held(); len(got) != 6 || slices.Contains(got, false) {
		t.Errorf("after a resize: %v", got)
	}
	if got := held(); !slices.Equal(got, []bool{false, true, false, false, false, false}) {
		t.Errorf("a take later: %v", got)
	}
}

func TestCorruptedMapIsRefusedUntilTheNextTake(t *testing.T) {
	m := newMap(t, 4)
	m.Switch()
	m.Mark(0, 512)
	m.SetCorrupted()
	i, err := m.Info()
	if !errors.Is(err, ErrCorrupted) || i.DeviceCapacity != 2048 {
		t.Errorf("info: %+v, %v", i, err)
	}
	if _, err := m.Changes(i.GenerationID, 0); !errors.Is(err, ErrCorrupted) {
		t.Errorf("changes: %v", err)
	}
	if _, err := m.ReadMap(i.GenerationID, make([]byte, 4), 0); !errors.Is(err, ErrCorrupted) {
		t.Errorf("read map: %v", err)
	}
	if err := m.MarkDirty([]Sectors{{0, 1}}); !errors.Is(err, ErrCorrupted) {
		t.Errorf("mark dirty: %v", err)
	}
	if _, err := m.Save(); !errors.Is(err, ErrCorrupted) {
		t.Errorf("save: %v", err)
	}
	if m, err = Adopt(m.Memory()); err != nil || !m.Corrupted() {
		t.Fatalf("adopted: %v; the corruption is forgotten", err)
	}
	if now := m.Switch(); m.Corrupted() || now.GenerationID == i.GenerationID || now.ChangesNumber != 0 {
		t.Errorf("after the take: corrupted %v, %+v", m.Corrupted(), now)
	}
	m.SetCorrupted()
	if m.NewGeneration(); m.Corrupted() {
		t.Error("corrupted after a new generation")
	}
	m.SetCorrupted()
	if err := m.Resize(1024); err != nil || m.Corrupted() {
		t.Errorf("corrupted after a resize: %v", err)
	}
	if err := m.Resize(1); !errors.Is(err, ErrSize) || !m.Corrupted() {
		t.Errorf("failed resize: %v, corrupted %v", err, m.Corrupted())
	}
}

func TestImageWritesAndDirtyRangesMarkBothMaps(t *testing.T) {
	m := newMap(t, 8)
	m.Switch()
	m.Switch()
	m.MarkBoth(512, 512)
	if err := m.MarkDirty([]Sectors{{3, 2}, {7, 1}}); err != nil {
		t.Fatal(err)
	}
	if got, want := readAll(t, m), []byte{0, 2, 0, 2, 2, 0, 0, 2}; !slices.Equal(got, want) {
		t.Errorf("readable map %v, want %v", got, want)
	}
	m.Switch()
	if got, want := readAll(t, m), []byte{0, 3, 0, 3, 3, 0, 0, 3}; !slices.Equal(got, want) {
		t.Errorf("after the take %v, want %v", got, want)
	}
}

// blksnap marks its first range as often as there are ranges, and does not look
// whether they are on the device.
func TestDirtyRangesAreMarkedAllOrNone(t *testing.T) {
	for _, c := range []struct {
		ranges []Sectors
		names  string
	}{
		{[]Sectors{{0, 1}, {8, 1}}, "sectors 8:1 of 8 dirty"},
		{[]Sectors{{0, 9}, {0, 1}}, "sectors 0:9"},
		{[]Sectors{{0, 1}, {1, 1}, {2, 0}}, "sectors 2:0"},
		{[]Sectors{{0, 1}, {math.MaxUint64, 2}}, "sectors 18446744073709551615:2"},
		{[]Sectors{{0, 1}, {2, math.MaxUint64}}, "sectors 2:18446744073709551615"},
		{[]Sectors{{0, 1}, {7, 2}}, "sectors 7:2"},
	} {
		m := newMap(t, 8)
		m.Switch()
		if err := m.MarkDirty(c.ranges); !errors.Is(err, ErrRange) || !strings.Contains(err.Error(), c.names) {
			t.Errorf("%v: %v, want one naming %q", c.ranges, err, c.names)
		}
		if slices.Max(m.active) != 0 || slices.Max(m.readable) != 0 {
			t.Errorf("%v: something is marked", c.ranges)
		}
	}
	if err := newMap(t, 8).MarkDirty([]Sectors{{0, 8}}); err != nil {
		t.Errorf("the whole device: %v", err)
	}
}

func TestChangesMergesNeighboursAndEndsWithTheDevice(t *testing.T) {
	const size = 10*4096 + 1536
	m, err := NewMemory(size, Params{12, 12, 1})
	if err != nil {
		t.Fatal(err)
	}
	i := info(t, m)
	m.Mark(0, 1)
	m.Switch()
	m.Mark(4096, 2*4096)
	m.Mark(9*4096, 1)
	m.Switch()
	m.Mark(10*4096, 512)
	m.Switch()
	for _, c := range []struct {
		since uint64
		want  []Range
	}{
		{0, []Range{{0, 3 * 4096}, {9 * 4096, 4096 + 1536}}},
		{1, []Range{{4096, 2 * 4096}, {9 * 4096, 4096 + 1536}}},
		{2, []Range{{10 * 4096, 1536}}},
		{3, nil},
	} {
		seq, err := m.Changes(i.GenerationID, c.since)
		if err != nil {
			t.Fatal(err)
		}
		var got []Range
		for r, err := range seq {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, r)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("since %d: %v, want %v", c.since, got, c.want)
		}
		for r := range seq { // stopping early is allowed
			if r != c.want[0] {
				t.Errorf("since %d: begins with %v", c.since, r)
			}
			break
		}
		m.NewGeneration()
		for _, err := range seq { // the history is gone: the end says so
			if !errors.Is(err, ErrGeneration) {
				t.Errorf("since %d, of a generation that has ended: %v", c.since, err)
			}
		}
		m = again(t, m, i)
	}
	if _, err := m.Changes(i.GenerationID, 4); !errors.Is(err, ErrNotTaken) {
		t.Errorf("since a take to come: %v", err)
	}
}

// again is the map of TestChangesMergesNeighboursAndEndsWithTheDevice once more,
// in generation i.
func again(t *testing.T, m *Map, i Info) *Map {
	t.Helper()
	copy(m.readable, []byte{1, 2, 2, 0, 0, 0, 0, 0, 0, 2, 3})
	m.commitLocked(i.GenerationID, 3)
	return m
}

func TestReadMapIsAReaderAt(t *testing.T) {
	m := newMap(t, 5)
	m.Mark(512, 2048)
	g := m.Switch().GenerationID
	for _, c := range []struct {
		off, length int64
		want        []byte
		err         error
	}{
		{0, 5, []byte{0, 1, 1, 1, 1}, nil},
		{0, 2, []byte{0, 1}, nil},
		{3, 2, []byte{1, 1}, nil},
		{3, 3, []byte{1, 1}, io.EOF},
		{5, 0, nil, nil},
		{5, 1, nil, io.EOF},
		{math.MaxInt64, 1, nil, io.EOF},
		{-1, 1, nil, ErrRange},
	} {
		b := make([]byte, c.length)
		n, err := m.ReadMap(g, b, c.off)
		if !slices.Equal(b[:n], c.want) || !errors.Is(err, c.err) {
			t.Errorf("read %d at %d: %v, %v", c.length, c.off, b[:n], err)
		}
	}
}

func TestVoidCarriesTheTakesChangesIntoTheNext(t *testing.T) {
	m := newMap(t, 4)
	m.Mark(0, 512)
	base := m.Switch()
	m.Mark(512, 512)
	m.Void(base) // no take since
	if !slices.Equal(m.active, []byte{1, 2, 0, 0}) {
		t.Fatalf("void without a take: %v", m.active)
	}
	believed := m.Switch()
	m.Void(base)
	m.Void(base)
	m.Mark(1024, 512)
	if now := m.Switch(); now.ChangesNumber != believed.ChangesNumber+1 {
		t.Errorf("the void take's number is used again: %+v", now)
	}
	want := []bool{false, true, true, false}
	for _, b := range []Info{base, believed} {
		if got := changedBlocks(t, m, b.GenerationID, b.ChangesNumber); !slices.Equal(got, want) {
			t.Errorf("since %d: %v, want %v", b.ChangesNumber, got, want)
		}
	}
}

func TestVoidWrapCountsAllAsChanged(t *testing.T) {
	m := newMap(t, 4)
	var before Info
	for range 254 {
		before = m.Switch()
	}
	believed := m.Switch()
	m.Void(before)
	m.Switch()
	if got := changedBlocks(t, m, believed.GenerationID, 0); slices.Contains(got, false) {
		t.Errorf("changed since the void wrap: %v", got)
	}
}

// I3 and the marks' atomicity, best run with -race: queues mark behind a gate,
// images, dirty ranges and readers come as they like, takes close the gate.
func TestMarksFromManyThreadsAreNeverLost(t *testing.T) {
	const blocks, queues, writes = 100, 4, 3000
	m := newMap(t, blocks)
	var gate sync.RWMutex
	numbers := [queues][blocks]uint8{} // what each queue's last mark must have left
	var wg, bg sync.WaitGroup
	stop := make(chan struct{})
	for q := range queues {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(uint64(q), 1))
			for i := range writes {
				b := rng.IntN(blocks)
				n := 1 + rng.IntN(min(12, blocks-b))
				if q == 0 && i%10 == 0 {
					m.MarkBoth(int64(b)*512, int64(n)*512)
					continue
				}
				gate.RLock()
				m.Mark(int64(b)*512, int64(n)*512)
				for j := b; j < b+n; j++ {
					numbers[q][j] = uint8(m.pattern)
				}
				gate.RUnlock()
			}
		}()
	}
	for _, do := range []func(){
		func() { _, _ = m.Info() },
		func() {
			i, _ := m.Info()
			_, _ = m.ReadMap(i.GenerationID, make([]byte, blocks), 0)
			if seq, err := m.Changes(i.GenerationID, 0); err == nil {
				for range seq {
				}
			}
		},
		func() { _ = m.MarkDirty([]Sectors{{5, 1}}) },
	} {
		bg.Add(1)
		go func() {
			defer bg.Done()
			for {
				select {
				case <-stop:
					return
				default:
					do()
				}
			}
		}()
	}
	bg.Add(1)
	go func() {
		defer bg.Done()
		for range 100 {
			gate.Lock()
			m.Switch()
			gate.Unlock()
		}
	}()
	wg.Wait()
	close(stop)
	bg.Wait()
	m.Switch()
	for b, v := range readAll(t, m) {
		for q := range queues {
			if v < numbers[q][b] {
				t.Errorf("block %d has %d, queue %d marked it with %d", b, v, q, numbers[q][b])
			}
		}
	}
}

// Two queues mark neighbouring blocks, bytes of one word, at the same moment.
func TestNeighboursMarkedAtOnceAreBothMarked(t *testing.T) {
	const blocks = 1 << 14
	m := newMap(t, blocks)
	for range 30 {
		var turn atomic.Int64 // keeps the two within a word of each other
		var wg sync.WaitGroup
		for q := range int64(2) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for word := int64(0); word < blocks/8; word++ {
					for turn.Add(1); turn.Load() < 2*word+2; {
						runtime.Gosched()
					}
					for b := 8*word + q; b < 8*word+8; b += 2 {
						m.Mark(b*512, 512)
					}
				}
			}()
		}
		wg.Wait()
		for b, v := range m.active {
			if v != 1 {
				t.Fatalf("block %d is not marked", b)
			}
		}
		m.NewGeneration()
		clear(m.active)
	}
}

func TestMarksDoNotAllocate(t *testing.T) {
	m := newMap(t, 1000)
	n := testing.AllocsPerRun(100, func() {
		m.Mark(512, 512)
		m.Mark(0, 512*1000)
		m.MarkBoth(512, 5120)
		clear(m.active) // so that the next run writes, too
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMark(b *testing.B) {
	const size = 1 << 40
	m, err := NewMemory(size, DefaultParams())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("marked-4k", func(b *testing.B) {
		m.Mark(0, 4096)
		for range b.N {
			m.Mark(0, 4096)
		}
	})
	b.Run("marked-16-blocks", func(b *testing.B) {
		m.Mark(0, 8<<20)
		for range b.N {
			m.Mark(0, 8<<20)
		}
	})
	b.Run("first-4k", func(b *testing.B) {
		for i := range b.N {
			if i&0x1fffff == 0 {
				b.StopTimer()
				m.fill(m.active, 0)
				b.StartTimer()
			}
			m.Mark(int64(i&0x1fffff)<<19, 4096)
		}
	})
	b.Run("marked-4k-parallel", func(b *testing.B) {
		m.Mark(0, 4096)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				m.Mark(0, 4096)
			}
		})
	})
}

// The cut's share of a take: 2 Mi blocks.
func BenchmarkSwitch(b *testing.B) {
	m, err := NewMemory(1<<40, DefaultParams())
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		m.Switch()
	}
}
