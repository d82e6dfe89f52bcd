package diffarea

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// Chunk is a chunk's number on its device, counted from 0.
type Chunk int64

// Region is a place in the difference log, one chunk long. Regions are handed
// out in order and never twice in the life of a snapshot.
type Region int64

// State says where a chunk of the image is.
//
//	      copied              stored
//	NEW ─────────> IN_MEMORY ────────> STORED
//	 │ original       pool slot          storage
//	 └───────────> FAILED   the copy could not be made: the snapshot is broken
//
// Table.set is the one function that changes it.
type State uint8

const (
	// New: never written since the cut; the data is on the original disk.
	New State = iota
	// InMemory: the data is in the pool, in the slot of its region.
	InMemory
	// Stored: the data is in the difference storage, at its region.
	Stored
	// Failed: the data is lost.
	Failed
)

func (s State) String() string {
	switch s {
	case New:
		return "NEW"
	case InMemory:
		return "IN_MEMORY"
	case Stored:
		return "STORED"
	case Failed:
		return "FAILED"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Word is a chunk's state and region in 64 bits, zero for a new chunk:
//
//	 63 62 61                                            0
//	┌─────┬───────────────────────────────────────────────┐
//	│state│ region                                        │
//	└─────┴───────────────────────────────────────────────┘
//
// A word that has not changed between two looks means that the chunk's data
// was in the same place all the time in between: states only move forward and
// regions are not used twice.
type Word uint64

const regionBits = 62

func makeWord(s State, r Region) Word { return Word(s)<<regionBits | Word(r) }

// State is the chunk's state.
func (w Word) State() State { return State(w >> regionBits) }

// Region is the chunk's region; it means something in IN_MEMORY and STORED.
func (w Word) Region() Region { return Region(w & (1<<regionBits - 1)) }

// Table holds the words of one device in one snapshot. Its memory is the
// caller's: a mapped file that outlives the process. Looking at a word that was
// never set does not touch that memory, so a table costs as much as was
// written, not as much as the disk is large.
type Table struct {
	words []uint64
	// groups has one flag per wordsPerGroup words, true from before the first
	// of them is set.
	groups []atomic.Bool
}

const (
	wordSize      = 8
	wordsPerGroup = 4096 / wordSize // a page of them
)

// TableSize is the memory a table of n chunks needs, in bytes.
func TableSize(n Chunk) int64 { return int64(n) * wordSize }

// newTable makes a table of n chunks over mem, which is TableSize(n) bytes, 8
// byte aligned and zero.
func newTable(mem []byte, n Chunk) *Table {
	if int64(len(mem)) < TableSize(n) || uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%wordSize != 0 {
		panic(fmt.Sprintf("diffarea: table of %d chunks over %d bytes", n, len(mem)))
	}
	return &Table{
		words:  unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), n),
		groups: make([]atomic.Bool, (n+wordsPerGroup-1)/wordsPerGroup),
	}
}

// adopt takes over the words that an earlier process left in [from, to) and
// calls back with each that is set.
func (t *Table) adopt(from, to Chunk, set func(Chunk, Word)) {
	for c := from; c < to; c++ {
		if w := Word(atomic.LoadUint64(&t.words[c])); w != 0 {
			t.groups[c/wordsPerGroup].Store(true)
			set(c, w)
		}
	}
}

// Len is the number of chunks.
func (t *Table) Len() Chunk { return Chunk(len(t.words)) }

// Load is the word of chunk c.
func (t *Table) Load(c Chunk) Word {
	if !t.groups[c/wordsPerGroup].Load() {
		return 0
	}
	return Word(atomic.LoadUint64(&t.words[c]))
}

// set changes the word of chunk c, in one store: whoever dies before it or
// after it leaves a true table.
func (t *Table) set(c Chunk, w Word) {
	if g := &t.groups[c/wordsPerGroup]; !g.Load() {
		g.Store(true)
	}
	atomic.StoreUint64(&t.words[c], uint64(w))
}

// skipNew is the first chunk from c on, below end, that lies in a group with a
// set word; chunks before it are all new.
func (t *Table) skipNew(c, end Chunk) Chunk {
	for c < end && !t.groups[c/wordsPerGroup].Load() {
		c = (c/wordsPerGroup + 1) * wordsPerGroup
	}
	return min(c, end)
}
