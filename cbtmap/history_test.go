package cbtmap

import (
	"bytes"
	"errors"
	"sync"
	"testing"
)

// TestCopyWhileMarked: what is marked before a copy begins is in it, whatever is marked
// meanwhile.
func TestCopyWhileMarked(t *testing.T) {
	const blocks = 3*maxHeld + 5
	m, err := NewMemory(blocks*512, Params{MinimumShift: 9, MaximumShift: 9, MaximumCount: blocks})
	if err != nil {
		t.Fatal(err)
	}
	var marking sync.WaitGroup
	for i := range 2 {
		marking.Add(1)
		go func() {
			defer marking.Done()
			for b := range int64(blocks) {
				if b%2 == int64(i) {
					m.Mark(b*512, 512)
				}
			}
		}()
	}
	if _, err := m.Copy(); err != nil {
		t.Error(err)
	}
	marking.Wait()
	h, err := m.Copy()
	if err != nil || !bytes.Equal(h.Marks, bytes.Repeat([]byte{1}, blocks)) {
		t.Errorf("a mark is missing, %v", err)
	}
	// A take meanwhile, then a generation.
	m.onRelease = func() {
		m.onRelease = nil
		m.Switch()
		m.Mark((blocks-1)*512, 512)
	}
	if h, err = m.Copy(); err != nil || h.ChangesNumber != 0 || h.Marks[blocks-1] != 2 {
		t.Errorf("take %d, %d, %v", h.ChangesNumber, h.Marks[blocks-1], err)
	}
	m.onRelease = func() {
		m.onRelease = nil
		m.NewGeneration()
	}
	if _, err = m.Copy(); !errors.Is(err, ErrGeneration) {
		t.Errorf("a generation begins meanwhile: %v", err)
	}
	m.SetCorrupted()
	if _, err = m.Copy(); !errors.Is(err, ErrCorrupted) {
		t.Errorf("corrupted: %v", err)
	}
}

func TestRestore(t *testing.T) {
	old := newMap(t, 10)
	old.Mark(0, 512)
	old.Switch()
	old.Mark(3*512, 512)
	h, err := old.Copy()
	if err != nil {
		t.Fatal(err)
	}
	m := newMap(t, 10)
	m.Mark(7*512, 512)
	if err := m.Restore(h); err != nil {
		t.Fatal(err)
	}
	if want := []byte{1, 0, 0, 2, 0, 0, 0, 2, 0, 0}; !bytes.Equal(m.active, want) {
		t.Errorf("active map %d, want %d", m.active, want)
	}
	if want := []byte{1, 0, 0, 1, 0, 0, 0, 0, 0, 0}; !bytes.Equal(m.readable, want) {
		t.Errorf("readable map %d, want %d", m.readable, want)
	}
	if err := m.Restore(h); !errors.Is(err, ErrInUse) {
		t.Errorf("into a map with takes: %v", err)
	}
	if err := newMap(t, 11).Restore(h); !errors.Is(err, ErrMismatch) {
		t.Errorf("into a map of another size: %v", err)
	}
	h.Marks[2] = h.ChangesNumber + 2
	if err := newMap(t, 10).Restore(h); !errors.Is(err, ErrTorn) {
		t.Errorf("a mark that cannot be: %v", err)
	}
}

// TestFollow: a follower hears of every header before a mark can have its number.
func TestFollow(t *testing.T) {
	m := newMap(t, 10)
	var last Info
	var failure error
	m.Follow(func(i Info, err error) {
		if m.number != i.ChangesNumber && m.pattern>>56 == uint64(i.ChangesNumber)+1 {
			t.Error("told after the map had changed")
		}
		last, failure = i, err
	})
	saved, err := newMap(t, 10).Save()
	if err != nil {
		t.Fatal(err)
	}
	for _, do := range []func(){
		func() {}, func() { m.NewGeneration() }, func() {
			if err := m.Load(saved); err != nil {
				t.Error(err)
			}
		}, func() { m.Switch() }, func() { m.SetCorrupted() }, func() { m.Switch() }, func() {
			if err := m.Resize(512); err != nil {
				t.Error(err)
			}
		},
	} {
		do()
		now, err := m.Info()
		if last != now || !errors.Is(failure, err) {
			t.Errorf("told %v, %v; it is %v, %v", last, failure, now, err)
		}
	}
}
