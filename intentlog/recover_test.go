package intentlog

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// content is the file of a log with entries by zone.
func content(id uuid.UUID, h header, stamps map[int64]stamp) []byte {
	b := make([]byte, FileSize(h.size, h.zoneShift))
	h.put(b)
	for z, s := range stamps {
		order.PutUint64(b[entryAt(z):], uint64(s))
	}
	for at := 0; at < len(b); at += sector.Size {
		seal(b[at:at+sector.Size], id, uint64(at/sector.Size))
	}
	return b
}

func history(generation uuid.UUID, number uint8, size, block int64, marks []byte) cbtmap.History {
	return cbtmap.History{Marks: marks, Info: cbtmap.Info{
		DeviceCapacity: size, BlockSize: block, BlockCount: int64(len(marks)), GenerationID: generation, ChangesNumber: number,
	}}
}

// TestRecoverIsTheRule compares Recover with its rule, block by block.
func TestRecoverIsTheRule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := sector.Size * rapid.Int64Range(1, 3000).Draw(t, "sectors")
		zoneShift := uint8(rapid.IntRange(MinZoneShift, 16).Draw(t, "zone"))
		block := int64(1) << rapid.IntRange(9, 17).Draw(t, "block")
		id, generation, other := uuid.New(), uuid.New(), uuid.New()
		number := rapid.Uint8Range(0, maxNumber).Draw(t, "number")
		epoch := rapid.Uint64Range(1, 5).Draw(t, "epoch")
		marks := make([]byte, (size-1)/block+1)
		for i := range marks {
			marks[i] = rapid.Byte().Draw(t, "mark")
		}
		h := header{size: size, zoneShift: zoneShift, generation: generation, number: rapid.Uint8Range(0, maxNumber).Draw(t, "last")}
		if rapid.Bool().Draw(t, "other") {
			h.generation = other
		}
		stamps := make(map[int64]stamp)
		for z := range zones(size, zoneShift) {
			if rapid.Bool().Draw(t, "logged") {
				stamps[z] = makeStamp(rapid.Uint64Range(1, 7).Draw(t, "e"), rapid.Byte().Draw(t, "n"))
			}
		}
		got, err := Recover(encodeBase(id, epoch, history(generation, number, size, block, marks)), content(id, h, stamps))
		if err != nil {
			t.Fatal(err)
		}
		last := number
		if h.generation == generation {
			last = max(last, h.number)
		}
		if got.ChangesNumber != last || got.GenerationID != generation {
			t.Fatalf("take %d of %v, want %d of %v", got.ChangesNumber, got.GenerationID, last, generation)
		}
		for b, m := range marks {
			want := min(m, last+1)
			for z, s := range stamps {
				if z<<zoneShift >= int64(b+1)*block || (z+1)<<zoneShift <= int64(b)*block {
					continue
				}
				switch {
				case s.epoch() > epoch:
					want = last + 1
				case s.epoch() == epoch:
					want = max(want, min(s.mark(), last+1))
				}
			}
			if got.Marks[b] != want {
				t.Fatalf("block %d: %d, want %d", b, got.Marks[b], want)
			}
		}
		m, err := cbtmap.NewMemory(size, cbtmap.Params{MinimumShift: 9, MaximumShift: 31, MaximumCount: int64(len(marks))})
		if i, _ := m.Info(); err == nil && i.BlockSize == block {
			err = m.Restore(got)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

// TestDamage: a base and a log of which one bit is wrong, or which are not whole, are
// refused, and so are parts of two.
func TestDamage(t *testing.T) {
	const size = 200 << MinZoneShift
	id, generation := uuid.New(), uuid.New()
	h := header{size: size, zoneShift: MinZoneShift, generation: generation, number: 3}
	base := encodeBase(id, 2, history(generation, 3, size, 4096, bytes.Repeat([]byte{2}, 200)))
	log := content(id, h, map[int64]stamp{7: makeStamp(2, 4), 130: makeStamp(3, 1)})
	if _, err := Recover(base, log); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, base, log []byte) {
		t.Helper()
		_, err := Recover(base, log)
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, file := range []*[]byte{&base, &log} {
		whole := *file
		for bit := range len(whole) * 8 {
			flipped := bytes.Clone(whole)
			flipped[bit/8] ^= 1 << (bit % 8)
			*file = flipped
			refused("a bit is wrong", base, log)
		}
		for n := range len(whole) {
			*file = whole[:n]
			refused("it is truncated", base, log)
		}
		*file = append(bytes.Clone(whole), 0)
		refused("it is longer", base, log)
		*file = whole
	}
	elsewhere := content(uuid.New(), h, nil)
	for at := 0; at < len(log); at += sector.Size {
		mixed := bytes.Clone(log)
		copy(mixed[at:at+sector.Size], elsewhere[at:])
		refused("a sector is of another log", base, mixed)
		if at > 0 {
			mixed = bytes.Clone(log)
			copy(mixed[at:at+sector.Size], log[at-sector.Size:])
			refused("a sector is there twice", base, mixed)
		}
	}
	refused("the log is another one", base, elsewhere)
	h.size -= 512
	refused("the disk is another one", base, content(id, h, nil))
}

func TestZones(t *testing.T) {
	for _, c := range []struct {
		size int64
		want uint8
	}{
		{512, 20}, {1 << 30, 20}, {16 << 30, 20}, {16<<30 + 512, 21}, {1 << 40, 26}, {1<<40 + 512, 27}, {1 << 62, 40},
	} {
		got := DefaultZoneShift(c.size)
		if got != c.want {
			t.Errorf("%d bytes: zones of 2^%d, want 2^%d", c.size, got, c.want)
		}
		if n := zones(c.size, got); n > defaultMaxZones && got < MaxZoneShift {
			t.Errorf("%d bytes: %d zones", c.size, n)
		}
	}
}
