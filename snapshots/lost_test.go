package snapshots

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// lostLife is a snapshot that stores in a storage of that kind when the power fails:
// nothing of its state is left but the note.
func lostLife(t *testing.T, kind string, change func(l life)) (l life, lost *Lost) {
	t.Helper()
	l = newLife(t, kind)
	var note []byte
	l.Keep = func(_ uuid.UUID, text []byte) error { note = text; return nil }
	dieTaken(t, l, nil)
	if change != nil {
		change(l)
	}
	p := pins{dir: filepath.Join(l.path("state"), l.ID)}
	for _, n := range p.all() {
		if err := p.release(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(p.dir); err != nil {
		t.Fatal(err)
	}
	if lost, err := ReadNote("note", note, disk.Machine().MachineID()); lost != nil || err != nil {
		t.Errorf("in the same boot: %+v, %v", lost, err)
	}
	c := readContent(t, note)
	if c.Machine != disk.Machine().MachineID() {
		t.Errorf("the machine is %q on record", c.Machine)
	}
	for i := range c.Storage { // filesystems may have other numbers by then
		for _, id := range []*identity{c.Storage[i].Dir, c.Storage[i].File, c.Storage[i].Lender} {
			if id != nil {
				id.Dev++
			}
		}
	}
	lost, err := ReadNote("note", inAnotherBoot(t, c), disk.Machine().MachineID())
	if err != nil || lost == nil {
		t.Fatalf("in another boot: %+v, %v", lost, err)
	}
	if len(lost.Devices) != 1 || lost.Devices[0] != disk1 || len(lost.Storage) != 1 || lost.Storage[0].Path != l.Storage[0] {
		t.Errorf("%+v", lost)
	}
	return l, lost
}

// machineOf finds the device of a life.
func machineOf(l life) Machine {
	return Machine{
		Find: func(id disk.Identity) *disk.Disk {
			if len(id) != 1 || id[0] != "test" {
				return nil
			}
			return &disk.Disk{Node: l.Storage[0]}
		},
		Probe:   func(*os.File) (string, error) { return "", nil },
		Started: time.Now().Add(time.Hour), // after all that the test has written
	}
}

// TestLost: after a loss of power nothing of a snapshot stays on its storage, whatever
// that is, and what lent its space has it back.
func TestLost(t *testing.T) {
	for _, kind := range lifeKinds {
		held := 0
		l, lost := lostLife(t, kind, func(l life) { held = l.inClear(t) })
		if held == 0 {
			t.Errorf("%s: nothing was stored", kind)
		}
		if !lost.Clear(machineOf(l)) {
			t.Errorf("%s: %+v", kind, lost.Storage)
		}
		l.checkGone(t)
		if !lost.Clear(machineOf(l)) {
			t.Errorf("%s again: %+v", kind, lost.Storage)
		}
	}
}

// TestLostUsedAgain: a file that somebody has written to since the machine was started is
// left alone, and so is a device on which something appears just before it is claimed.
func TestLostUsedAgain(t *testing.T) {
	l, lost := lostLife(t, "new", nil)
	m := machineOf(l)
	m.Started = time.Now().Add(-time.Hour)
	size := stat(t, l.Storage[0]).Size
	if !lost.Clear(m) || !strings.Contains(lost.Storage[0].Text, "since the machine was started") {
		t.Errorf("%+v", lost.Storage)
	}
	if st := stat(t, l.Storage[0]); size == 0 || st.Size != size {
		t.Errorf("%d bytes of %d are left", st.Size, size)
	}

	l, lost = lostLife(t, "device", nil)
	m = machineOf(l)
	looks := 0
	m.Probe = func(*os.File) (string, error) {
		if looks++; looks == 1 {
			return "", nil
		}
		return "ext4", nil
	}
	before, err := os.ReadFile(l.Storage[0])
	if err != nil {
		t.Fatal(err)
	}
	if !lost.Clear(m) || !strings.Contains(lost.Storage[0].Text, "ext4") {
		t.Errorf("%+v", lost.Storage)
	}
	if after, err := os.ReadFile(l.Storage[0]); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the device has been changed: %v", err)
	}
	l, lost = lostLife(t, "device", nil)
	m = machineOf(l)
	m.Probe = func(*os.File) (string, error) { return "", disk.ErrNoTool }
	if lost.Clear(m) {
		t.Errorf("without blkid: %+v", lost.Storage)
	}
}

// TestLostMoved: a file that has another name by now is emptied all the same.
func TestLostMoved(t *testing.T) {
	l, lost := lostLife(t, "new", nil)
	other := l.Storage[0] + "-other"
	if err := os.Rename(l.Storage[0], other); err != nil {
		t.Fatal(err)
	}
	if !lost.Clear(machineOf(l)) || !strings.Contains(lost.Storage[0].Text, "moved") {
		t.Errorf("%+v", lost.Storage)
	}
	if st := stat(t, other); st.Size != 0 {
		t.Errorf("it has %d bytes", st.Size)
	}
}

// TestLostOfOthers: what somebody else has put there stays as it is.
func TestLostOfOthers(t *testing.T) {
	l, lost := lostLife(t, "new", nil)
	if err := os.Remove(l.Storage[0]); err != nil {
		t.Fatal(err)
	}
	writeFile(t, l.Storage[0], "precious", 0o600)
	if !lost.Clear(machineOf(l)) {
		t.Errorf("%+v", lost.Storage)
	}
	if b, err := os.ReadFile(l.Storage[0]); string(b) != "precious" {
		t.Errorf("a file of others holds %q, %v", b, err)
	}

	for name, spoil := range map[string]func(b []byte){
		"head":       func(b []byte) { copy(b, "precious") },
		"filesystem": func(b []byte) { copy(b[0x10040:], "_BHRfS_M") },
	} {
		l, lost := lostLife(t, "device", nil)
		b, err := os.ReadFile(l.Storage[0])
		if err != nil {
			t.Fatal(err)
		}
		spoil(b)
		if err := os.WriteFile(l.Storage[0], b, 0); err != nil {
			t.Fatal(err)
		}
		if !lost.Clear(machineOf(l)) {
			t.Errorf("%s: %+v", name, lost.Storage)
		}
		if now, err := os.ReadFile(l.Storage[0]); err != nil || !bytes.Equal(now, b) {
			t.Errorf("%s: the device was changed, %v", name, err)
		}
	}
}

// TestLostNotThere: storage that is not there is cleared when it is.
func TestLostNotThere(t *testing.T) {
	l, lost := lostLife(t, "device", nil)
	m := machineOf(l)
	m.Find = func(disk.Identity) *disk.Disk { return nil }
	if lost.Clear(m) || lost.Storage[0].Done || !strings.Contains(lost.Storage[0].Text, "not there") {
		t.Errorf("%+v", lost.Storage)
	}
	if !lost.Clear(machineOf(l)) {
		t.Errorf("%+v", lost.Storage)
	}
	l.checkGone(t)

	l, lost = lostLife(t, "new", nil)
	lost.note.Storage[0].Mount = "/nowhere"
	if lost.Clear(machineOf(l)) || !strings.Contains(lost.Storage[0].Text, "not mounted") {
		t.Errorf("%+v", lost.Storage)
	}
}

// TestNoteGone: a snapshot that was destroyed leaves no note, nor one that the next
// daemon ends; what fails leaves one.
func TestNoteGone(t *testing.T) {
	for _, taken := range []bool{false, true} {
		l := newLife(t, lifeKinds...)
		var note []byte
		l.Keep = func(_ uuid.UUID, text []byte) error { note = text; return nil }
		if taken {
			dieTaken(t, l, nil)
		} else {
			d, s := begun(t, l)
			d.die(s)
		}
		if note == nil {
			t.Fatal("no note")
		}
		d := daemonOf(t, l)
		if err := l.left(t).Clear(d.config()); err != nil || note != nil {
			t.Errorf("cleared: %v, a note of %d bytes", err, len(note))
		}
		l.checkGone(t)
	}
	l := newLife(t, "new")
	var note []byte
	l.Keep = func(_ uuid.UUID, text []byte) error { note = text; return nil }
	d, s := begun(t, l)
	if note == nil {
		t.Fatal("no note")
	}
	if err := d.destroy(s); err != nil || note != nil {
		t.Errorf("destroyed: %v, a note of %d bytes", err, len(note))
	}
}

// TestLostForeign: a copy of the machine finds the note, and the storage, where the first
// one may still have its snapshot. It leaves both alone.
func TestLostForeign(t *testing.T) {
	for _, kind := range []string{"new", "device"} {
		l, lost := lostLife(t, kind, nil)
		before, err := os.ReadFile(l.Storage[0])
		if err != nil {
			t.Fatal(err)
		}
		c := lost.note
		c.Machine = "another"
		text, err := statefile.Encode(noteKind, noteVersion, c)
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := ReadNote("note", text, disk.Machine().MachineID())
		if err != nil || !foreign.Foreign || lost.Foreign {
			t.Fatalf("%+v, %v", foreign, err)
		}
		if foreign.Clear(machineOf(l)) || foreign.Storage[0].Done || !strings.Contains(foreign.Storage[0].Text, "another machine") {
			t.Errorf("%s: %+v", kind, foreign.Storage)
		}
		if now, err := os.ReadFile(l.Storage[0]); err != nil || !bytes.Equal(now, before) {
			t.Errorf("%s: changed, %v", kind, err)
		}
		if !lost.Clear(machineOf(l)) {
			t.Errorf("%s: its own machine: %+v", kind, lost.Storage)
		}
	}
}

// TestStayNoted: of a snapshot that ends with the machine a note stays, from which the
// next boot knows it. It names no storage, because that has been given back.
func TestStayNoted(t *testing.T) {
	for _, stays := range []bool{false, true} {
		o := newOriginal(t, make([]byte, 64<<10))
		s, _ := newSnapshot(t)
		var note []byte
		s.state.keep = func(_ uuid.UUID, text []byte) error { note = text; return nil }
		if err := s.Add(o.filter, disk1); err != nil {
			t.Fatal(err)
		}
		appendDir(t, s, t.TempDir())
		if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil {
			t.Fatal(err)
		}
		if stays {
			s.StayNoted()
		}
		s.Destroy()()
		if err := s.GiveBack(); err != nil {
			t.Error(err)
		}
		if !stays {
			if note != nil {
				t.Errorf("a note is left: %s", note)
			}
			continue
		}
		c := readContent(t, note)
		if c.ID != s.cfg.ID || len(c.Devices) != 1 || len(c.Storage) != 0 {
			t.Errorf("%+v", c)
		}
		lost, err := ReadNote("note", inAnotherBoot(t, c), disk.Machine().MachineID())
		if err != nil || lost == nil || len(lost.Devices) != 1 || !lost.Clear(Machine{}) {
			t.Errorf("in another boot: %+v, %v", lost, err)
		}
	}
}

// readContent is what a note says.
func readContent(t *testing.T, note []byte) (c noteContent) {
	t.Helper()
	body, _, err := statefile.Decode("note", note, noteKind, noteVersion)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// inAnotherBoot is a note that says this, but that another boot left it.
func inAnotherBoot(t *testing.T, c noteContent) []byte {
	t.Helper()
	c.Boot = "another"
	note, err := statefile.Encode(noteKind, noteVersion, c)
	if err != nil {
		t.Fatal(err)
	}
	return note
}
