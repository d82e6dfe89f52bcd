package control

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/uuid"
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
