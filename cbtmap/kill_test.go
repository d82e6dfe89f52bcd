package cbtmap

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
)

// states runs do on m and returns what the memory was before, between and after
// its stores; parts of the maps that are written in one go also half written.
func states(m *Map, rng *rand.Rand, do func(*Map)) [][]byte {
	found := [][]byte{bytes.Clone(m.memory)}
	m.onStore = func() {
		last := found[len(found)-1]
		for range 3 {
			mixed := bytes.Clone(last)
			for i := headerSize; i < len(mixed); i++ {
				if rng.IntN(2) == 0 {
					mixed[i] = m.memory[i]
				}
			}
			found = append(found, mixed)
		}
		found = append(found, bytes.Clone(m.memory))
	}
	do(m)
	m.onStore = nil
	return found
}

// known is a base that a reader may have, and what changed since.
type known struct {
	generation uuid.UUID
	number     uint8
	changed    []bool
}

func (k known) check(t *testing.T, state int, m *Map) {
	t.Helper()
	i, err := m.Info()
	if err != nil || i.GenerationID != k.generation {
		return // the whole device
	}
	for b, is := range changedBlocks(t, m, k.generation, k.number) {
		if k.changed[b] && !is {
			t.Fatalf("state %d, number %d: block %d changed since %d and is not reported", state, i.ChangesNumber, b, k.number)
		}
	}
}

// I6 for the map: the process dies between any two stores of whatever changes
// more than a mark, the next one adopts the memory, voids the take that never
// came to be, and goes on. No base of anybody loses a change.
func TestKillAtAnyStoreLosesNoChange(t *testing.T) {
	const blocks = piece + 500
	for name, c := range map[string]struct {
		takes   int // before
		prepare func(*Map)
		do      func(*Map) // a take if nil
		begins  bool       // a generation
	}{
		"first take":             {takes: 0},
		"take":                   {takes: 3},
		"take 254":               {takes: 253},
		"wrap":                   {takes: 254, begins: true},
		"take of corrupted map":  {takes: 3, prepare: (*Map).SetCorrupted, begins: true},
		"new generation":         {takes: 3, do: (*Map).NewGeneration, begins: true},
		"new from corrupted":     {takes: 3, prepare: (*Map).SetCorrupted, do: (*Map).NewGeneration, begins: true},
		"void":                   {takes: 3, do: func(m *Map) { i := m.infoLocked(); m.Switch(); m.Void(i) }},
		"void of a wrap":         {takes: 254, do: func(m *Map) { i := m.infoLocked(); m.Switch(); m.Void(i) }},
		"void, then another one": {takes: 3, do: func(m *Map) { i := m.infoLocked(); m.Switch(); m.Void(i); m.Switch(); m.Void(i) }},
	} {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(7, 7))
			m := newMap(t, blocks)
			var bases []known
			mark := func(m *Map) {
				for range 5 {
					b := rng.IntN(blocks)
					m.Mark(int64(b)*512, 512)
					for _, k := range bases {
						k.changed[b] = true
					}
				}
			}
			note := func(m *Map, changed []bool) {
				if i, err := m.Info(); err == nil {
					bases = append(bases, known{i.GenerationID, i.ChangesNumber, slices.Clone(changed)})
				}
			}
			note(m, make([]bool, blocks))
			mark(m)
			for range c.takes {
				m.Switch()
				bases = bases[max(0, len(bases)-5):]
				note(m, make([]bool, blocks))
				mark(m)
			}
			if c.prepare != nil {
				c.prepare(m)
			}
			do := c.do
			if do == nil {
				do = func(m *Map) { m.Switch() }
			}
			before, _ := m.Info()
			held := bases[len(bases)-1].changed // since the take whose image is held
			for n, memory := range states(m, rng, do) {
				earlier := bases
				// What the held image's readers are told between the takes.
				sinceHeld := make([]known, 0, len(earlier))
				for _, k := range earlier {
					changed := make([]bool, blocks)
					for b := range changed {
						changed[b] = k.changed[b] && !held[b]
					}
					sinceHeld = append(sinceHeld, known{k.generation, k.number, changed})
				}
				bases = nil
				for _, k := range earlier {
					bases = append(bases, known{k.generation, k.number, slices.Clone(k.changed)})
				}

				next, err := Adopt(memory)
				if err != nil {
					t.Fatalf("state %d: %v", n, err)
				}
				if slices.Max(next.active) > next.number+1 || slices.Max(next.readable) > next.number {
					t.Fatalf("state %d: marks above number %d", n, next.number)
				}
				if c.do == nil && next.number > before.ChangesNumber && !bytes.Equal(next.readable, next.active) {
					t.Fatalf("state %d: take %d is not complete", n, next.number)
				}
				if c.begins && !next.Corrupted() {
					if next.generation != before.GenerationID && (!bytes.Equal(next.active, m.active) || !bytes.Equal(next.readable, m.readable)) {
						t.Fatalf("state %d: new generation of old marks", n)
					}
					if next.generation == before.GenerationID && c.prepare != nil {
						t.Fatalf("state %d: old generation is not corrupted any more", n)
					}
				}
				for _, k := range sinceHeld {
					k.check(t, n, next)
				}
				note(next, held)
				next.Void(before)
				note(next, held)
				mark(next)
				next.Switch()
				for _, k := range bases {
					k.check(t, n, next)
				}
				bases = earlier
			}
		})
	}
}

