package cbtstate

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

var aDisk = Disk{
	Identity: disk.Identity{"serial=a", "model=b"}, Size: 1 << 30, Boot: "boot 1",
	Writes: &disk.Writes{Attached: 5, Own: [4]uint64{10, 80, 2, 16}},
	Fingerprint: []fingerprint.Place{
		{Name: "ext superblock", Offset: 1024, Length: 1024, SHA256: "aa"}, {Name: "first MiB", Length: 1 << 20, SHA256: "bb"}},
}

// saved is a state directory with the state of aDisk, and the path of its files
// without their suffix.
func saved(t *testing.T) (dir, files string, r Record, m []byte) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "a", "state")
	s, err := Open("/", dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r = Record{ID: uuid.New(), Name: "data", Path: "/dev/sda", Saved: time.Now().Round(0), Disk: aDisk}
	m = bytes.Repeat([]byte("map "), 100)
	if err := s.Save(r, m, always); err != nil {
		t.Fatal(err)
	}
	return dir, filepath.Join(dir, key(aDisk.Identity)), r, m
}

func find(dir string, id disk.Identity, name string) (*Record, []byte, error) {
	s, err := Open("/", dir, false)
	if err != nil {
		return nil, nil, err
	}
	defer s.Close()
	return s.Find(id, name, 1000)
}

func reason(t *testing.T, err error) string {
	t.Helper()
	var no *Refusal
	if err != nil && !errors.As(err, &no) {
		t.Fatalf("no refusal: %v", err)
	}
	if no == nil {
		return ""
	}
	if no.Text == "" {
		t.Errorf("%s without a text", no.Reason)
	}
	return no.Reason
}

func TestSavedIsFound(t *testing.T) {
	dir, files, r, m := saved(t)
	got, gotMap, err := find(dir, aDisk.Identity, "data")
	if err != nil || !bytes.Equal(gotMap, m) || got.ID != r.ID || !got.Saved.Equal(r.Saved) || got.Judge(aDisk) != nil {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, f := range []string{files + recordSuffix, files + mapSuffix} {
		if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, st.Mode(), err)
		}
	}
	if st, _ := os.Stat(dir); st.Mode().Perm() != 0o700 {
		t.Errorf("%s has mode %v", dir, st.Mode())
	}
	all, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(all) != 2 {
		t.Errorf("files: %v", all)
	}
}

