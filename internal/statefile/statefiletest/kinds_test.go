package statefiletest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../../.."

// writers are the functions that make files, by package, and the kinds of these files: or
// else why what they make is not believed by another daemon.
var writers = map[string]string{
	"daemon.writeFormat":       "format",
	"daemon.setGuard":          "start",
	"daemon.writeDeviceRecord": "device",
	"daemon.saveLocked":        "events",
	"daemon.countRecovery":     "recoveries",
	"daemon.noteRemoved":       "removed",
	"daemon.changeFrozen":      "frozen",
	"daemon.beforeTakeOf":      "hooks",
	"daemon.saveOutdated":      "outdated",
	"daemon.saveRecord":        "daemon",
	"daemon.openCounters":      "counters",
	"snapshots.keepNote":       "note",
	"snapshots.update":         "snapshot",
	"snapshots.file":           "log, pool, words, take, key",
	"cbtmap.prepare":           "change map",
	"cbtstate.create":          "saved record, saved map, used record, running record, base, intent log",
	"statefile.Write":          "- is what the others call",
	"snapshots.hold":           "- an empty file below a mount",
	"snapshots.makeFile":       "- storage",
	"daemon.Guard":             "- the name of its process",
	"daemon.leaveGroups":       "- a control group of the kernel's",
	"daemon.rescan":            "- an event of the kernel's",
	"daemon.writeDurably":      "- configuration, which is root's to write",
	"daemon.write":             "- is what note calls",
	"daemon.note":              "- what udev reads",
	"daemon.openLog":           "- a log",
	"daemon.lock":              "- a lock, with the number of the process for people",
	"daemon.lockBoot":          "- a lock",
}

// TestEveryKind: each function that makes a file is known here with its kinds, and each
// kind has a test that damages it.
func TestEveryKind(t *testing.T) {
	tried := map[string]bool{}
	call := regexp.MustCompile(`(?:Kind: |Statefile\(t, |try\()"([^"]+)"`)
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && filepath.Base(path) == "damage_test.go" {
			text, err := os.ReadFile(path)
			for _, m := range call.FindAllStringSubmatch(string(text), -1) {
				tried[m[1]] = true
			}
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Sorted(maps.Keys(tried)), slices.Sorted(slices.Values(Kinds)); !slices.Equal(got, want) {
		t.Errorf("tests damage %q, and there are %q", got, want)
	}
	found := map[string]bool{}
	for _, dir := range []string{"daemon", "snapshots", "cbtmap", "intentlog", "internal/cbtstate", "internal/statefile"} {
		files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatal(dir, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			for _, name := range makers(t, file) {
				found[name] = true
				if writers[name] == "" {
					t.Errorf("%s: %s makes a file: which kind is that?", file, name)
				}
			}
		}
	}
	known := map[string]bool{}
	for name, kinds := range writers {
		if !found[name] {
			t.Errorf("%s makes no file", name)
		}
		if !strings.HasPrefix(kinds, "- ") {
			for _, kind := range strings.Split(kinds, ", ") {
				known[kind] = true
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(known)), slices.Sorted(slices.Values(Kinds)); !slices.Equal(got, want) {
		t.Errorf("files are made of %q, and there are %q", got, want)
	}
}

// makers are the functions of a file that make files.
func makers(t *testing.T, path string) (names []string) {
	t.Helper()
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, decl := range file.Decls {
		f, ok := decl.(*ast.FuncDecl)
		if !ok || f.Body == nil {
			continue
		}
		makes := false
		ast.Inspect(f.Body, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			s, ok := c.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			of := ""
			if id, ok := s.X.(*ast.Ident); ok {
				of = id.Name
			}
			name := of + "." + s.Sel.Name
			switch s.Sel.Name { // of a run directory
			case "write":
				makes = makes || len(c.Args) == 3
			case "file", "openAt":
				name = "os.OpenFile"
			}
			switch name {
			case "statefile.Write", "statefile.Encode", "os.WriteFile", "os.Create", "os.CreateTemp":
				makes = true
			case "os.OpenFile", "unix.Open", "unix.Openat":
				for _, arg := range c.Args {
					makes = makes || strings.Contains(fmt.Sprint(flags(arg)), "O_CREAT")
				}
			}
			return true
		})
		if makes {
			names = append(names, file.Name.Name+"."+f.Name.Name)
		}
	}
	return names
}

// flags are the names in an expression.
func flags(e ast.Expr) (names []string) {
	ast.Inspect(e, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok {
			names = append(names, id.Name)
		}
		return true
	})
	return names
}
