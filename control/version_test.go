package control_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestVersionStamp: the linker sets version and commit, as for a package. Without it the commit is the repository's, where
// the program is built in one.
func TestVersionStamp(t *testing.T) {
	dir := t.TempDir()
	main := filepath.Join(dir, "main.go")
	text := `package main

import "github.com/ublk-blksnap/ublk-blksnap/control"

func main() { print(control.Version, " ", control.Commit()) }
`
	if err := os.WriteFile(main, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const module = "github.com/ublk-blksnap/ublk-blksnap/control."
	said, err := exec.Command("go", "run", "-ldflags", "-X "+module+"Version=7.8.9 -X "+module+"commit=abc+", main).CombinedOutput()
	if err != nil || string(said) != "7.8.9 abc+" {
		t.Errorf("stamped: %q, %v", said, err)
	}
	said, err = exec.Command("go", "run", main).CombinedOutput()
	if err != nil || !regexp.MustCompile(`^\d+\.\d+\.\d+ $`).Match(said) {
		t.Errorf("not stamped, outside of a repository: %q, %v", said, err)
	}
}
