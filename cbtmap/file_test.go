package cbtmap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

func TestFileIsAdoptedByTheNextProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map")
	m, err := Create(path, 100*512, sectorBlocks)
	if err != nil {
		t.Fatal(err)
	}
	m.Mark(0, 512)
	base := m.Switch()
	m.Mark(512, 512)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 || st.Size() != m.memorySize() ||
		st.Sys().(*syscall.Stat_t).Blocks*512 < st.Size() {
		t.Errorf("file: %+v, %v; want mode 0600 and all of %d bytes allocated", st, err, m.memorySize())
	}
	// The process is gone; m is not closed.
	next, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	next.Switch()
	if got := changedBlocks(t, next, base.GenerationID, base.ChangesNumber); !got[1] || slices.Contains(got[2:], true) || got[0] {
		t.Errorf("changes after adoption: %v", got)
	}

	if err := next.Resize(1000 * 512); err != nil {
		t.Fatal(err)
	}
	if slices.Min(next.active) != 1 {
		t.Error("after the resize some blocks do not count as changed")
	}
	next.Mark(999*512, 512)
	resized := info(t, next)
	if resized.BlockCount != 1000 || next.Corrupted() {
		t.Errorf("resized: %+v", resized)
	}
	for range 2 {
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	}
	if next, err = Open(path); err != nil {
		t.Fatal(err)
	}
	if got := info(t, next); got != resized {
		t.Errorf("opened after the resize: %+v, want %+v", got, resized)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if names, _ := filepath.Glob(path + "*"); len(names) != 1 {
		t.Errorf("files left: %v", names)
	}
}

