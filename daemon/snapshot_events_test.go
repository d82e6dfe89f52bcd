package daemon

import "testing"

// TestStall: a log that stands still is given up after as many looks as there are within
// the limit, one that gets on or that nobody waits for never.
func TestStall(t *testing.T) {
	var s stall
	still := func(n int) {
		t.Helper()
		for i := range n {
			if s.look(true, 7) {
				t.Fatalf("given up after %d looks", i+1)
			}
		}
	}
	for _, c := range []struct {
		waits bool
		done  uint64
	}{{true, 7}, {false, 7}, {true, 8}, {false, 9}} {
		if s.look(c.waits, c.done) {
			t.Errorf("given up at %+v", c)
		}
		if s.look(false, 7) {
			t.Error("given up although nobody waits")
		}
		still(looks - 1)
	}
	for range 2 {
		if !s.look(true, 7) {
			t.Error("not given up")
		}
	}
	if s.look(true, 8) {
		t.Error("given up after it has got on")
	}
}
