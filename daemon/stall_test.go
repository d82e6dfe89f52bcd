package daemon

import "testing"

// TestStall: the looks at a log that stands still are counted, until it gets on or nobody
// waits for it.
func TestStall(t *testing.T) {
	var s stall
	still := func(n int) {
		t.Helper()
		for i := range n {
			if got := s.look(true, 7); got != i+1 {
				t.Fatalf("%d looks, want %d", got, i+1)
			}
		}
	}
	for _, c := range []struct {
		waits bool
		done  uint64
	}{{true, 7}, {false, 7}, {true, 8}, {false, 9}} {
		if got := s.look(c.waits, c.done); got > 1 {
			t.Errorf("%d looks at %+v", got, c)
		}
		if got := s.look(false, 7); got != 0 {
			t.Errorf("%d looks although nobody waits", got)
		}
		still(3)
	}
	if got := s.look(true, 8); got != 0 {
		t.Errorf("%d looks after it has got on", got)
	}
}
