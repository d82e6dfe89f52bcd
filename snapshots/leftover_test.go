package snapshots

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// TestLeftoverSpace is a daemon that was killed with the space of a file that was
// there: the file gets it back, and what was stored is gone by itself.
func TestLeftoverSpace(t *testing.T) {
	const size = 256 << 10
	dir := t.TempDir()
	st, err := newState(filepath.Join(dir, "state", "id"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	writeFile(t, path, strings.Repeat("x", size), 0o640)
	before := stat(t, path)
	s := mustOpenStorage(t, path, true)
	if err := st.remember(s, path); err != nil {
		t.Fatal(err)
	}
	store(t, s)
	if now := stat(t, path); now.Blocks != 0 {
		t.Errorf("the file has %d blocks of its own", now.Blocks)
	}
	s.file.Close()
	unix.Close(s.lender.fd)
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}

	if err := ClearLeftover(st.dir); err != nil {
		t.Fatal(err)
	}
	now := stat(t, path+".moved")
	if now.Blocks < before.Blocks || now.Size != size || now.Mode != before.Mode {
		t.Errorf("it was %+v and is %+v", before, now)
	}
	if _, err := os.Stat(st.dir); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// TestLeftoverOnTop is a file in the uppermost directory of a filesystem: what is
// above that is another.
func TestLeftoverOnTop(t *testing.T) {
	path := filepath.Join("/dev/shm", "store-"+uuid.NewString())
	s := mustOpenStorage(t, path, false)
	defer os.Remove(path)
	st, err := newState(filepath.Join(t.TempDir(), "state", "id"))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.remember(s, path); err != nil {
		t.Fatal(err)
	}
	s.file.Close()
	s.name.Close()
	if err := ClearLeftover(st.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("not removed: %v", err)
	}
}

// TestLeftoverReplaced: a file that has name and number of one on record is not
// that one. Where files have no handles, the time of their birth tells.
func TestLeftoverReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	writeFile(t, path, "mine", 0o600)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	was, err := identify(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	in, err := identify(int(dir.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if was.Handle == nil || was.Born == 0 {
		t.Skip("needs a filesystem with handles and times of birth, for TMPDIR")
	}
	for name, change := range map[string]func(*identity){
		"born later":             func(id *identity) { id.Born-- },
		"born later, no handle":  func(id *identity) { id.Handle, id.Born = nil, id.Born-1 },
		"another, no handle":     func(id *identity) { id.Handle, id.Ino = nil, id.Ino+1 },
		"on another filesystem":  func(id *identity) { id.Dev++ },
		"nothing but its number": func(id *identity) { *id = identity{Dev: id.Dev, Ino: id.Ino} },
	} {
		id := was
		change(&id)
		_ = record{Path: path, File: id, Dir: &in}.clear()
		if b, err := os.ReadFile(path); string(b) != "mine" {
			t.Errorf("%s: it holds %q, %v", name, b, err)
		}
	}
	for name, change := range map[string]func(*identity){
		"by its handle": func(*identity) {},
		"by its name":   func(id *identity) { id.Handle = nil },
	} {
		writeFile(t, path, "copied", 0o600)
		g, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		id, err := identify(int(g.Fd()))
		g.Close()
		if err != nil {
			t.Fatal(err)
		}
		change(&id)
		at := in
		change(&at)
		if err := (record{Path: path, File: id, Dir: &at}).clear(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: not removed: %v", name, err)
		}
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
