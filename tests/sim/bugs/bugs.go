// Package bugs is the table of the engine's deliberate bugs. It makes copies of the engine's files that have the bugs.
//
// There is a .diff file for each package of the engine, and one for the part of the daemon that the simulator plays. A bug is an entry in one of them. The entry has the bug's name
// and what the bug does wrong, and then its edits, as a diff has them but without line numbers.
//
//	ForwardEarly sends a write to the original before its copies have landed.
//	@@ filter/filter.go
//	 	req.end = req.protect(req.pos, req.kernel.Off+req.kernel.Len)
//	-	req.chunkCopied()
//	+	req.forward(req.pos, req.end)
//
// The lines that an edit takes away or keeps must stand in their file exactly once, within one function. With the edits of
// one bug the file must be as gofmt would write it.
//
// Overlay puts all bugs into one set of copies. A function that a bug changes stays where it is, and begins with a switch.
// The function with the bug stands at the end of the file. So the edits of two bugs may touch the same lines, and the lines
// of the product keep their numbers. After that, by rule, Overlay adds the places where the process can die and where
// another thread can come in between: see place.
package bugs

import (
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Bug is a deliberate bug.
type Bug struct {
	Name  string
	Why   string // what it does wrong, to be read after the name
	Log   bool   // it shows only with a write-intent log
	Steps bool   // it shows only if the steps of the records come one by one
	edits []edit
}

// edit replaces lines of a file of the engine.
type edit struct {
	file     string
	old, new string
}

//go:embed *.diff
var table embed.FS

// All is every bug.
func All() (all []Bug) {
	files, err := fs.Glob(table, "*.diff")
	if err != nil {
		panic(err)
	}
	for _, name := range files {
		text, err := table.ReadFile(name)
		if err != nil {
			panic(err)
		}
		bugs, err := parse(string(text))
		if err != nil {
			panic(fmt.Sprintf("tests/sim/bugs/%s: %v", name, err))
		}
		for i := range bugs {
			bugs[i].Log = name == "intentlog.diff" || name == "state.diff" ||
				slices.ContainsFunc(bugs[i].edits, func(e edit) bool { return strings.Contains(e.new+e.old, ".intent") })
			bugs[i].Steps = name == "record.diff"
		}
		all = append(all, bugs...)
	}
	return all
}

// parse reads entries. An empty line within an edit is an empty line of the file.
func parse(text string) (bugs []Bug, err error) {
	empty := 0
	for n, line := range strings.Split(text, "\n") {
		if line == "" {
			empty++
			continue
		}
		var e *edit
		if len(bugs) > 0 && len(bugs[len(bugs)-1].edits) > 0 {
			edits := bugs[len(bugs)-1].edits
			e = &edits[len(edits)-1]
		}
		switch mark, rest := line[0], line[1:]; {
		case mark == '@' && len(bugs) > 0:
			b := &bugs[len(bugs)-1]
			b.edits = append(b.edits, edit{file: strings.TrimPrefix(rest, "@ ")})
		case strings.IndexByte(" -+", mark) >= 0 && e != nil:
			gap := strings.Repeat("\n", empty)
			if e.old == "" && e.new == "" {
				gap = ""
			}
			e.old += gap
			e.new += gap
			if mark != '+' {
				e.old += rest + "\n"
			}
			if mark != '-' {
				e.new += rest + "\n"
			}
		case mark >= 'A' && mark <= 'Z':
			name, why, _ := strings.Cut(line, " ")
			bugs = append(bugs, Bug{Name: name, Why: why})
		default:
			return nil, fmt.Errorf("line %d: neither a bug nor part of one: %q", n+1, line)
		}
		empty = 0
	}
	return bugs, nil
}
