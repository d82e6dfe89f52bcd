package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

	// Processes that do not answer are not waited for.
	for pid := range 5 {
		dir := filepath.Join(d.host.Proc, strconv.Itoa(100+pid))
		if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mkfifo(filepath.Join(dir, "maps"), 0o600)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if f, err := os.OpenFile(filepath.Join(dir, "maps"), os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
				f.Close()
			}
		})
	}
	began := time.Now()
	users := d.usersOf(usedDevice{dev.ublk.Num, "it: "})
	if len(users) != 2 || users[0] != "it: mounted on /srv" || !strings.HasPrefix(users[1], "whoever else uses it") {
		t.Errorf("beside processes that hang: %q", users)
	}
	if waited := time.Since(began); waited > 4*time.Second {
		t.Errorf("it waited for processes that hang: %v", waited)
	}
}
