package bugs

import (
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

// gate is a file of an engine.
const gate = `package filter

import "sync/atomic"

func (g *gate) leave(n int) bool {
	if g.inflight -= n; g.inflight == 0 {
		g.mu.Lock()
		return true
	}
	return false
}

func (g *gate) put(v uint64) {
	atomic.StoreUint64(&g.word, atomic.LoadUint64(&g.old)+v)
}

var twice = 1 +
	1
`

const leaks = `LeaveEarly does not wait for the last.
@@ filter/gate.go
-	if g.inflight -= n; g.inflight == 0 {
+	if g.inflight -= n; g.inflight <= 1 {
 		g.mu.Lock()

LeaveNever counts nobody out.
@@ filter/gate.go
-	if g.inflight -= n; g.inflight == 0 {
-		g.mu.Lock()
-		return true
-	}
 	return false
`

func TestOverlay(t *testing.T) {
	bugs, err := parse(leaks)
	if err != nil {
		t.Fatal(err)
	}
	got, err := overlay(fstest.MapFS{"filter/gate.go": {Data: []byte(gate)}, "filter/gate_test.go": {Data: []byte("not Go")}}, bugs)
	if err != nil {
		t.Fatal(err)
	}
	want := `package filter; import "github.com/ublk-blksnap/ublk-blksnap/tests/sim/mutation"

import "sync/atomic"

func (g *gate) leave(n int) bool { if mutation.Is("LeaveEarly") { return g.leave_LeaveEarly(n) }; if mutation.Is("LeaveNever") { return g.leave_LeaveNever(n) };
	if g.inflight -= n; g.inflight == 0 {
		mutation.Yield(); g.mu.Lock()
		return true
	}
	return false
}

func (g *gate) put(v uint64) {
	mutation.StoreUint64(&g.word, atomic.LoadUint64(&g.old)+v)
}

var twice = 1 +
	1

func (g *gate) leave_LeaveEarly(n int) bool {
	if g.inflight -= n; g.inflight <= 1 {
		mutation.Yield(); g.mu.Lock()
		return true
	}
	return false
}

func (g *gate) leave_LeaveNever(n int) bool {
	return false
}
`
	if got["filter/gate.go"] != want {
		t.Errorf("the copy is:\n%s", got["filter/gate.go"])
	}
	if len(got) != 2 || got["tests/sim/mutation/built.go"] == "" {
		t.Errorf("%d files", len(got))
	}
}

func TestEditDoesNotFit(t *testing.T) {
	for want, edits := range map[string]string{
		"not once but 0 times":       "@@ filter/gate.go\n-\treturn 2\n+\treturn 3",
		"not once but 2 times":       "@@ filter/gate.go\n+\tpanic(1)\n }",
		"no line to find it by":      "@@ filter/gate.go\n+\tpanic(1)",
		"not within one function":    "@@ filter/gate.go\n-\t1\n+\t2",
		"not within one":             "@@ filter/gate.go\n-\treturn false\n }\n\n func (g *gate) put(v uint64) {",
		"gofmt would change":         "@@ filter/gate.go\n-\treturn false\n+\treturn  false",
		"expected operand":           "@@ filter/gate.go\n-\treturn false\n+\treturn *",
		"no such file in the engine": "@@ filter/queue.go\n-\treturn false",
	} {
		bugs, err := parse("Broken does not fit.\n" + edits)
		if err != nil {
			t.Fatal(err)
		}
		_, err = overlay(fstest.MapFS{"filter/gate.go": {Data: []byte(gate)}}, bugs)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Broken") {
			t.Errorf("%s\n%v, want %q", edits, err, want)
		}
	}
}

func TestTableDoesNotRead(t *testing.T) {
	for _, text := range []string{"@@ filter/gate.go", " \treturn", "Bug does\n-\treturn", "lower case"} {
		if _, err := parse(text); err == nil {
			t.Errorf("%q is read", text)
		}
	}
}

// TestPlaces: the rules find what they are there for, in the engine as it is.
func TestPlaces(t *testing.T) {
	copies, err := Overlay(os.DirFS("../../.."))
	if err != nil {
		t.Fatal(err)
	}
	for file, places := range map[string][]string{
		"cbtmap/map.go":       {"|| mutation.CompareAndSwapUint64(&words[w],", "\tmutation.Yield(); m.mu.Lock()\n"},
		"cbtmap/layout.go":    {"\tmutation.StoreUint64(&l.words[word], v)\n", "\t\tdo(from, min(from+piece, n))\n\t\tmutation.Point(); l.stored()\n"},
		"diffarea/area.go":    {"\tmutation.Yield(); l.mu.Lock()\n"},
		"diffarea/log.go":     {"\tmutation.Yield(); l.mu.Lock()\n"},
		"diffarea/storage.go": {" mutation.StoreUint64(&s.fields[i], v) }\n"},
		"diffarea/word.go":    {"\tmutation.StoreUint64(&t.words[c], uint64(w))\n"},
	} {
		for _, place := range places {
			if !strings.Contains(copies[file], place) {
				t.Errorf("%s: no %q", file, place)
			}
		}
	}
}