func TestCreateAndOpenFail(t *testing.T) {
	dir := t.TempDir()
	if _, err := Create(filepath.Join(dir, "none", "map"), 512, sectorBlocks); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("create in no directory: %v", err)
	}
	if _, err := Create(filepath.Join(dir, "map"), 511, sectorBlocks); !errors.Is(err, ErrSize) {
		t.Errorf("create of no size: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "map")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("open nothing: %v", err)
	}
	occupied := filepath.Join(dir, "occupied")
	if err := os.MkdirAll(filepath.Join(occupied, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(occupied, 512, sectorBlocks); err == nil {
		t.Error("created over a directory")
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 1 {
		t.Errorf("files left: %v", names)
	}

	good := newMap(t, 10)
	for name, c := range map[string]struct {
		content []byte
		want    error
	}{
		"empty":   {nil, ErrForeign},
		"short":   {good.memory[:100], ErrForeign},
		"zeroes":  {make([]byte, 4096), ErrForeign},
		"text":    {bytes.Repeat([]byte("no map  "), 200), ErrForeign},
		"cut off": {good.memory[:len(good.memory)-64], ErrTorn},
		"longer":  {append(bytes.Clone(good.memory), 0), ErrTorn},
	} {
		path := filepath.Join(dir, "bad")
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); !errors.Is(err, c.want) {
			t.Errorf("open %s file: %v, want %v", name, err, c.want)
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(after, c.content) {
			t.Errorf("open %s file changed it", name)
		}
	}
}

// Each word of either copy of the header damaged. The older copy alone would give a take's
// number away a second time. One that was cut short by a death begins with 0, and means
// nothing.
func TestDamagedHeaderIsNotAdopted(t *testing.T) {
	m := newMap(t, 10)
	m.Switch() // both copies are written now: sequences 1 and 2
	for word := range headerWords {
		for _, at := range []int{0, 8 * copyWords} { // copy 0 has sequence 2
			one := bytes.Clone(m.memory)
			one[at+8*word+1] ^= 0x10
			if a, err := Adopt(one); !errors.Is(err, ErrTorn) && !errors.Is(err, ErrForeign) {
				t.Errorf("word %d of the copy at %d: %+v, %v", word, at, a, err)
			}
		}
	}
	short := bytes.Clone(m.memory)
	clear(short[:8])
	short[17] ^= 0x10
	if a, err := Adopt(short); err != nil || a.number != 0 || a.generation != info(t, m).GenerationID {
		t.Errorf("a copy that was not whole yet: %v", err)
	}
	clear(short[8*copyWords : 8*copyWords+8])
	if _, err := Adopt(short); !errors.Is(err, ErrForeign) {
		t.Errorf("no copy: %v", err)
	}
}

func TestHeaderOfImpossibleContentIsTorn(t *testing.T) {
	good := newMap(t, 10).header
	if h, g, err := good.encode().decode(); err != nil || h != good || g.count != 10 {
		t.Fatalf("decode what was encoded: %+v, %+v, %v", h, g, err)
	}
	for name, change := range map[string]func(*header){
		"number 255":         func(h *header) { h.number = 255 },
		"odd size":           func(h *header) { h.size = 513 },
		"no size":            func(h *header) { h.size = 0 },
		"impossible params":  func(h *header) { h.params.MaximumShift = 3 },
		"negative max count": func(h *header) { h.params.MaximumCount = -1 },
	} {
		h := good
		change(&h)
		if _, _, err := h.encode().decode(); !errors.Is(err, ErrTorn) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w := good.encode()
	w[3]++ // the version
	if _, _, err := w.decode(); !errors.Is(err, ErrForeign) {
		t.Errorf("another version: %v", err)
	}
	w = good.encode()
	w[3] |= 1 << 63 // a bit that means nothing, under a right checksum
	b := w.bytes()
	w[0] = magic | uint64(crc32.Checksum(b[8:], castagnoli))<<32
	if _, _, err := w.decode(); !errors.Is(err, ErrTorn) {
		t.Errorf("a bit that means nothing: %v", err)
	}
}

func TestSaveAndLoadKeepTheHistory(t *testing.T) {
	m := newMap(t, 10)
	m.Mark(0, 512)
	m.Switch()
	m.Mark(512, 512)
	base := m.Switch()
	m.Mark(1024, 512)
	saved, err := m.Save()
	if err != nil {
		t.Fatal(err)
	}

	next := newMap(t, 10)
	next.Mark(9*512, 512)
	if err := next.Load(saved); err != nil {
		t.Fatal(err)
	}
	if got := info(t, next); got != base {
		t.Errorf("loaded %+v, want %+v", got, base)
	}
	if got, want := readAll(t, next), readAll(t, m); !slices.Equal(got, want) {
		t.Errorf("readable map %v, want %v", got, want)
	}
	next.Mark(8*512, 512)
	next.Switch()
	if got, want := readAll(t, next), []byte{1, 2, 3, 0, 0, 0, 0, 0, 3, 3}; !slices.Equal(got, want) {
		t.Errorf("after the next take %v, want %v", got, want)
	}
	if next, err := Adopt(next.Memory()); err != nil || next.number != 3 {
		t.Errorf("loaded map adopted: %v", err)
	}
}

func TestLoadRefusesWhatItCannotTrust(t *testing.T) {
	m := newMap(t, 10)
	m.Mark(0, 512)
	m.Switch()
	good := m.encodeSavedLocked()
	resum := func(b []byte) []byte {
		binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
		return b
	}
	other := func(m *Map, err error) *Map {
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	used, corrupted := newMap(t, 10), newMap(t, 10)
	used.Switch()
	corrupted.SetCorrupted()
	type refusal struct {
		into    *Map
		content []byte
		want    error
	}
	cases := map[string]refusal{
		"empty":              {newMap(t, 10), nil, ErrTorn},
		"foreign":            {newMap(t, 10), bytes.Repeat([]byte("x"), len(good)), ErrForeign},
		"longer":             {newMap(t, 10), append(bytes.Clone(good), 0), ErrTorn},
		"much longer":        {newMap(t, 10), append(bytes.Clone(good), make([]byte, 10000)...), ErrTorn},
		"other size":         {newMap(t, 11), good, ErrMismatch},
		"other block size":   {other(NewMemory(10*512, Params{10, 10, 1})), good, ErrMismatch},
		"map with takes":     {used, good, ErrInUse},
		"corrupted map":      {corrupted, good, ErrCorrupted},
		"active too high":    {newMap(t, 10), resum(replaced(good, savedHeader, 3)), ErrTorn},
		"readable too high":  {newMap(t, 10), resum(replaced(good, savedHeader+10, 2)), ErrTorn},
		"checksum":           {newMap(t, 10), replaced(good, len(good)-1, ^good[len(good)-1]), ErrTorn},
		"changed active map": {newMap(t, 10), replaced(good, savedHeader+5, 1), ErrTorn},
	}
	for n := savedHeader; n < len(good); n++ {
		cases["cut to "+string(rune('0'+n))] = refusal{newMap(t, 10), good[:n], ErrTorn}
	}
	for name, c := range cases {
		before := bytes.Clone(c.into.memory)
		if err := c.into.Load(c.content); !errors.Is(err, c.want) {
			t.Errorf("load %s: %v, want %v", name, err, c.want)
		}
		if !bytes.Equal(before, c.into.memory) {
			t.Errorf("load %s: the map is changed", name)
		}
	}
}

func replaced(b []byte, at int, v byte) []byte {
	b = bytes.Clone(b)
	b[at] = v
	return b
}

// A new map is written under another name first. That name is no other map's,
// and memory that a process has mapped under it is left alone.
func TestCreateLeavesOtherMapsAlone(t *testing.T) {
	dir := t.TempDir()
	for _, other := range []string{"data.new", "data" + newSuffix} {
		m, err := Create(filepath.Join(dir, other), 100*512, sectorBlocks)
		if err != nil {
			t.Fatal(err)
		}
		m.Mark(5*512, 512)
		if _, err := Create(filepath.Join(dir, "data"), 10*512, sectorBlocks); err != nil {
			t.Fatal(err)
		}
		base := info(t, m)
		m.Switch()
		if got := changedBlocks(t, m, base.GenerationID, base.ChangesNumber); !got[5] {
			t.Errorf("the map %q has lost a mark to the map \"data\"", other)
		}
	}
	if _, err := Open(filepath.Join(dir, "data.new")); err != nil {
		t.Error(err)
	}
}