func TestUsedOnce(t *testing.T) {
	dir, files, r, m := saved(t)
	record, err := os.ReadFile(files + recordSuffix)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open("/", dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 2 {
		if err := s.Use(aDisk.Identity); err != nil {
			t.Fatal(err)
		}
		_, _, err = s.Find(aDisk.Identity, "data", 1000)
		if got := reason(t, err); got != Unclean {
			t.Errorf("used, and not saved again: %s", got)
		}
	}
	// Somebody brings it back.
	os.WriteFile(files+recordSuffix, record, 0o600)
	os.WriteFile(files+mapSuffix, m, 0o600)
	_, _, err = s.Find(aDisk.Identity, "data", 1000)
	if got := reason(t, err); got != Used {
		t.Errorf("brought back: %s", got)
	}
	r.ID = uuid.New()
	if err := s.Save(r, m, always); err != nil {
		t.Fatal(err)
	}
	if _, _, err = s.Find(aDisk.Identity, "data", 1000); err != nil {
		t.Errorf("saved again: %v", err)
	}
}

func TestNothingKept(t *testing.T) {
	dir, _, _, _ := saved(t)
	for name, want := range map[string]string{"data": OtherDisk, "other": NoState} {
		_, _, err := find(dir, disk.Identity{"serial=b"}, name)
		if got := reason(t, err); got != want {
			t.Errorf("under the name %s: %s, want %s", name, got, want)
		}
	}
	_, _, err := find(dir+"/none", aDisk.Identity, "data")
	if got := reason(t, err); got != NoState {
		t.Errorf("no directory: %s", got)
	}
}

// TestSpoiltFiles: nothing is trusted of a file that is not, to the last bit, what
// was written, or that somebody else may have written.
func TestSpoiltFiles(t *testing.T) {
	dir, files, _, _ := saved(t)
	good := map[string][]byte{}
	for _, f := range []string{recordSuffix, mapSuffix} {
		b, err := os.ReadFile(files + f)
		if err != nil {
			t.Fatal(err)
		}
		good[f] = b
	}
	other := filepath.Join(t.TempDir(), "other")
	try := func(what, want string) {
		t.Helper()
		r, _, err := find(dir, aDisk.Identity, "data")
		if got := reason(t, err); got != want {
			t.Errorf("%s: %q (%v, %v), want %q", what, got, r, err, want)
		}
		for f, b := range good {
			os.RemoveAll(files + f)
			os.WriteFile(files+f, b, 0o600)
		}
	}
	try("nothing", "")
	for f, b := range good {
		for n := range b {
			if f == mapSuffix && n%7 != 0 && n > 64 {
				continue
			}
			os.Truncate(files+f, int64(n))
			try(fmt.Sprintf("%s cut to %d", f, n), Damaged)
		}
		line := bytes.IndexByte(b, '\n')
		for n := range b {
			bits := 1
			if f == recordSuffix && n <= line {
				bits = 8 // of the header each
			}
			for bit := range bits {
				spoilt := bytes.Clone(b)
				spoilt[n] ^= 1 << ((n + bit) % 8)
				os.WriteFile(files+f, spoilt, 0o600)
				want := Damaged
				if at := len(title); f == recordSuffix && n == at {
					want = Version
				} else if f == recordSuffix && n == at+1 {
					want = Version // the blank behind it
				}
				try(fmt.Sprintf("%s with byte %d spoilt", f, n), want)
			}
		}
		os.WriteFile(files+f, append(bytes.Clone(b), 'x'), 0o600)
		try(f+" longer", Damaged)
		os.WriteFile(files+f, bytes.Repeat([]byte("foreign\n"), 200), 0o600)
		try(f+" foreign", Damaged)
		for _, mode := range []os.FileMode{0o620, 0o602, 0o666} {
			os.Chmod(files+f, mode)
			try(fmt.Sprintf("%s with mode %v", f, mode), Untrusted)
		}
		if os.Geteuid() == 0 {
			os.Chown(files+f, 1000, 1000)
			try(f+" of another owner", Untrusted)
		}
		os.Remove(other)
		os.Link(files+f, other)
		try(f+" with another name", Untrusted)
		os.Remove(other)
		os.WriteFile(other, b, 0o600)
		os.Remove(files + f)
		os.Symlink(other, files+f)
		try(f+" behind a link", Untrusted)
		os.Remove(files + f)
		os.Mkdir(files+f, 0o700)
		try(f+" a directory", Untrusted)
	}
	os.WriteFile(files+recordSuffix, []byte(strings.Replace(string(good[recordSuffix]), title+"1 ", title+"2 ", 1)), 0o600)
	try("a record of the future", Version)
	os.Remove(files + mapSuffix)
	try("no map", Damaged)
	// A right record in the wrong place.
	wrong := filepath.Join(dir, key(disk.Identity{"serial=b"}))
	for f, b := range good {
		os.WriteFile(wrong+f, b, 0o600)
	}
	_, _, err := find(dir, disk.Identity{"serial=b"}, "data")
	if got := reason(t, err); got != OtherDisk {
		t.Errorf("the record of another disk: %s", got)
	}
}

func TestUntrustedDirectory(t *testing.T) {
	spoil := map[string]func(dir string) string{
		"world-writable": func(dir string) string { os.Chmod(dir, 0o777); return dir },
		"sticky":         func(dir string) string { os.Chmod(dir, 0o777|os.ModeSticky); return dir },
		"group-writable above": func(dir string) string {
			os.Chmod(filepath.Dir(dir), 0o770)
			return dir
		},
		"a link": func(dir string) string {
			link := dir + "-link"
			os.Symlink(dir, link)
			return link
		},
		"a link above": func(dir string) string {
			link := filepath.Dir(dir) + "-link"
			os.Symlink(filepath.Dir(dir), link)
			return link + "/" + filepath.Base(dir)
		},
		"a file": func(dir string) string {
			os.WriteFile(dir+"-file", nil, 0o600)
			return dir + "-file"
		},
	}
	if os.Geteuid() == 0 {
		spoil["somebody's"] = func(dir string) string { os.Chown(dir, 1000, 1000); return dir }
		spoil["below somebody's"] = func(dir string) string { os.Chown(filepath.Dir(dir), 1000, 1000); return dir }
	}
	for name, f := range spoil {
		dir, _, _, _ := saved(t)
		path := f(dir)
		for _, create := range []bool{false, true} {
			s, err := Open("/", path, create)
			if err == nil {
				s.Close()
			}
			if got := reason(t, err); got != Untrusted {
				t.Errorf("%s: %q, want %s", name, got, Untrusted)
			}
		}
	}
}

// judged checks what was said of a record: want is the reason of the refusal, or empty.
func judged(t *testing.T, name string, r *Record, no *Refusal, want string) {
	t.Helper()
	got := ""
	if no != nil {
		got = no.Reason
		if no.Record != r || no.Text == "" {
			t.Errorf("%s: %+v", name, no)
		}
	}
	if got != want {
		t.Errorf("%s: %q, want %q", name, got, want)
	}
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *Record, now *Disk)
		want   string
	}{
		"as it was":        {func(*Record, *Disk) {}, ""},
		"another boot":     {func(_ *Record, now *Disk) { now.Boot, now.Writes = "boot 2", &disk.Writes{} }, ""},
		"no counters then": {func(r *Record, now *Disk) { now.Boot, r.Writes, now.Writes = "boot 2", nil, &disk.Writes{} }, ""},
		"plugged in again": {func(_ *Record, now *Disk) { now.Writes = &disk.Writes{Attached: 6} }, ""},
		"written in this boot": {func(_ *Record, now *Disk) {
			now.Boot, now.Writes = "boot 2", &disk.Writes{Attached: 5, Own: [4]uint64{1, 8}}
		}, Written},
		"discarded in this boot, past it": {func(_ *Record, now *Disk) {
			now.Boot, now.Writes = "boot 2", &disk.Writes{Attached: 5, WholeDisk: [4]uint64{0, 0, 1, 8}}
		}, Written},
		"written since it was plugged in again": {func(_ *Record, now *Disk) { now.Writes = &disk.Writes{Attached: 6, Own: [4]uint64{1, 8}} }, Written},
		"a loop device was used before":         {func(_ *Record, now *Disk) { now.Writes.Attached, now.Writes.Carried = 6, true }, ""},
		"no counters in this boot":              {func(_ *Record, now *Disk) { now.Boot, now.Writes = "boot 2", nil }, ""},
		"a copy of the machine":                 {func(r *Record, now *Disk) { r.Machine, now.Machine = "a", "b" }, OtherHost},
		"the same machine":                      {func(r *Record, now *Disk) { r.Machine, now.Machine = "a", "a" }, ""},
		"a machine that is not known":           {func(r *Record, now *Disk) { r.Machine = "a" }, ""},
		"another identity":                      {func(_ *Record, now *Disk) { now.Identity = disk.Identity{"serial=c"} }, OtherDisk},
		"another size":                          {func(_ *Record, now *Disk) { now.Size++ }, OtherSize},
		"written":                               {func(_ *Record, now *Disk) { now.Writes.Own[1]++ }, Written},
		"discarded":                             {func(_ *Record, now *Disk) { now.Writes.Own[3]++ }, Written},
		"flushed":                               {func(_ *Record, now *Disk) { now.Writes.Own[0]++; now.Writes.WholeDisk[0]++ }, ""},
		"written past it":                       {func(_ *Record, now *Disk) { now.Writes.WholeDisk[1]++ }, Written},
		"no counters":                           {func(r *Record, _ *Disk) { r.Writes = nil }, Unknown},
		"no counters now":                       {func(_ *Record, now *Disk) { now.Writes = nil }, Unknown},
		"superblock":                            {func(_ *Record, now *Disk) { now.Boot = "boot 2"; now.Fingerprint[0].SHA256 = "cc" }, Written},
		"no superblock now":                     {func(_ *Record, now *Disk) { now.Boot = "boot 2"; now.Fingerprint = now.Fingerprint[1:] }, Written},
	} {
		r, now := &Record{Disk: aDisk}, aDisk
		writes := *aDisk.Writes
		now.Writes = &writes
		now.Fingerprint = append([]fingerprint.Place(nil), aDisk.Fingerprint...)
		c.change(r, &now)
		judged(t, name, r, r.Judge(now), c.want)
	}
}
