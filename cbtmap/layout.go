package cbtmap

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/google/uuid"
)

const (
	headerSize = 512
	copyWords  = 16 // from one header copy to the next
	flagWord   = 32

	// piece is how much of a map is written between two looks at the test hook.
	piece = 4096
)

// layout is the memory of a map and the views into it.
type layout struct {
	geometry
	memory        []byte
	words         []uint64 // header copies and corrupted flag
	active        []byte
	readable      []byte
	activeWords   []uint64
	readableWords []uint64

	// onStore is a test's look at the memory after every store that a SIGKILL
	// could be the last before.
	onStore func()
}

func newLayout(memory []byte, g geometry) (layout, error) {
	words, err := wordsOf(memory)
	if err != nil {
		return layout{}, err
	}
	if int64(len(memory)) != g.memorySize() {
		return layout{}, fmt.Errorf("%w: memory of %d bytes, %d expected", ErrTorn, len(memory), g.memorySize())
	}
	a, r := int64(headerSize), headerSize+g.span()
	return layout{
		geometry:      g,
		memory:        memory,
		words:         words[:headerSize/8],
		active:        memory[a : a+g.count],
		readable:      memory[r : r+g.count],
		activeWords:   words[a/8 : (a+g.span())/8],
		readableWords: words[r/8:],
	}, nil
}

func (l *layout) store(word int, v uint64) {
	atomic.StoreUint64(&l.words[word], v)
	l.stored()
}

func (l *layout) stored() {
	if l.onStore != nil {
		l.onStore()
	}
}

func (l *layout) corrupted() bool { return atomic.LoadUint64(&l.words[flagWord]) != 0 }

// commit makes h the header by writing it over the older copy. Its word 0 is
// stored last; before that the other copy counts.
func (l *layout) commit(h header) {
	at := int(h.sequence%2) * copyWords
	w := h.encode()
	l.store(at, 0)
	for i := 1; i < headerWords; i++ {
		l.store(at+i, w[i])
	}
	l.store(at, w[0])
}

// eachPiece calls do for consecutive parts of the maps.
func (l *layout) eachPiece(do func(from, to int)) {
	for from, n := 0, len(l.active); from < n; from += piece {
		do(from, min(from+piece, n))
		l.stored()
	}
}

// rewrite replaces every byte of b, one of the maps.
func (l *layout) rewrite(b []byte, with func(i int, old byte) byte) {
	l.eachPiece(func(from, to int) {
		for i := from; i < to; i++ {
			b[i] = with(i, b[i])
		}
	})
}

func (l *layout) fill(b []byte, v byte) {
	if v == 0 { // the fast way, because the wrap is part of a take
		l.eachPiece(func(from, to int) { clear(b[from:to]) })
		return
	}
	l.rewrite(b, func(int, byte) byte { return v })
}

// Format makes a new map for a device of size bytes in memory, which must be
// MemorySize bytes at an address that is a multiple of 8. It belongs to the map
// from then on.
func Format(memory []byte, size int64, p Params) (*Map, error) {
	g, err := p.geometry(size)
	if err != nil {
		return nil, err
	}
	l, err := newLayout(memory, g)
	if err != nil {
		return nil, err
	}
	l.store(0, 0) // no header counts while the maps change hands
	l.store(copyWords, 0)
	clear(memory)
	h := header{sequence: 1, size: size, params: p, generation: uuid.New()}
	l.commit(h)
	m := &Map{layout: l}
	m.setHeader(h)
	return m, nil
}

// NewMemory is Format in memory of its own, for tests and simulations.
func NewMemory(size int64, p Params) (*Map, error) {
	n, err := MemorySize(size, p)
	if err != nil {
		return nil, err
	}
	return Format(make([]byte, n), size, p)
}

// Adopt takes over the map in memory whose process has died, at whatever
// instruction. It fails with ErrForeign or ErrTorn, and memory is then untouched;
// the caller goes on with a new map, in a new generation. No other Map may use
// the memory any more.
func Adopt(memory []byte) (*Map, error) {
	words, err := wordsOf(memory)
	if err != nil {
		return nil, fmt.Errorf("adopt change map: %w", err)
	}
	if len(memory) < headerSize {
		return nil, fmt.Errorf("adopt change map: %w: only %d bytes", ErrForeign, len(memory))
	}
	h, g, err := newest(words)
	if err != nil {
		return nil, fmt.Errorf("adopt change map: %w", err)
	}
	l, err := newLayout(memory, g)
	if err != nil {
		return nil, fmt.Errorf("adopt change map: %w", err)
	}
	// A take or a load that was cut short leaves bytes above what the header's
	// number allows, never too low ones.
	l.rewrite(l.active, func(_ int, old byte) byte { return min(old, h.number+1) })
	l.rewrite(l.readable, func(_ int, old byte) byte { return min(old, h.number) })
	m := &Map{layout: l}
	m.setHeader(h)
	return m, nil
}

// newest returns the newer of the valid header copies. A copy that was being written when
// the process died begins with 0; any other that is not valid was damaged since, and may
// have been the newer one.
func newest(words []uint64) (header, geometry, error) {
	h0, g0, err0 := headerAt(words)
	h1, g1, err1 := headerAt(words[copyWords:])
	switch {
	case err0 != nil && words[0] != 0:
		return h0, g0, err0
	case err1 != nil && words[copyWords] != 0:
		return h1, g1, err1
	case err0 == nil && (err1 != nil || h0.sequence > h1.sequence):
		return h0, g0, nil //nolint:nilerr // one valid copy is enough
	case err1 == nil:
		return h1, g1, nil
	case errors.Is(err0, ErrTorn):
		return h0, g0, err0
	}
	return h1, g1, err1
}

func headerAt(words []uint64) (header, geometry, error) {
	var w rawHeader
	for i := range w {
		w[i] = atomic.LoadUint64(&words[i])
	}
	return w.decode()
}