// A new map into which history is being loaded.
func TestKillWhileLoadingLosesNoChange(t *testing.T) {
	const blocks = piece + 500
	rng := rand.New(rand.NewPCG(8, 8))
	old := newMap(t, blocks)
	old.Mark(0, 512)
	base := old.Switch()
	old.Mark(512, 512)
	old.Switch()
	old.Mark(blocks*512-512, 512)
	saved, err := old.Save()
	if err != nil {
		t.Fatal(err)
	}
	m := newMap(t, blocks)
	fresh := info(t, m)
	m.Mark(1024, 512)
	loaded := 0
	for n, memory := range states(m, rng, func(m *Map) {
		if err := m.Load(saved); err != nil {
			t.Fatal(err)
		}
	}) {
		next, err := Adopt(memory)
		if err != nil {
			t.Fatalf("state %d: %v", n, err)
		}
		next.Switch()
		changed := make([]bool, blocks)
		changed[2] = true
		known{fresh.GenerationID, 0, changed}.check(t, n, next)
		changed[1], changed[blocks-1] = true, true
		known{base.GenerationID, base.ChangesNumber, changed}.check(t, n, next)
		if next.generation == base.GenerationID {
			loaded++
		}
	}
	if loaded == 0 {
		t.Error("the last state has not the loaded generation")
	}
}

// However many times the header of the old map was written.
func TestFormatForgetsTheMapBefore(t *testing.T) {
	m := newMap(t, 10)
	for range 20 {
		m.Mark(0, 5120)
		m.Switch()
	}
	next, err := Format(m.Memory(), 10*512, sectorBlocks)
	if err != nil {
		t.Fatal(err)
	}
	a, err := Adopt(m.Memory())
	if err != nil || a.header != next.header || slices.Max(a.active) != 0 || slices.Max(a.readable) != 0 {
		t.Errorf("adopted %+v, %v; formatted %+v", a.header, err, next.header)
	}
}

const victimEnv = "CBTMAP_TEST_VICTIM"

func TestMain(m *testing.M) {
	if path := os.Getenv(victimEnv); path != "" {
		victim(path)
	}
	os.Exit(m.Run())
}

const victimBlocks = 50000

// victim marks and takes until it is killed, and tells of each when it is done:
// a block's number, or victimBlocks for a take.
func victim(path string) {
	m, err := Create(path, victimBlocks*512, sectorBlocks)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 0))
	tell := func(v int) {
		if err := binary.Write(os.Stdout, binary.LittleEndian, uint32(v)); err != nil {
			os.Exit(1)
		}
	}
	for i := 0; ; i++ {
		b := rng.IntN(victimBlocks)
		m.Mark(int64(b)*512, 512)
		tell(b)
		if i%20 == 19 {
			m.Switch()
			tell(victimBlocks)
		}
	}
}

// The same with a real process and a real SIGKILL, over the mapped file.
func TestKilledProcessLosesNoMark(t *testing.T) {
	for round := range 8 {
		path := filepath.Join(t.TempDir(), "map")
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), victimEnv+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(out)
		wants := make([]byte, victimBlocks) // the least a block's byte may be
		number, marks := byte(0), 0
		for {
			var word [4]byte
			if _, err := io.ReadFull(r, word[:]); err != nil {
				break
			}
			if marks == 0 {
				time.AfterFunc(time.Duration(5+round*7)*time.Millisecond, func() { _ = cmd.Process.Kill() })
			}
			if v := binary.LittleEndian.Uint32(word[:]); v < victimBlocks {
				wants[v] = number + 1
				marks++
			} else if number++; number > maxNumber {
				number = 0
				clear(wants)
			}
		}
		_ = cmd.Wait() // killed
		m, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		i := info(t, m)
		if i.ChangesNumber != number && i.ChangesNumber != (number+1)%255 {
			t.Errorf("number %d after take %d", i.ChangesNumber, number)
		}
		for b, v := range m.active {
			if v < wants[b] && (number < maxNumber || i.ChangesNumber > 0) { // not if killed in a wrap
				t.Errorf("block %d has %d, was marked with %d", b, v, wants[b])
			}
		}
		t.Logf("killed after %d marks, %d since take %d", marks, marks%20, number)
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}
