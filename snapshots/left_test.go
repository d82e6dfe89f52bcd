package snapshots

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

var patience = Config{StorageTimeout: time.Minute}

// TestLeftoverSpace is a daemon that was killed with the space of a file that was
// there: the file gets it back, and what was stored is gone.
func TestLeftoverSpace(t *testing.T) {
	const size = 256 << 10
	path := filepath.Join(t.TempDir(), "file")
	writeFile(t, path, strings.Repeat("x", size), 0o640)
	before := stat(t, path)
	s := mustOpenStorage(t, path, true)
	store(t, s)
	if now := stat(t, path); now.Blocks != 0 {
		t.Errorf("the file has %d blocks of its own", now.Blocks)
	}
	s.close()
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}

	if err := leftOf(t, s.state).Clear(patience); err != nil {
		t.Fatal(err)
	}
	now := stat(t, path+".moved")
	if now.Blocks < before.Blocks || now.Size != size || now.Mode != before.Mode {
		t.Errorf("it was %+v and is %+v", before, now)
	}
	if _, err := os.Stat(s.state.dir); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}

// TestLeftoverOnTop is a file in the uppermost directory of a filesystem: what is
// above that is another.
func TestLeftoverOnTop(t *testing.T) {
	path := filepath.Join("/dev/shm", "store-"+uuid.NewString())
	s := mustOpenStorage(t, path, false)
	defer os.Remove(path)
	s.close()
	if err := leftOf(t, s.state).Clear(patience); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("not removed: %v", err)
	}
}

// TestHiddenReplaced: a file that got the hidden name of one on record, by whatever
// way, is emptied by nobody, and nothing but that name is removed anywhere.
func TestHiddenReplaced(t *testing.T) {
	dir := t.TempDir()
	st := testState(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	in, err := identify(int(d.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.update(func(r *record) {
		r.Storage = append(r.Storage, recordStorage{Stage: storageMaking, RealPath: dir, Dir: &in, Hidden: hiddenPrefix + "1"})
	}); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "bystander"), "mine", 0o600)
	if err := os.Link(filepath.Join(dir, "bystander"), filepath.Join(dir, hiddenPrefix+"1")); err != nil {
		t.Fatal(err)
	}
	if err := leftOf(t, st).Clear(patience); !errors.Is(err, errMoved) {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "bystander")); string(b) != "mine" {
		t.Errorf("somebody's file holds %q, %v", b, err)
	}
	if left, err := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("there are %v, %v", left, err)
	}
}

// TestIdentity: a file that has name and number of one on record is not that one.
// Where files have no handles, the time of their birth tells.
func TestIdentity(t *testing.T) {
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
		if fd, err := id.open(path, unix.O_RDONLY); err == nil {
			t.Errorf("%s: it is found", name)
			unix.Close(fd)
		}
	}
	for name, change := range map[string]func(*identity){
		"by its handle": func(*identity) {},
		"by its name":   func(id *identity) { id.Handle = nil },
	} {
		id := was
		change(&id)
		fd, err := id.open(path, unix.O_RDONLY)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		unix.Close(fd)
	}
}

// TestRecordDamaged: whatever happened to a file of the state, it is said, the
// snapshot can only be cleared, and the storage holds nothing afterwards.
func TestRecordDamaged(t *testing.T) {
	type damage struct {
		name string
		file string
		do   func(path string) error
	}
	rewrite := func(change func([]byte) []byte) func(string) error {
		return func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, change(b), 0o600)
		}
	}
	damages := []damage{}
	for _, file := range []string{recordName, takeName} {
		damages = append(damages,
			damage{"empty", file, rewrite(func([]byte) []byte { return nil })},
			damage{"cut off", file, rewrite(func(b []byte) []byte { return b[:len(b)-1] })},
			damage{"longer", file, rewrite(func(b []byte) []byte { return append(b, 0) })},
			damage{"foreign", file, rewrite(func(b []byte) []byte { return bytes.Repeat([]byte("x"), len(b)) })},
			damage{"readable by all", file, func(path string) error { return os.Chmod(path, 0o644) }},
			damage{"writable by all", file, func(path string) error { return os.Chmod(path, 0o666) }},
			damage{"of another owner", file, func(path string) error { return os.Chown(path, 12345, 12345) }},
			damage{"a link", file, func(path string) error {
				return errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path))
			}},
			damage{"another name", file, func(path string) error { return os.Link(path, path+"2") }},
			damage{"a directory", file, func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }},
		)
	}
	damages = append(damages,
		damage{"missing", recordName, os.Remove},
		damage{"of another snapshot", recordName, func(path string) error {
			return statefile.Write(path, recordKind, recordVersion, record{ID: uuid.New(), Chunk: 4 << 10})
		}},
		damage{"of the future", recordName, func(path string) error {
			return statefile.Write(path, recordKind, recordVersion+1, record{})
		}},
		damage{"impossible", recordName, func(path string) error {
			body, _, err := statefile.Read(path, recordKind, recordVersion)
			var r record
			err = errors.Join(err, json.Unmarshal(body, &r))
			r.Chunk = 5
			return errors.Join(err, statefile.Write(path, recordKind, recordVersion, r))
		}},
	)
	// Every byte of the heading of the record, and every byte of the take.
	for i := range 40 {
		damages = append(damages, damage{fmt.Sprintf("byte %d flipped", i), recordName, rewrite(func(b []byte) []byte { b[i] ^= 0x10; return b })})
	}
	for i := range int(TakeSize(1)) {
		damages = append(damages, damage{fmt.Sprintf("byte %d flipped", i), takeName, rewrite(func(b []byte) []byte { b[i] ^= 0x10; return b })})
	}
	for _, d := range damages {
		t.Run(d.file+" "+d.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			s := mustOpenStorage(t, path, false)
			store(t, s)
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			st := s.state
			if err := st.update(func(r *record) {
				r.Devices = []recordDevice{{Device: disk1, Size: 1 << 20, Image: Image{Number: NoImage}}}
			}); err != nil {
				t.Fatal(err)
			}
			if _, _, err := st.file(logName, diffarea.LogStateSize, true); err != nil {
				t.Fatal(err)
			}
			if err := st.newTake([]cbtmap.Info{{BlockSize: 1}}); err != nil {
				t.Fatal(err)
			}
			st.page.Taken(1, func(int) cbtmap.Info { return cbtmap.Info{BlockSize: 1, ChangesNumber: 1} })
			st.page.SetBreakReported()
			st.release()
			s.close()
			if l := leftOf(t, st); l.Err != nil || l.Stage != Taken {
				t.Fatalf("undamaged it is %v, %v", l.Stage, l.Err)
			}
			if err := d.do(filepath.Join(st.dir, d.file)); err != nil {
				t.Fatal(err)
			}

			l := leftOf(t, st)
			if l.Err == nil {
				t.Fatalf("it is trusted, as %v", l.Stage)
			}
			if !strings.Contains(l.Err.Error(), st.dir) {
				t.Errorf("the file is not named: %v", l.Err)
			}
			if _, err := l.Again(patience, nil); !errors.Is(err, l.Err) {
				t.Errorf("made again: %v", err)
			}
			if _, err := l.Reopen(patience, nil); !errors.Is(err, l.Err) {
				t.Errorf("opened again: %v", err)
			}
			if err := l.Clear(patience); err != nil && !(strings.Contains(err.Error(), "it is empty: ") && strings.HasSuffix(err.Error(), "/store")) {
				t.Error(err)
			}
			reads(t, "who has the storage open", f)
			if _, err := os.Stat(st.dir); !os.IsNotExist(err) {
				t.Errorf("the state is still there: %v", err)
			}
			if all := st.pins.all(); len(all) > 0 {
				t.Errorf("pinned: %v", all)
			}
		})
	}
}

