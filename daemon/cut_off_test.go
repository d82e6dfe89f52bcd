package daemon

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// TestUsersAndHolders: who uses force is told of the mount and of the snapshot, by its name if it has one. Users of a volume
// that the filter came under go on without it.
func TestUsersAndHolders(t *testing.T) {
	d, dev, s := measured(t)
	x := &watchedDisk{Daemon: d, dev: dev, sys: t.TempDir()}
	d.host = &disk.Host{Root: "/", Sys: x.sys, Proc: t.TempDir()}
	x.put(t, dev.ublk.Num, "ublkb0", dev.Size)
	mounts := filepath.Join(d.host.Proc, "1", "mountinfo")
	if err := os.MkdirAll(filepath.Join(filepath.Dir(mounts), "ns"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("mnt:[1]", filepath.Join(filepath.Dir(mounts), "ns", "mnt")); err != nil {
		t.Fatal(err)
	}
	line := "40 1 " + dev.ublk.Num.String() + " / /srv rw - ext4 /dev/ublkb0 rw\n"
	if err := os.WriteFile(mounts, []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		attached *attachment
		want     control.CutOff
	}{
		{"", nil, control.CutOff{Users: []string{"mounted on /srv"}, Snapshots: []string{s.id}}},
		{"nightly", nil, control.CutOff{Users: []string{"mounted on /srv"}, Snapshots: []string{"nightly"}}},
		{"nightly", &attachment{}, control.CutOff{Snapshots: []string{"nightly"}}},
	} {
		s.note.Name, dev.attached = c.name, c.attached
		if got := d.usersAndHolders(dev); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q, attached %v: %+v, want %+v", c.name, c.attached != nil, got, c.want)
		}
	}
}
