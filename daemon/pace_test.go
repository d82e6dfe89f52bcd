package daemon

import (
	"testing"
	"time"
)

// TestPace: the rate is that of the last minute, and nothing lasts longer than it can be
// said.
func TestPace(t *testing.T) {
	var p pace
	at := time.Now()
	if r := p.rate(at, 5); r != 0 {
		t.Errorf("rate %d of nothing", r)
	}
	for i := range int64(100) {
		p.add(at, i*i*1000)
		at = at.Add(paceEach)
	}
	// 99² - 69² thousand bytes in 60 seconds, and nothing in the two after that.
	if r, want := p.rate(at, 99*99*1000), int64((99*99-69*69)*1000/62); r != want {
		t.Errorf("rate %d, want %d", r, want)
	}
	if n := len(p.looks); n > int(paceWindow/paceEach)+1 {
		t.Errorf("%d looks are kept", n)
	}
	if r := p.rate(at.Add(time.Hour), 99*99*1000); r != 0 {
		t.Errorf("rate %d after an hour", r)
	}
	for _, c := range []struct {
		room, rate int64
		want       time.Duration
	}{{100, 0, 0}, {100, 10, 10 * time.Second}, {0, 10, time.Second}, {-5, 10, time.Second}, {1 << 62, 1, 100 * 365 * 24 * time.Hour}} {
		if got := lasts(c.room, c.rate); got != c.want {
			t.Errorf("%d bytes at %d last %v, want %v", c.room, c.rate, got, c.want)
		}
	}
	if p := percent(8, 10); p != 80 {
		t.Errorf("%d percent", p)
	}
}
