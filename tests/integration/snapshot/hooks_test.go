package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestHooks: what a hook writes before a take is in the image, and what it writes after it is
// not. One that fails cancels the take. If the daemon dies while one runs, that ends with the
// daemon, and the next daemon runs its other half.
func TestHooks(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	dir := t.TempDir()
	hook := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "10-db"), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	said := filepath.Join(t.TempDir(), "said")
	d := program.Start(t, "hook_dir="+dir)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	at := guest.Mount(t, dev.Link)
	over := t.TempDir()
	// It can mount things where everybody sees them.
	hook(fmt.Sprintf(`set -e
env | grep ^UBLK | sort >>%[1]s
if [ $1 = pre ]; then
	mount -t tmpfs hook %[2]s
	echo before >%[3]s/db
else
	umount %[2]s
	echo after >%[3]s/db
	sync
fi
`, said, over, at))
	take := func() program.Answer {
		t.Helper()
		return d.Call("ublk-blksnap", "snapshot", "create", dev.Name, "--storage", "/dev/shm", "--take", "--name", "nightly")
	}
	if a := take(); a.Status != 0 || a.Err != "" {
		t.Fatalf("%+v", a)
	}
	s := d.Show("nightly")
	image := guest.Mount(t, s.Images[0].Link, "ro")
	for path, want := range map[string]string{image: "before\n", at: "after\n"} {
		if text, err := os.ReadFile(filepath.Join(path, "db")); err != nil || string(text) != want {
			t.Errorf("%s has %q, %v; want %q", path, text, err, want)
		}
	}
	guest.Unmount(t, image)
	text, _ := os.ReadFile(said)
	common := "UBLK_BLKSNAP_DEVICES=" + dev.Name + "\nUBLK_BLKSNAP_DISKS=" + disk + "\nUBLK_BLKSNAP_MOUNTS=" + at + "\nUBLK_BLKSNAP_NAME=nightly\nUBLK_BLKSNAP_PHASE="
	if want := common + "pre\nUBLK_BLKSNAP_SNAPSHOT=" + s.ID + "\n" + common + "post\nUBLK_BLKSNAP_RESULT=taken\nUBLK_BLKSNAP_SNAPSHOT=" + s.ID + "\n"; string(text) != want {
		t.Errorf("hooks have had\n%swant\n%s", text, want)
	}
	d.Destroy(s.ID)

	hook("echo $1 $UBLK_BLKSNAP_RESULT $UBLK_BLKSNAP_ERROR >>" + said + "\n[ $1 = post ] || { echo the database is down; exit 3; }\n")
	_ = os.Remove(said)
	before := d.CBT(dev).Take
	if a := take(); a.Status != 1 || !strings.Contains(a.Err, "hook 10-db before the take: failed: exit status 3: the database is down") || !strings.Contains(a.Err, "--no-hooks") {
		t.Errorf("%+v", a)
	}
	if text, _ := os.ReadFile(said); !strings.HasPrefix(string(text), "pre\npost failed hook 10-db before the take: ") {
		t.Errorf("hooks were told %q", text)
	}
	if ids := program.SnapshotIDs(t, d); len(ids) > 0 || d.CBT(dev).Take != before {
		t.Errorf("after a take that was cancelled there are %v, and the last take is %v, which was %v", ids, d.CBT(dev).Take, before)
	}

	hook("echo $1 $$ $UBLK_BLKSNAP_RESULT $UBLK_BLKSNAP_ERROR >>" + said + "\n[ $1 = post ] || sleep 1000\n")
	_ = os.Remove(said)
	ended := make(chan error, 1)
	go func() {
		_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}, Take: true})
		ended <- err
	}()
	var pid int
	guest.WaitFor(t, "a hook", func() bool {
		text, _ := os.ReadFile(said)
		n, _ := fmt.Sscanf(string(text), "pre %d\n", &pid)
		return n == 1
	})
	d.Kill()
	if err := guest.Await(t, "the end of the call", ended); err == nil {
		t.Error("a take whose daemon died was made")
	}
	d.Restart()
	guest.WaitFor(t, "the other half of the hook", func() bool {
		text, _ := os.ReadFile(said)
		return strings.HasSuffix(string(text), " failed the daemon has died\n")
	})
	guest.WaitFor(t, "the end of the first half", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return err != nil
	})
	hook("exit 1\n")
	if a := d.Call("ublk-blksnap", "snapshot", "create", dev.Name, "--storage", "/dev/shm", "--take", "--no-hooks"); a.Status != 0 {
		t.Errorf("without hooks: %+v", a)
	}
	d.Destroy("latest")
	guest.Unmount(t, at)
	d.Remove(dev)
}
