package snapimage

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestLeftoverStorage is a daemon that was killed: the file with copied data
// goes, one that has taken its name since stays.
func TestLeftoverStorage(t *testing.T) {
	base := t.TempDir()
	s, err := newState(filepath.Join(base, "state", "id"))
	if err != nil {
		t.Fatal(err)
	}
	stored := filepath.Join(base, "stored")
	replaced := filepath.Join(base, "replaced")
	var files []*storage
	for _, path := range []string{stored, replaced} {
		st, err := openStorage(path, 0, 512)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.remember(st); err != nil {
			t.Fatal(err)
		}
		files = append(files, st)
	}
	other, err := os.Open(stored) // keeps the file's content in sight
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	secret := bytes.Repeat([]byte("secret!!"), 512)
	if err := os.WriteFile(stored, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(replaced+".new", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(replaced+".new", replaced); err != nil {
		t.Fatal(err)
	}
	for _, st := range files {
		st.file.Close()
	}

	if err := ClearLeftover(s.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stored); !os.IsNotExist(err) {
		t.Errorf("the storage file is still there: %v", err)
	}
	if st, err := other.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("who has the file open finds %d bytes, %v", st.Size(), err)
	}
	if b, err := os.ReadFile(replaced); string(b) != "mine" {
		t.Errorf("another file of that name now holds %q, %v", b, err)
	}
	if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// FuzzClearLeftover: whatever is on record, the state goes and the files of
// others stay.
func FuzzClearLeftover(f *testing.F) {
	f.Add([]byte(`{"path":"/nowhere/storage","dev":1,"ino":2}` + "\n"))
	f.Add([]byte(`{"path":"bystander","dev":0,"ino":0}{"path":`))
	f.Add([]byte(`{"path":"","dev":18446744073709551615,"ino":-1}`))
	f.Add([]byte("null\n[]\n{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		base := t.TempDir()
		dir := filepath.Join(base, "state")
		bystander := filepath.Join(base, "bystander")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, recordName), text, 0o600),
			os.WriteFile(bystander, []byte("mine"), 0o600)); err != nil {
			t.Fatal(err)
		}
		_ = ClearLeftover(dir) // says what it could not open
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("the state is still there: %v", err)
		}
		if b, err := os.ReadFile(bystander); string(b) != "mine" {
			t.Errorf("somebody's file holds %q, %v", b, err)
		}
	})
}

func TestSignature(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	seen := map[string]bool{}
	for _, s := range signatures {
		b := make([]byte, 256<<10)
		copy(b[s.at:], s.magic)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		what, err := signature(path)
		if err != nil || what != s.what {
			t.Errorf("%q at %d: %q, %v; want %q", s.magic, s.at, what, err, s.what)
		}
		seen[what] = true
	}
	if len(seen) < 10 {
		t.Errorf("only %d kinds", len(seen))
	}
	for _, n := range []int{0, 512, 256 << 10} {
		if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		if what, err := signature(path); n > 0 && (what != "" || err != nil) {
			t.Errorf("%d zero bytes: %q, %v", n, what, err)
		}
	}
}
