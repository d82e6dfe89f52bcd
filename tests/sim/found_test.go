package sim

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/bugs"
)

// foundPath has a small case for each deliberate bug, below a line "bug NAME": to search for
// all of them takes minutes of a processor. If a case no longer finds its bug, because the
// engine does things in another order now, the test searches again; -sim.save writes the file
// anew. That generated cases find every bug is what make sim shows, which always searches.
const foundPath = "testdata/found.txt"

var (
	flagSearch = flag.Bool("sim.search", false, "search for every deliberate bug, whatever is in "+foundPath)
	flagSave   = flag.Bool("sim.save", false, "write what finds each deliberate bug to "+foundPath)
)

// foundCases is that file.
type foundCases struct{ cases map[string]Case }

func readFound(t *testing.T) *foundCases {
	t.Helper()
	f := &foundCases{make(map[string]Case)}
	text, err := os.ReadFile(foundPath)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split("\n"+string(text), "\nbug ")[1:] {
		name, rest, _ := strings.Cut(part, "\n")
		if f.cases[name], err = ParseCase(rest); err != nil {
			t.Fatalf("%s: %s: %v", foundPath, name, err)
		}
	}
	return f
}

// keep takes a case that finds a bug, made smaller.
func (f *foundCases) keep(bug string, c Case) {
	if *flagSave {
		f.cases[bug], _ = Shrink(c, 2*time.Second)
	}
}

// save is for -sim.save alone.
func (f *foundCases) save(t *testing.T) {
	t.Helper()
	if !*flagSave {
		return
	}
	var names []string
	for _, b := range bugs.All() {
		names = append(names, b.Name)
	}
	slices.Sort(names)
	var text strings.Builder
	for _, name := range names {
		if c, ok := f.cases[name]; ok {
			fmt.Fprintf(&text, "bug %s\n%v\n", name, c)
		}
	}
	if err := os.WriteFile(foundPath, []byte(text.String()), 0o644); err != nil {
		t.Error(err)
	}
}
