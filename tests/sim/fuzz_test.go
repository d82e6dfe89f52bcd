package sim

import (
	"encoding/binary"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// stepBytes is how many bytes of fuzzing data make a step.
const stepBytes = 10

// decodeSteps makes steps of any bytes.
func decodeSteps(data []byte) (steps []Step) {
	for ; len(data) >= stepBytes && len(steps) < 60; data = data[stepBytes:] {
		steps = append(steps, Step{
			Verb:  Verb(data[0] % byte(verbs)),
			FUA:   data[1]&1 != 0,
			Dev:   data[1] >> 1 & 3,
			Snap:  data[1] >> 3 & 3,
			Queue: data[1] >> 5,
			Off:   uint32(binary.LittleEndian.Uint16(data[2:])) % 2048,
			Len:   1 + uint32(binary.LittleEndian.Uint16(data[4:]))%2048,
			Arg:   uint32(binary.LittleEndian.Uint16(data[6:])),
			Gap:   data[8] % 8,
		})
		if data[9] > 250 {
			steps[len(steps)-1].Gap = settled
		}
	}
	return steps
}

func encodeStep(s Step) []byte {
	b := make([]byte, stepBytes)
	b[0] = byte(s.Verb)
	b[1] = s.Dev&3<<1 | s.Snap&3<<3 | s.Queue<<5
	if s.FUA {
		b[1] |= 1
	}
	binary.LittleEndian.PutUint16(b[2:], uint16(s.Off))
	binary.LittleEndian.PutUint16(b[4:], uint16(s.Len-min(s.Len, 1)))
	binary.LittleEndian.PutUint16(b[6:], uint16(s.Arg))
	b[8] = s.Gap % 8
	return b
}

// FuzzSimulation lets coverage find the way: any world, any order, any steps.
func FuzzSimulation(f *testing.F) {
	for seed := uint64(1); seed <= 2*uint64(profiles); seed++ {
		c := Generate(seed, 40)
		var data []byte
		for _, s := range c.Steps {
			data = append(data, encodeStep(s)...)
		}
		f.Add(seed, c.Order, data)
	}
	f.Fuzz(func(t *testing.T, world, order uint64, data []byte) {
		c := Generate(world, 0)
		c.Order, c.Steps = order|1, decodeSteps(data)
		if _, failure := Run(c, nil); failure != nil {
			t.Errorf("%v\n%v", failure, c)
		}
	})
}

// FuzzOpen takes over whatever lies where a dead process's log and words
// should be: an error, or a log that works and places every chunk somewhere.
func FuzzOpen(f *testing.F) {
	const chunks = 8
	good := words(diffarea.LogStateSize)
	table := words(diffarea.TableSize(chunks))
	pool := words(3 * diffarea.MinChunkSize)
	config := func(state []byte) diffarea.LogConfig {
		return diffarea.LogConfig{
			ChunkSize: diffarea.MinChunkSize, State: state, Portion: 1 << 16, OnEvent: func(diffarea.Event) {},
			Pool: diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)},
		}
	}
	disk := blockdevtest.NewMemoryDevice("disk", chunks*diffarea.MinChunkSize)
	// A log with something in it: three chunks copied.
	{
		q := blockdevtest.NewMemoryQueue()
		w := diffarea.NewWorker(q)
		l, err := diffarea.NewLog(config(good))
		if err != nil {
			f.Fatal(err)
		}
		a := diffarea.NewArea(diffarea.AreaConfig{Log: l, Orig: disk, Size: disk.Size(), Words: table})
		l.Append(w, diffarea.Storage{File: blockdevtest.NewMemoryFile("store", 1<<20)}, func(error) {})
		q.Run()
		for _, c := range []diffarea.Chunk{1, 4, 5} {
			a.Protect(w, c, nil, func() {})
		}
		q.Run()
	}
	f.Add(good[:256], table)
	f.Add(good[:64], table)
	f.Add(make([]byte, 80), table)
	f.Fuzz(func(t *testing.T, state, tableBytes []byte) {
		s, tb := words(diffarea.LogStateSize), words(diffarea.TableSize(chunks))
		defer unmap(s, tb)
		copy(s, state)
		copy(tb, tableBytes)
		q := blockdevtest.NewMemoryQueue()
		w := diffarea.NewWorker(q)
		store := blockdevtest.NewMemoryFile("store", 1<<20)
		l, err := diffarea.OpenLog(config(s), []diffarea.Storage{{File: store}})
		if err != nil {
			return
		}
		a, err := diffarea.OpenArea(diffarea.AreaConfig{Log: l, Orig: disk, Size: disk.Size(), Words: tb}, nil)
		if err != nil {
			return
		}
		l.Resume(w)
		q.Run()
		for c := diffarea.Chunk(0); c < chunks; c++ {
			word := a.Load(c)
			if word.State() == diffarea.Failed {
				continue
			}
			file, off := a.Locate(word, a.Start(c))
			if file == disk && off != a.Start(c) || file != disk && off%diffarea.MinChunkSize != 0 {
				t.Errorf("chunk %d with word %#x lies in %s at %d", c, word, file.Name(), off)
			}
			if word.State() == diffarea.InMemory && l.Err() == 0 {
				t.Errorf("chunk %d was not stored", c)
			}
		}
	})
}

// FuzzParseCase reads case files.
func FuzzParseCase(f *testing.F) {
	for seed := uint64(1); seed < 4; seed++ {
		f.Add(Generate(seed, 5).String())
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseCase(text)
		if err != nil {
			return
		}
		again, err := ParseCase(c.String())
		if err != nil || again.String() != c.String() {
			t.Errorf("%q reads back as %q: %v", c, again, err)
		}
	})
}
