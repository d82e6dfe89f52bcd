package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCopies: what is copied to memory is used as a whole, or not at all.
func TestCopies(t *testing.T) {
	dir, from := RunDir(t.TempDir()), t.TempDir()
	at := func(name string) string { return filepath.Join(from, name) }
	if err := errors.Join(os.Mkdir(dir.State(), 0o700), os.WriteFile(at("program"), []byte("one"), 0o700), unix.Mkfifo(at("pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	has := func(program, config string) {
		t.Helper()
		p, err1 := os.ReadFile(dir.path(residentName))
		c, err2 := os.ReadFile(dir.path(residentConfigName))
		if string(p) != program || string(c) != config || errors.Join(err1, err2) != nil {
			t.Errorf("program %q, configuration %q, %v", p, c, errors.Join(err1, err2))
		}
	}
	if path, err := dir.makeResident(copyFile, at("program"), at("none")); err != nil || path != dir.path(residentName) {
		t.Errorf("without a configuration: %s, %v", path, err)
	}
	has("one", "")
	if err := errors.Join(os.WriteFile(at("program"), []byte("two"), 0o700), os.WriteFile(at("config"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if path, err := dir.makeResident(copyFile, at("program"), at("pipe")); err == nil {
		t.Errorf("with a configuration that can be read once: %s", path)
	}
	has("one", "")
	if err := dir.copyToMemory(copyFile, at("program"), at("config")); err != nil {
		t.Error(err)
	}
	has("one", "")
	if _, err := dir.useCopies(); err != nil {
		t.Error(err)
	}
	has("two", "x")
	if left, err := filepath.Glob(dir.path(residentName) + "*"); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
