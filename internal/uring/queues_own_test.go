//go:build !giouring

package uring

import (
	"math/rand/v2"
	"testing"
	"unsafe"
)

// fakeKernel is a pair of queues in ordinary memory with the kernel's side
// played by the test: its counters start anywhere, so that the wrap at 2^32 is
// a matter of a few steps.
type fakeKernel struct {
	q                              queues
	sqHead, sqTail, cqHead, cqTail uint32
	sqFlags                        uint32
	sqes                           []SQE
	cqes                           []CQE
}

func newFakeKernel(sqEntries, cqEntries, start uint32, wide bool) *fakeKernel {
	k := &fakeKernel{sqHead: start, sqTail: start, cqHead: start, cqTail: start}
	shift := uint8(6)
	n := sqEntries
	if wide {
		shift, n = 7, 2*sqEntries
	}
	k.sqes = make([]SQE, n)
	k.cqes = make([]CQE, cqEntries)
	k.q = queues{
		sqHead: &k.sqHead, sqTail: &k.sqTail, sqFlags: &k.sqFlags,
		sqNext: start, sqMask: sqEntries - 1, sqEntries: sqEntries,
		sqes: unsafe.Pointer(&k.sqes[0]), sqeShift: shift,
		cqHead: &k.cqHead, cqTail: &k.cqTail, cqMask: cqEntries - 1,
		cqes: unsafe.Pointer(&k.cqes[0]),
	}
	return k
}

// take consumes up to n shown entries and returns their user data.
func (k *fakeKernel) take(n int) (got []uint64) {
	for ; n > 0 && k.sqHead != k.sqTail; n-- {
		i := (k.sqHead & k.q.sqMask) << (k.q.sqeShift - 6)
		got = append(got, k.sqes[i].UserData)
		k.sqHead++
	}
	return got
}

// complete posts a completion if there is room.
func (k *fakeKernel) complete(user uint64) bool {
	if k.cqTail-k.cqHead > k.q.cqMask {
		return false
	}
	k.cqes[k.cqTail&k.q.cqMask] = CQE{UserData: user}
	k.cqTail++
	return true
}

// FuzzQueues runs random steps of both sides against plain lists.
func FuzzQueues(f *testing.F) {
	for _, start := range []uint32{0, 1, 1<<31 - 3, 1<<32 - 1, 1<<32 - 5, 1<<32 - 64} {
		f.Add(start, uint8(0), uint8(0), false, uint64(start))
		f.Add(start, uint8(2), uint8(3), false, uint64(start)+1)
		f.Add(start, uint8(4), uint8(5), true, uint64(start)+2)
	}
	f.Fuzz(func(t *testing.T, start uint32, sqBits, cqBits uint8, wide bool, seed uint64) {
		sqEntries, cqEntries := uint32(1)<<(sqBits%6), uint32(1)<<(cqBits%7)
		k := newFakeKernel(sqEntries, cqEntries, start, wide)
		rng := rand.New(rand.NewPCG(seed, 1))
		var filled, shown, taken []uint64 // entries by where they are
		var posted []uint64               // completions not yet reaped
		var next uint64
		dst := make([]CQE, 8)
		for range 400 {
			switch rng.IntN(5) {
			case 0, 1:
				s := k.q.next()
				if full := len(filled)+len(shown) == int(sqEntries); full != (s == nil) {
					t.Fatalf("start %#x: next = %v with %d of %d entries used", start, s, len(filled)+len(shown), sqEntries)
				}
				if s != nil {
					next++
					s.UserData = next
					filled = append(filled, next)
				}
			case 2:
				n := k.q.flush()
				shown, filled = append(shown, filled...), nil
				if int(n) != len(shown) {
					t.Fatalf("start %#x: flush = %d, want %d", start, n, len(shown))
				}
			case 3:
				got := k.take(rng.IntN(int(sqEntries) + 1))
				for i, u := range got {
					if u != shown[i] {
						t.Fatalf("start %#x: kernel took %d, want %d", start, u, shown[i])
					}
				}
				shown = shown[len(got):]
				taken = append(taken, got...)
				for len(taken) > 0 && k.complete(taken[0]) {
					posted = append(posted, taken[0])
					taken = taken[1:]
				}
			case 4:
				if int(k.q.ready()) != len(posted) {
					t.Fatalf("start %#x: ready = %d, want %d", start, k.q.ready(), len(posted))
				}
				want := rng.IntN(len(dst) + 1)
				n := k.q.reap(dst[:want])
				if n != min(want, len(posted)) {
					t.Fatalf("start %#x: reap = %d, want %d", start, n, min(want, len(posted)))
				}
				for i := range n {
					if dst[i].UserData != posted[i] {
						t.Fatalf("start %#x: reaped %d, want %d", start, dst[i].UserData, posted[i])
					}
				}
				posted = posted[n:]
			}
			if int(k.q.unsubmitted()) != len(filled)+len(shown) {
				t.Fatalf("start %#x: unsubmitted = %d, want %d", start, k.q.unsubmitted(), len(filled)+len(shown))
			}
		}
	})
}

func TestOverflowFlag(t *testing.T) {
	k := newFakeKernel(1, 1, 0, false)
	if k.q.overflowed() {
		t.Error("overflow seen without the flag")
	}
	k.sqFlags = 1 | ioringSQCQOverflow
	if !k.q.overflowed() {
		t.Error("overflow not seen")
	}
}
