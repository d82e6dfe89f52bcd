package sim

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// TestSavedMapAfterPowerFailure: a saved change map of which only some sectors
// reached the disk is never taken for a map.
func TestSavedMapAfterPowerFailure(t *testing.T) {
	params := cbtmap.Params{MinimumShift: 9, MaximumShift: 9, MaximumCount: 1 << 20}
	const size = 4000 * sectorSize
	m, err := cbtmap.NewMemory(size, params)
	if err != nil {
		t.Fatal(err)
	}
	r := blockdevtest.NewRandom(1)
	mark := func() {
		for i := 0; i < 200; i++ {
			m.Mark(int64(r.Intn(4000))*sectorSize, sectorSize)
		}
	}
	old, fresh := saved(t, m, mark), saved(t, m, mark)
	rejected := 0
	for i := 0; i < 2000; i++ {
		torn := append([]byte(nil), old...)
		torn = torn[:len(fresh)]
		changed := 0
		for at := 0; at < len(torn); at += sectorSize {
			end := min(at+sectorSize, len(torn))
			switch r.Intn(3) {
			case 0:
				changed += copy(torn[at:end], fresh[at:end])
			case 1:
				if r.OneIn(10) {
					clear(torn[at:end])
				}
			}
		}
		if r.OneIn(5) {
			torn = torn[:r.Intn(len(torn))]
		}
		if err := load(t, torn, size, params); err != nil {
			rejected++
		} else if string(torn) != string(old) && string(torn) != string(fresh) {
			t.Fatalf("a map with %d bytes of another one in it is loaded", changed)
		}
	}
	if rejected < 1900 {
		t.Errorf("only %d of 2000 torn files rejected", rejected)
	}
	for _, whole := range [][]byte{old, fresh} {
		if err := load(t, whole, size, params); err != nil {
			t.Errorf("a whole map is rejected: %v", err)
		}
	}
}

// saved changes a map, takes, and is what Save writes then.
func saved(t *testing.T, m *cbtmap.Map, change func()) []byte {
	t.Helper()
	change()
	m.Switch()
	b, err := m.Save()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// load has a new map load content.
func load(t *testing.T, content []byte, size int64, p cbtmap.Params) error {
	t.Helper()
	m, err := cbtmap.NewMemory(size, p)
	if err != nil {
		t.Fatal(err)
	}
	return m.Load(content)
}
