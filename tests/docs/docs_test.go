package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ublk-blksnap/ublk-blksnap/"

// root is the top of the tree.
const root = "../.."

func text(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestPackageTable: every package stands in ARCHITECTURE's table, and imports only
// those that stand below it.
func TestPackageTable(t *testing.T) {
	var table []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z/-]+)` \\|").FindAllStringSubmatch(text(t, "ARCHITECTURE.md"), -1) {
		table = append(table, strings.TrimSuffix(row[1], "/"))
	}
	// A folder of the table stands for the packages below it too.
	place := func(path string) int {
		for ; path != "."; path = filepath.Dir(path) {
			if i := slices.Index(table, path); i >= 0 {
				return i
			}
		}
		return -1
	}
	list := exec.Command("go", "list", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, "./...")
	list.Dir = root
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		words := strings.Fields(line)
		from := strings.TrimPrefix(words[0], module)
		i := place(from)
		if i < 0 {
			t.Errorf("package %s is not in the table", from)
			continue
		}
		seen++
		if strings.HasPrefix(from, "tests/") {
			continue // stands outside of the order
		}
		for _, to := range words[1:] {
			if to, ours := strings.CutPrefix(to, module); ours && place(to) < i {
				t.Errorf("package %s imports %s, which stands above it", from, to)
			}
		}
	}
	if seen < 20 {
		t.Errorf("only %d packages were looked at", seen)
	}
}

// TestNamedFiles: the Go files, folders and tests that the texts name exist.
func TestNamedFiles(t *testing.T) {
	code := regexp.MustCompile("`([^`\n]+)`")
	file := regexp.MustCompile(`^[a-z][\w./-]*(\.(go|md|sh|diff|service|rules|conf)|/[\w-]+/)$`)
	tests := allTests(t)
	named := 0
	for _, name := range append(pages(t), "ARCHITECTURE.md", "CONTRIBUTING.md", "tests/sim/README.md", "tests/bench/README.md") {
		s := text(t, name)
		for _, m := range code.FindAllStringSubmatch(s, -1) {
			if !file.MatchString(m[1]) {
				continue
			}
			named++
			// A text names files from the top, or from its own folder.
			_, err1 := os.Stat(filepath.Join(root, m[1]))
			_, err2 := os.Stat(filepath.Join(root, filepath.Dir(name), m[1]))
			if err1 != nil && err2 != nil && !shortName(m[1]) {
				t.Errorf("%s names %s, which does not exist", name, m[1])
			}
		}
		for _, m := range regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(s, -1) {
			named++
			if m != "TestName" && !slices.Contains(tests, m) { // TestName is any test's
				t.Errorf("%s names %s: there is no such test", name, m)
			}
		}
	}
	if named < 60 {
		t.Errorf("only %d names were looked at", named)
	}
}

// shortName says whether a file is called by its last name, which some folder has.
func shortName(name string) bool {
	if strings.Contains(strings.TrimSuffix(name, "/"), "/") {
		return false
	}
	for _, pattern := range []string{"*/", "*/*/", "*/*/*/"} {
		if found, _ := filepath.Glob(filepath.Join(root, pattern+name)); len(found) > 0 {
			return true
		}
	}
	return false
}

// allTests are the names of all tests of the tree.
func allTests(t *testing.T) []string {
	t.Helper()
	grep := exec.Command("git", "grep", "-hoE", `^func Test\w+`, "--", "*_test.go")
	grep.Dir = root
	out, err := grep.Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		names = append(names, strings.TrimPrefix(strings.TrimSpace(line), "func "))
	}
	return names
}

// TestLinks: what the texts link to is there, and has the heading that a link names.
func TestLinks(t *testing.T) {
	for _, name := range append(pages(t), "ARCHITECTURE.md", "CONTRIBUTING.md") {
		for _, m := range regexp.MustCompile(`\]\(([^)#]*)(#[^)]*)?\)`).FindAllStringSubmatch(text(t, name), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file := filepath.Join(filepath.Dir(name), m[1])
			if m[1] == "" {
				file = name
			}
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
			} else if m[2] != "" && !slices.Contains(headings(text(t, file)), m[2]) {
				t.Errorf("%s links to %s, which has no heading %s", name, m[1], m[2])
			}
		}
	}
	for _, page := range pages(t)[1:] {
		if !strings.Contains(text(t, "README.md"), "("+page+")") {
			t.Errorf("README.md does not link to %s", page)
		}
	}
}

// headings are those of a text, as links name them.
func headings(text string) (all []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		all = append(all, "#"+strings.ReplaceAll(strings.ToLower(regexp.MustCompile(`[^\w -]`).ReplaceAllString(m[1], "")), " ", "-"))
	}
	return all
}

// setupTools is a folder with all that setup.sh calls on a system without apt and without Go.
func setupTools(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	for _, name := range []string{"dirname", "cut", "sort", "sed", "head"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return bin
}

// TestSetupElsewhere: on a system without apt, setup.sh says what it wants, and does nothing.
func TestSetupElsewhere(t *testing.T) {
	bin := setupTools(t)
	for group, wants := range map[string][]string{
		"go":   {"not Debian", "nothing is installed", "go, 1.21 or newer"},
		"test": {"not Debian", "nothing is installed", "qemu-system-x86_64 ", " qemu-system-x86\n", "fio "},
	} {
		setup := exec.Command("/bin/bash", filepath.Join(root, "tests/setup.sh"), group)
		setup.Env = []string{"PATH=" + bin}
		out, err := setup.CombinedOutput()
		if setup.ProcessState.ExitCode() != 1 {
			t.Errorf("setup.sh %s: %v: %s", group, err, out)
		}
		for _, want := range wants {
			if !strings.Contains(string(out), want) {
				t.Errorf("setup.sh %s does not say %q: %s", group, want, out)
			}
		}
	}
}

// TestSetupCertificates: for Go alone setup.sh wants a file of certificates, wherever the
// system has it that Go would look into.
func TestSetupCertificates(t *testing.T) {
	dir, bin := t.TempDir(), setupTools(t)
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte("#!/bin/sh\necho go1.26.0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, content string) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", text(t, "go.mod"))
	// A system whose /etc is in the folder.
	write("tests/setup.sh", strings.ReplaceAll(text(t, "tests/setup.sh"), "/etc/", dir+"/etc/"))
	setup := func() (int, string) {
		setup := exec.Command("/bin/bash", filepath.Join(dir, "tests/setup.sh"), "go")
		setup.Env = []string{"PATH=" + bin}
		out, _ := setup.CombinedOutput()
		return setup.ProcessState.ExitCode(), string(out)
	}
	if status, out := setup(); status != 1 || !strings.Contains(out, "/etc/ssl/certs/ca-certificates.crt ca-certificates\n") {
		t.Errorf("without certificates: status %d: %s", status, out)
	}
	for _, file := range []string{"ssl/certs/ca-certificates.crt", "pki/tls/certs/ca-bundle.crt", "ssl/ca-bundle.pem", "pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "ssl/cert.pem"} {
		write("etc/"+file, "")
		if status, out := setup(); status != 0 || out != "" {
			t.Errorf("with /etc/%s: status %d: %s", file, status, out)
		}
		if err := os.RemoveAll(filepath.Join(dir, "etc")); err != nil {
			t.Fatal(err)
		}
	}
}
