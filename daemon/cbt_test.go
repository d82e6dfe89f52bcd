package daemon

import (
	"context"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestChangesSince: what is asked for is answered, or refused for its own
// reason; a number of one generation never means the take of another.
func TestChangesSince(t *testing.T) {
	m, err := cbtmap.NewMemory(1<<20, cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{devices: map[string]*device{"data": {cbt: m}}}
	first := m.Switch()
	m.Mark(0, 512)
	m.Switch()
	var got []control.Range
	ask := func(t control.Take) (control.CBTInfo, error) {
		return d.CBTChanges(context.Background(), control.ChangesRequest{Device: "data", Since: t}, func(x control.Range) error {
			got = append(got, x)
			return nil
		})
	}
	if i, err := ask(control.Take{Generation: first.GenerationID, Number: 1}); err != nil || len(got) != 1 || i.Take != (control.Take{Generation: first.GenerationID, Number: 2}) {
		t.Errorf("since 1: %+v, %v, %v", i, got, err)
	}
	for _, n := range []uint64{3, 255, 256, 256 + 1, 1<<64 - 1} {
		if _, err := ask(control.Take{Generation: first.GenerationID, Number: n}); control.CodeOf(err) != control.NotFound {
			t.Errorf("since %d, not yet taken: %v", n, err)
		}
	}
	if _, err := ask(control.Take{}); control.CodeOf(err) != control.Invalid {
		t.Errorf("since nothing: %v", err)
	}
	// Another daemon has begun another generation, which has as many takes.
	m.NewGeneration()
	m.Switch()
	m.Switch()
	for _, n := range []uint64{0, 1, 2, 3, 1 << 40} {
		if _, err := ask(control.Take{Generation: first.GenerationID, Number: n}); control.CodeOf(err) != control.GenerationEnded {
			t.Errorf("since %d of a generation that has ended: %v", n, err)
		}
	}
}
