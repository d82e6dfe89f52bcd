package snapshot

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestSnapshotNames: a snapshot has a name, under which its image is too, labels and an end, all of
// which outlive the daemon. When its time is over it goes, but not under its users.
func TestSnapshotNames(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 32<<20)
	d := program.Start(t, "group=4242")
	dev, other := d.Add(disks[0]), d.Add(disks[1])
	guest.Ext4.Make(t, dev.Link)
	call := func(args ...string) string {
		t.Helper()
		a := d.Call("ublk-blksnap", args...)
		if a.Status != 0 {
			t.Fatalf("%v: %+v", args, a)
		}
		return strings.TrimSuffix(a.Out, "\n")
	}
	const dir = "/dev/ublk-blksnap/images/nightly"
	printed := call("snapshot", "create", dev.Name, other.Name, "--storage", "/dev/shm", "--take", "--name", "nightly", "--ttl", "12h", "--label", "job=backup")
	if want := dir + "/" + dev.Name + "\n" + dir + "/" + other.Name; printed != want {
		t.Fatalf("printed %q, want %q", printed, want)
	}
	image := strings.Split(printed, "\n")[0]
	s := d.Show("nightly")
	if until := time.Until(*s.Expires); s.Name != "nightly" || s.Labels["job"] != "backup" || until < 11*time.Hour || until > 13*time.Hour {
		t.Errorf("%+v", s)
	}
	for _, ref := range []string{s.ID, s.ID[:9], strings.ToUpper(s.ID), control.Latest, image, s.Images[1].Path} {
		if id := call("snapshot", "info", ref, "--field", "uuid"); id != s.ID {
			t.Errorf("%s is %s, not %s", ref, id, s.ID)
		}
	}
	plain := d.Take(0, dev)
	if want := "/dev/ublk-blksnap/images/" + dev.Name + "-" + plain.ID; plain.Images[0].Link != want {
		t.Errorf("without a name the image is %s, not %s", plain.Images[0].Link, want)
	}
	d.Refused([]string{"the name nightly is taken by snapshot " + s.ID}, "snapshot", "create", dev.Name, "--name", "nightly")
	d.Refused([]string{"has been taken already"}, "snapshot", "add", "nightly", dev.Name)
	d.Refused([]string{dev.Name + ": named twice"}, "snapshot", "create", dev.Name, dev.Path)
	d.Refused([]string{"beginning of a UUID"}, "snapshot", "create", dev.Name, "--name", "feed")
	if a := d.Call("ublk-blksnap", "snapshot", "info", "weekly"); a.Status != 3 || !strings.Contains(a.Err, "no such snapshot") {
		t.Errorf("a name that nobody has: %+v", a)
	}
	call("snapshot", "destroy", "latest")
	if ids := program.SnapshotIDs(t, d); !slices.Equal(ids, []string{s.ID}) {
		t.Errorf("after the latest was destroyed there are %v", ids)
	}

	t.Run("readers", func(t *testing.T) { readers(t, d, s) })
	var seen strings.Builder
	watch := asReader(t, d, 4242, "snapshot", "watch", "nightly", "--json")
	watch.Stdout, watch.Stderr = &seen, &seen
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Process.Kill() }()

	// The next program, and the next daemon, have all of it.
	at := guest.Mount(t, image)
	call("daemon", "reload")
	d.Kill()
	d.Restart()
	now := d.Show("nightly")
	if now.ID != s.ID || now.Labels["job"] != "backup" || now.Expires.Sub(*s.Expires).Abs() > 2*time.Second {
		t.Errorf("it was %+v, is %+v", s, now)
	}
	if to, err := os.Readlink(image); err != nil || to != "../../../"+strings.TrimPrefix(now.Images[0].Path, "/dev/") {
		t.Errorf("the image is at %q, %v", to, err)
	}

	// Its time is over while it is mounted.
	call("snapshot", "set", "nightly", "--ttl", "1ms")
	guest.WaitFor(t, "word that it is in use", func() bool { return d.Show("nightly").Overdue != "" })
	for _, restart := range []bool{false, true} {
		if restart {
			d.Kill()
			d.Restart()
			guest.WaitFor(t, "word that it is in use", func() bool { return d.Show("nightly").Overdue != "" })
		}
		if a := d.Call("ublk-blksnap", "snapshot", "list"); !strings.Contains(a.Out, "nightly") || !strings.Contains(a.Err, "snapshot nightly: its time is over") || !strings.Contains(a.Err, "mounted on "+at) {
			t.Errorf("the list says %+v", a)
		}
	}
	guest.Unmount(t, at)
	var kinds []string
	told := call("snapshot", "watch", "nightly", "--json") // to its end
	if err := watch.Wait(); err != nil || strings.TrimSpace(seen.String()) != told {
		t.Errorf("a member who has watched over all that: %v, %s; want %s", err, seen.String(), told)
	}
	for _, line := range strings.Split(told, "\n") {
		var e control.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Name != "nightly" {
			t.Errorf("event %s, %v", line, err)
		}
		kinds = append(kinds, e.Kind)
		if e.Kind == control.EventExpired && !strings.Contains(e.Text, "mounted on "+at) {
			t.Errorf("%+v", e)
		}
	}
	if want := []string{control.EventCreated, control.EventTaken, control.EventExpired, control.EventDestroyed}; !slices.Equal(kinds, want) {
		t.Errorf("events %v, want %v", kinds, want)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", dir, err)
	}

	// One that nobody uses goes at once, also if it was never taken.
	call("snapshot", "create", other.Name, "--storage", "/dev/shm", "--ttl", "1ms", "--name", "nightly")
	guest.WaitFor(t, "the end of a snapshot", func() bool { return len(program.SnapshotIDs(t, d)) == 0 })
	d.Remove(dev)
	d.Remove(other)
}

