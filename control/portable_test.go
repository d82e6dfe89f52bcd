package control

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestImportsNothingOfOurs: who imports the API gets no engine, no ring and no
// driver with it, whatever system it is for.
func TestImportsNothingOfOurs(t *testing.T) {
	allowed := []string{"github.com/ublk-blksnap/ublk-blksnap/control", "github.com/google/uuid", "golang.org/x/sys/unix"}
	for _, system := range [][2]string{{"linux", "amd64"}, {"linux", "arm64"}, {"darwin", "arm64"}} {
		out := goTool(t, ".", system, "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".")
		for _, path := range strings.Fields(out) {
			if !slices.Contains(allowed, path) {
				t.Errorf("for %s: imports %s", system, path)
			}
		}
	}
}

// TestBuildsElsewhere builds a program that has a module of its own and imports
// the API.
func TestBuildsElsewhere(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	// With the versions of this module, which are there.
	_, required, _ := strings.Cut(string(mod), "\n")
	dir := t.TempDir()
	sum, err := os.ReadFile("../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"go.mod": "module example.com/backup\n" + required +
			"\nrequire github.com/ublk-blksnap/ublk-blksnap v0.0.0\nreplace github.com/ublk-blksnap/ublk-blksnap => " + root + "\n",
		"go.sum": string(sum),
		"main.go": `package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func main() {
	var api control.API = control.NewClient(control.DefaultSocket)
	_, err := api.Devices(context.Background())
	fmt.Println(control.CodeOf(err), errors.Is(err, syscall.EBUSY))
}
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, system := range [][2]string{{"linux", "amd64"}, {"linux", "arm64"}, {"darwin", "arm64"}} {
		goTool(t, dir, system, "build", "-mod=mod", "-o", os.DevNull, ".")
	}
}

func goTool(t *testing.T, dir string, system [2]string, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOOS="+system[0], "GOARCH="+system[1], "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: go %s: %v\n%s", system, strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}
