package statefile

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

type thing struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

func TestReadWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if _, _, err := Read(path, "thing", 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
	for n := range 3 {
		want := thing{"a\nname", n}
		if err := os.WriteFile(path+".new", []byte("of a writer that died"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, "thing", 2, want); err != nil {
			t.Fatal(err)
		}
		body, version, err := Read(path, "thing", 3)
		var got thing
		if err != nil || version != 2 || json.Unmarshal(body, &got) != nil || got != want {
			t.Errorf("%+v of version %d, %v; want %+v", got, version, err, want)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("there are %v, %v", left, err)
	}
	// A writer that fails leaves what was there.
	if err := Write(path, "thing", 2, func() {}); err == nil {
		t.Error("a function was written")
	}
	if _, _, err := Read(path, "thing", 2); err != nil {
		t.Error(err)
	}
}

// TestDamaged: no file of which a byte is missing, added or another is read.
func TestDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Write(path, "thing", 1, thing{"name", 12345}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, text []byte) {
		t.Helper()
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if body, version, err := Read(path, "thing", 1); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNewer) {
			t.Errorf("%s: %q of version %d, %v", what, body, version, err)
		}
	}
	for n := range whole {
		refused("cut off", whole[:n])
		for bit := range 8 {
			flipped := bytes.Clone(whole)
			flipped[n] ^= 1 << bit
			refused("flipped", flipped)
		}
	}
	refused("longer", append(bytes.Clone(whole), '\n'))
	refused("foreign", []byte("#!/bin/sh\nexit 0\n"))
	refused("another kind", frame("things", 1, []byte(`{}`)))
	refused("without a version", frame("thing", 0, []byte(`{}`)))
	refused("too large", make([]byte, maxSize+1))

	if err := Write(path, "thing", 7, thing{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Read(path, "thing", 6); !errors.Is(err, ErrNewer) {
		t.Errorf("of the future: %v", err)
	}
}

// TestUnmarshal: a field that this program does not know is not passed over.
func TestUnmarshal(t *testing.T) {
	var v thing
	if err := Unmarshal("file", []byte(`{"name":"a","n":1}`), &v); err != nil || v != (thing{"a", 1}) {
		t.Errorf("%+v, %v", v, err)
	}
	for _, body := range []string{`{"name":"a","n":1,"more":2}`, `{"name":1}`, `{`, ``} {
		if err := Unmarshal("file", []byte(body), &v); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", body, err)
		}
	}
}

// TestForeign: what others own, may write, or know by another name is not read.
func TestForeign(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"readable by others": func(path string) error { return os.Chmod(path, 0o604) },
		"writable by all":    func(path string) error { return os.Chmod(path, 0o622) },
		"another name":       func(path string) error { return os.Link(path, path+"2") },
		"a link": func(path string) error {
			return errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path))
		},
		"a pipe":      func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
		"a directory": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"another's": func(path string) error {
			if os.Geteuid() != 0 {
				return os.Chmod(path, 0o644) // refused for that
			}
			return os.Chown(path, 12345, 0)
		},
	} {
		path := filepath.Join(t.TempDir(), "file")
		if err := errors.Join(Write(path, "thing", 1, thing{}), change(path)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Read(path, "thing", 1); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