// TestLeftForeign: what a daemon did not make in its directory stays, and is said.
func TestLeftForeign(t *testing.T) {
	dir := memoryDir(t)
	open := filepath.Join(dir, uuid.NewString())
	link := filepath.Join(dir, uuid.NewString())
	file := filepath.Join(dir, uuid.NewString())
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "something"), 0o700), os.Mkdir(open, 0o700), os.Chmod(open, 0o777),
		os.Symlink(t.TempDir(), link), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	left, err := LeftBehind(dir)
	if err != nil || len(left) != 4 {
		t.Fatalf("%d left, %v", len(left), err)
	}
	for _, l := range left {
		if !errors.Is(l.Err, statefile.ErrForeign) || l.Clear(patience) == nil {
			t.Errorf("%s: %v", l.Dir, l.Err)
		}
		if _, err := os.Lstat(l.Dir); err != nil {
			t.Errorf("%s: %v", l.Dir, err)
		}
	}
	if left, err := LeftBehind(filepath.Join(dir, "nowhere")); err != nil || len(left) != 0 {
		t.Errorf("without a directory: %v, %v", left, err)
	}
}

// FuzzLeft: whatever is on record, the state goes and the files of others stay.
func FuzzLeft(f *testing.F) {
	add := func(r record) {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	add(record{Chunk: 4096})
	add(record{Chunk: 4096, Storage: []recordStorage{{Stage: storageMaking, RealPath: "/nowhere/storage", Hidden: "bystander", Dir: &identity{Dev: 1}}}})
	add(record{Chunk: 4096, Storage: []recordStorage{{Stage: storageUsed, RealPath: "bystander", Base: "bystander", File: &identity{Ino: 2}}}})
	add(record{Chunk: 4096, Storage: []recordStorage{{Stage: storageUsed, Fixed: true, Device: &deviceIdentity{}, Size: 1 << 62}}})
	f.Add([]byte(`{"storage":[{}],"devices":[{}]}`))
	f.Add([]byte("null\n[]\n{}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		base := t.TempDir()
		id := uuid.New()
		dir := filepath.Join(base, "state", id.String())
		bystander := filepath.Join(base, "bystander")
		if !json.Valid(body) {
			t.Skip()
		}
		var r map[string]any
		if json.Unmarshal(body, &r) == nil && r != nil {
			r["id"] = id // else it is refused at once
			body, _ = json.Marshal(r)
		}
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(bystander, []byte("mine"), 0o600),
			statefile.Write(filepath.Join(dir, recordName), recordKind, recordVersion, json.RawMessage(body))); err != nil {
			t.Fatal(err)
		}
		left, err := LeftBehind(filepath.Dir(dir))
		if err != nil || len(left) != 1 {
			t.Fatalf("%d left, %v", len(left), err)
		}
		if s, err := left[0].Reopen(Config{StorageTimeout: time.Second}, nil); err == nil {
			t.Errorf("opened again: %v", s)
		}
		_ = left[0].Clear(Config{StorageTimeout: time.Second}) // says what it could not open
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("the state is still there: %v", err)
		}
		if b, err := os.ReadFile(bystander); string(b) != "mine" {
			t.Errorf("somebody's file holds %q, %v", b, err)
		}
	})
}