// readers: members of the configured group may look at all of it and change nothing, and
// others may not even look.
func readers(t *testing.T, d *program.Daemon, s control.Snapshot) {
	// The directory above all of the test's is closed to others.
	if err := os.Chmod(filepath.Dir(filepath.Dir(string(d.RunDir))), 0o755); err != nil {
		t.Fatal(err)
	}
	call := func(group uint32, args ...string) (int, string) {
		out, err := asReader(t, d, group, args...).CombinedOutput()
		return guest.ExitStatus(t, err), string(out)
	}
	for line, want := range map[string]string{
		"list": s.Images[0].Device, "snapshot list": "nightly", "snapshot info nightly": s.ID, "status " + s.Images[0].Device: "live",
		"cbt info /dev/ublk-blksnap/" + s.Images[0].Device: s.Images[0].Take.Generation.String(),
	} {
		if status, out := call(4242, strings.Fields(line)...); status != 0 || !strings.Contains(out, want) {
			t.Errorf("%s by a member: status %d, %s", line, status, out)
		}
		if status, out := call(4243, strings.Fields(line)...); status != 1 || !strings.Contains(out, "permission denied: run this as root, or as a member of the group") {
			t.Errorf("%s by another: status %d, %s", line, status, out)
		}
	}
	for _, line := range []string{"snapshot destroy nightly", "snapshot set nightly --ttl 1s", "remove " + s.Images[0].Device, "add /dev/null", "daemon stop", "daemon reload"} {
		if status, out := call(4242, strings.Fields(line)...); status != 1 || !strings.Contains(out, "the members of the group 4242 may only look: run this as root") {
			t.Errorf("%s by a member: status %d, %s", line, status, out)
		}
	}
}

// asReader is a call by somebody who is not root, but of that group.
func asReader(t *testing.T, d *program.Daemon, group uint32, args ...string) *exec.Cmd {
	cmd := exec.Command(program.Path(t), append([]string{"--run-dir", string(d.RunDir)}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{group}}}
	return cmd
}
