package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// TestRefuseDamaged: a disk that has, or may have, a filter whose record cannot be trusted
// gets no other, and another disk does.
func TestRefuseDamaged(t *testing.T) {
	disks := map[string]*disk.Disk{"/dev/a": {Name: "a", Num: disk.Num{Major: 8}}, "/dev/y": {Name: "y", Num: disk.Num{Major: 8, Minor: 16}}}
	lookup := func(path string) (*disk.Disk, error) {
		if bdev := disks[path]; bdev != nil {
			return bdev, nil
		}
		return nil, disk.ErrNotFound
	}
	located := control.LostDevice{Name: "a", Original: "/dev/a", Path: "/dev/ublkb0", Waits: true, Reason: "damaged"}
	nowhere := control.LostDevice{Name: "b", Reason: "damaged"}
	for what, c := range map[string]struct {
		damaged []control.LostDevice
		left    []int
		unknown error
		disk    string
		refused string // words of the refusal; empty: there is none
	}{
		"its disk":                          {[]control.LostDevice{located}, []int{0}, nil, "/dev/a", "has the filter a already, whose I/O waits at /dev/ublkb0"},
		"another disk":                      {[]control.LostDevice{located}, []int{0}, nil, "/dev/y", ""},
		"its disk, the device is gone":      {[]control.LostDevice{located}, nil, nil, "/dev/a", ""},
		"another is nowhere, all are known": {[]control.LostDevice{located, nowhere}, []int{0}, nil, "/dev/y", ""},
		"another is nowhere, one is not":    {[]control.LostDevice{located, nowhere}, []int{0, 3}, nil, "/dev/y", "may have the filter b already, whose I/O waits at /dev/ublkb3"},
		"the driver does not say":           {[]control.LostDevice{located}, nil, errors.New("no answer"), "/dev/y", "may have the filter a already: damaged; no answer"},
	} {
		d := &Daemon{damaged: c.damaged}
		err := d.refuseDamaged(c.left, c.unknown, disks[c.disk], lookup)
		if (err == nil) != (c.refused == "") || err != nil && (control.CodeOf(err) != control.Busy || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%s: %v, want %q", what, err, c.refused)
		}
	}
}

// TestOfAnother: a device that has the name of no filter here, and no note, is left to the
// daemon of another run directory.
func TestOfAnother(t *testing.T) {
	dir := RunDir(t.TempDir())
	if err := os.Mkdir(dir.udev(), 0o755); err != nil {
		t.Fatal(err)
	}
	links := t.TempDir()
	for name, to := range map[string]string{"a": "../ublkb0", "other": "../ublkb1", "noted": "../ublkb2"} {
		if err := os.Symlink(to, filepath.Join(links, name)); err != nil {
			t.Fatal(err)
		}
	}
	d := &Daemon{opts: Options{Dir: dir}, damaged: []control.LostDevice{{Name: "a"}}}
	if err := d.note("ublkb2", "filter", "noted"); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[int]bool{0: false, 1: true, 2: false, 3: false} {
		if got := d.ofAnother(links, id); got != want {
			t.Errorf("ublkb%d: %v", id, got)
		}
	}
}
