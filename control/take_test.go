package control

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
)

const takeText = "02e091ec-dae8-41ba-9dae-4e66f1473dd6:18446744073709551615"

func TestTakeToken(t *testing.T) {
	want := Take{uuid.MustParse("02e091ec-dae8-41ba-9dae-4e66f1473dd6"), 1<<64 - 1}
	if got, err := ParseTake(takeText); err != nil || got != want || got.String() != takeText {
		t.Errorf("%v, %v", got, err)
	}
	b, err := json.Marshal(SnapshotImage{Take: &want})
	if err != nil || !strings.Contains(string(b), `"take":"`+takeText+`"`) {
		t.Errorf("%s, %v", b, err)
	}
	var back SnapshotImage
	if err := json.Unmarshal(b, &back); err != nil || *back.Take != want {
		t.Errorf("%+v, %v", back.Take, err)
	}
	id := want.Generation.String()
	for _, s := range []string{"", "3", "-1", id, id + ":", ":3", id + ":-1", id + ":x", id + ":+1", id + ":18446744073709551616",
		"{" + id + "}:3", "urn:uuid:" + id + ":3", strings.ReplaceAll(id, "-", "") + ":3", id + ":3:4", id + ": 3"} {
		_, err := ParseTake(s)
		if CodeOf(err) != Invalid || !strings.Contains(err.Error(), "GENERATION:N") {
			t.Errorf("%q: %v", s, err)
		}
	}
	// A number in JSON, as older clients had it, gets the same advice.
	for _, body := range []string{`{"device":"a","since":3}`, `{"device":"a","since":"3"}`, `{"device":"a","since":{}}`} {
		var r ChangesRequest
		if err := json.Unmarshal([]byte(body), &r); err == nil || !strings.Contains(err.Error(), "GENERATION:N") {
			t.Errorf("%s: %v", body, err)
		}
	}
}

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
	var got []Range
	ask := func(t Take) (CBTInfo, error) {
		return d.CBTChanges(context.Background(), ChangesRequest{Device: "data", Since: t}, func(x Range) error {
			got = append(got, x)
			return nil
		})
	}
	if i, err := ask(Take{first.GenerationID, 1}); err != nil || len(got) != 1 || i.Take != (Take{first.GenerationID, 2}) {
		t.Errorf("since 1: %+v, %v, %v", i, got, err)
	}
	for _, n := range []uint64{3, 255, 256, 256 + 1, 1<<64 - 1} {
		if _, err := ask(Take{first.GenerationID, n}); CodeOf(err) != NotFound {
			t.Errorf("since %d, not yet taken: %v", n, err)
		}
	}
	if _, err := ask(Take{}); CodeOf(err) != Invalid {
		t.Errorf("since nothing: %v", err)
	}
	// Another daemon has begun another generation, which has as many takes.
	m.NewGeneration()
	m.Switch()
	m.Switch()
	for _, n := range []uint64{0, 1, 2, 3, 1 << 40} {
		if _, err := ask(Take{first.GenerationID, n}); CodeOf(err) != GenerationEnded {
			t.Errorf("since %d of a generation that has ended: %v", n, err)
		}
	}
}
