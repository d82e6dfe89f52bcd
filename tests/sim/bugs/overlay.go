package bugs

import (
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// engine are the files that get places; only they have bugs. Those of the simulator play the
// daemon's part.
var engine = []string{
	"cbtmap/*.go", "diffarea/*.go", "filter/*.go", "intentlog/*.go", "snapimage/*.go", "snapshots/stage.go", "snapshots/takepage.go",
	"tests/sim/append.go", "tests/sim/cut.go", "tests/sim/device.go", "tests/sim/left.go", "tests/sim/note.go", "tests/sim/record.go", "tests/sim/snapshot.go", "tests/sim/state.go",
}

// The copies import switches, which then says so of itself.
const (
	module   = "github.com/ublk-blksnap/ublk-blksnap/"
	switches = "tests/sim/mutation"
	built    = "package mutation\n\nfunc init() { Built = true }\n"
)

// Overlay is the files to build instead of those of the module in root, by path: copies of the engine's files with all
// bugs and places. The error names every edit that does not fit.
func Overlay(root fs.FS) (map[string]string, error) { return overlay(root, All()) }

func overlay(root fs.FS, bugs []Bug) (map[string]string, error) {
	copies := map[string]string{switches + "/built.go": built}
	seen := make(map[string]bool)
	var errs []error
	for _, pattern := range engine {
		names, err := fs.Glob(root, pattern)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			seen[name] = true
			text, err := fs.ReadFile(root, name)
			if err != nil {
				return nil, err
			}
			mutated, err := mutate(name, string(text), bugs)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			if mutated, err = place(name, mutated); err != nil {
				return nil, err
			}
			if mutated != string(text) {
				copies[name] = mutated
			}
		}
	}
	for _, b := range bugs {
		for _, e := range b.edits {
			if !seen[e.file] {
				errs = append(errs, fmt.Errorf("%s: %s: no such file in the engine", b.Name, e.file))
			}
		}
	}
	return copies, errors.Join(errs...)
}

// source is a parsed file.
type source struct {
	text string
	set  *token.FileSet
	ast  *ast.File
}

func parseSource(name, text string) (*source, error) {
	s := &source{text: text, set: token.NewFileSet()}
	var err error
	s.ast, err = parser.ParseFile(s.set, name, text, parser.SkipObjectResolution)
	return s, err
}

// at is p as an index of text.
func (s *source) at(p token.Pos) int { return s.set.PositionFor(p, false).Offset }

func (s *source) of(n ast.Node) string { return s.text[s.at(n.Pos()):s.at(n.End())] }

// functions are those with a body, by receiver and name.
func (s *source) functions() map[string]*ast.FuncDecl {
	found := make(map[string]*ast.FuncDecl)
	for _, d := range s.ast.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Body == nil {
			continue
		}
		key := f.Name.Name
		if f.Recv != nil {
			key = s.of(f.Recv.List[0].Type) + "." + key
		}
		found[key] = f
	}
	return found
}

// splice puts text in the place of [from, to).
type splice struct {
	from, to int
	text     string
}

func (s *source) with(splices []splice) string {
	slices.SortStableFunc(splices, func(a, b splice) int { return a.from - b.from })
	var b strings.Builder
	done := 0
	for _, p := range splices {
		b.WriteString(s.text[done:p.from] + p.text)
		done = p.to
	}
	return b.String() + s.text[done:]
}

// mutate is a file with all bugs.
func mutate(name, text string, bugs []Bug) (string, error) {
	s, err := parseSource(name, text)
	if err != nil {
		return "", err
	}
	var splices []splice
	var mutants strings.Builder
	var errs []error
	for _, b := range bugs {
		if !slices.ContainsFunc(b.edits, func(e edit) bool { return e.file == name }) {
			continue
		}
		changed, mutant, err := b.apply(name, s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", b.Name, name, err))
			continue
		}
		for _, key := range changed {
			was, is := s.functions()[key], mutant.functions()[key]
			as := is.Name.Name + "_" + b.Name
			body := mutant.of(is)
			at := mutant.at(is.Name.Pos()) - mutant.at(is.Pos())
			fmt.Fprintf(&mutants, "\n%s%s%s\n", body[:at], as, body[at+len(is.Name.Name):])
			open := s.at(was.Body.Lbrace) + 1
			splices = append(splices, splice{open, open, fmt.Sprintf(" if mutation.Is(%q) { %s };", b.Name, instead(was, as))})
		}
	}
	return s.with(splices) + mutants.String(), errors.Join(errs...)
}

