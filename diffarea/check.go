package diffarea

import (
	"errors"
	"fmt"
)

// ErrState: the state of a log or an area contradicts itself.
var ErrState = errors.New("inconsistent snapshot state")

// Check says whether a log and its areas are as they must be while nothing is
// under way: each region has one chunk at most and the storage to hold it,
// what is in memory is in its slot, and no slot, copy or waiter is left over.
func (l *Log) Check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy != 0 || l.stores != 0 || l.waiting.head != nil {
		return fmt.Errorf("%w: %d operations and %d stores under way", ErrState, l.busy, l.stores)
	}
	if err := l.state.check(len(l.sources)); err != nil {
		return err
	}
	dead := l.dead.Load() != 0
	type owner struct {
		area  *Area
		chunk Chunk
	}
	owners := make(map[Region]owner)
	for _, a := range l.areas {
		for i := range a.copying {
			if a.copying[i] != nil {
				return fmt.Errorf("%w: %s: a copy of chunk %d is left over", ErrState, a.orig.Name(), a.copying[i].chunk)
			}
		}
		for c := a.table.skipNew(0, a.table.Len()); c < a.table.Len(); c = a.table.skipNew(c+1, a.table.Len()) {
			w := a.table.Load(c)
			if w == 0 {
				continue
			}
			if w.State() == Failed {
				if !dead {
					return fmt.Errorf("%w: %s: chunk %d is FAILED in a whole snapshot", ErrState, a.orig.Name(), c)
				}
				continue
			}
			r := w.Region()
			if o, ok := owners[r]; ok {
				return fmt.Errorf("%w: region %d holds chunk %d of %s and chunk %d of %s", ErrState, r, o.chunk, o.area.orig.Name(), c, a.orig.Name())
			}
			owners[r] = owner{a, c}
			if r >= l.next || r >= l.state.capacity() {
				return fmt.Errorf("%w: %s: chunk %d in region %d, next is %d, capacity %d", ErrState, a.orig.Name(), c, r, l.next, l.state.capacity())
			}
			if s := l.slot(r); w.State() == InMemory && !dead && (s.area != a || s.chunk != c || s.state == slotFree) {
				return fmt.Errorf("%w: %s: chunk %d is in memory, but not in the slot of region %d", ErrState, a.orig.Name(), c, r)
			}
		}
	}
	for i := range l.slots {
		s := &l.slots[i]
		if s.waiters.head != nil {
			return fmt.Errorf("%w: slot %d has waiters", ErrState, i)
		}
		if !dead && s.state != slotFree && s.state != slotDead {
			return fmt.Errorf("%w: slot %d is in state %d with nothing under way", ErrState, i, s.state)
		}
	}
	return nil
}