// apply makes b's edits and names the functions that they change.
func (b *Bug) apply(name string, s *source) (changed []string, mutant *source, err error) {
	text := s.text
	for _, e := range b.edits {
		if e.file != name {
			continue
		}
		if e.old == "" {
			return nil, nil, fmt.Errorf("no line to find it by:\n%s", e.new)
		}
		if n := strings.Count(text, "\n"+e.old); n != 1 {
			return nil, nil, fmt.Errorf("not once but %d times in the file:\n%s", n, e.old)
		}
		from := strings.Index(s.text, "\n"+e.old) + 1
		key := ""
		for k, f := range s.functions() {
			if s.at(f.Pos()) <= from && from+len(e.old)-1 <= s.at(f.End()) {
				key = k
			}
		}
		if key == "" {
			return nil, nil, fmt.Errorf("not within one function:\n%s", e.old)
		}
		if !slices.Contains(changed, key) {
			changed = append(changed, key)
		}
		text = strings.Replace(text, "\n"+e.old, "\n"+e.new, 1)
	}
	if mutant, err = parseSource(name, text); err != nil {
		return nil, nil, err
	}
	clean, err := format.Source([]byte(text))
	if err == nil && string(clean) != text {
		err = errors.New("gofmt would change what the edits make of it")
	}
	if err != nil {
		return nil, nil, err
	}
	return changed, mutant, nil
}

// instead are the statements that call another function in the place of f.
func instead(f *ast.FuncDecl, as string) string {
	call := as
	if f.Recv != nil {
		call = f.Recv.List[0].Names[0].Name + "." + as
	}
	var args []string
	for _, p := range f.Type.Params.List {
		for _, n := range p.Names {
			args = append(args, n.Name)
		}
	}
	call += "(" + strings.Join(args, ", ") + ")"
	if f.Type.Results == nil {
		return call + "; return"
	}
	return "return " + call
}

// place is a file with its places, and the import that they and the switches of bugs need.
//
// Memory that outlives the process is changed by the functions of sync/atomic, and nothing else is: what is the process's
// own has atomic types. So each such store is one between two places to die. What the change map writes in larger pieces
// it tells layout.stored. Another thread comes in between before a lock is taken.
func place(name, text string) (string, error) {
	s, err := parseSource(name, text)
	if err != nil {
		return "", err
	}
	var splices []splice
	ast.Inspect(s.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			if of, f := selected(n); of == "atomic" && !strings.HasPrefix(f, "Load") {
				splices = append(splices, splice{s.at(n.Pos()), s.at(n.Pos()) + len(of), path.Base(switches)})
			}
		case *ast.ExprStmt:
			call, _ := n.X.(*ast.CallExpr)
			switch _, f := selected(call); f {
			case "stored":
				splices = append(splices, splice{s.at(n.Pos()), s.at(n.Pos()), "mutation.Point(); "})
			case "Lock":
				splices = append(splices, splice{s.at(n.Pos()), s.at(n.Pos()), "mutation.Yield(); "})
			}
		}
		return true
	})
	if len(splices) > 0 || strings.Contains(text, "mutation.Is(") {
		end := s.at(s.ast.Name.End())
		splices = append(splices, splice{end, end, fmt.Sprintf("; import %q", module+switches)})
	}
	return s.with(splices), nil
}

// selected takes a call of x.f apart; x is "" if it is not a name.
func selected(call *ast.CallExpr) (x, f string) {
	if call == nil {
		return "", ""
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return "", ""
	}
	if id, ok := sel.X.(*ast.Ident); ok {
		x = id.Name
	}
	return x, sel.Sel.Name
}
