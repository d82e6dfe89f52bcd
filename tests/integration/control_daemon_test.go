package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// pidOf is the process of a run directory's daemon.
func pidOf(t testing.TB, dir string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "daemon.lock"))
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(b, []byte(") Z "))
}

// TestFirstCommand: the first command starts a daemon, whose life does not hang
// on the command's.
func TestFirstCommand(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	dir, call := fresh(t)
	a := call("add", disk)
	if a.status != 0 || a.out != "/dev/ublk-blksnap/ram0\n" || a.errout != "" {
		t.Fatalf("%+v", a)
	}
	pid := pidOf(t, dir)
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("the daemon is in the session of %d, %v", sid, err)
	}
	if a := call("list"); a.status != 0 || !strings.Contains(a.out, disk) {
		t.Errorf("%+v", a)
	}
	var list []control.Device
	if a := call("list", "--json"); json.Unmarshal([]byte(a.out), &list) != nil || len(list) != 1 {
		t.Fatalf("%+v", a)
	}
	if to, err := os.Readlink("/dev/ublk-blksnap/ram0"); err != nil || to != "../"+filepath.Base(list[0].Path) {
		t.Errorf("the link leads to %s, %v", to, err)
	}
	for path, mode := range map[string]os.FileMode{"": 0o700, "control.sock": 0o600, "daemon.log": 0o600, "state": 0o700} {
		st, err := os.Stat(filepath.Join(dir, path))
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, want %v", path, st.Mode(), mode)
		}
	}
	// A second daemon is refused and disturbs nothing.
	if a := call("daemon"); a.status != 1 || a.errout != fmt.Sprintf("ublk-blksnap: start the daemon: another daemon (process %d) runs on %s\n", pid, dir) {
		t.Errorf("second daemon: %+v", a)
	}
	if a := call("remove", "ram0"); a.status != 0 || a.out != "" || a.errout != "" {
		t.Errorf("%+v", a)
	}
	if _, err := os.Lstat("/dev/ublk-blksnap/ram0"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the end of the daemon", func() bool { return !alive(pid) })
}

// TestNamespace: the daemon keeps no mount of the machine alive, and yet reaches
// what is mounted after its start.
func TestNamespace(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 3, 64<<20)
	ext4FS.make(t, disks[0])
	early := mount(t, disks[0])
	d := startDaemon(t)

	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", d.pid))
	if err != nil {
		t.Fatal(err)
	}
	if ours, err := os.Readlink("/proc/self/ns/mnt"); err != nil || own == ours {
		t.Errorf("the daemon is in our mount namespace %s, %v", ours, err)
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", d.pid))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(info, []byte(early)) {
		t.Errorf("the daemon keeps a mount:\n%s", info)
	}
	// State outlives the daemon: it is mounted where we see it.
	if m, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !bytes.Contains(m, []byte(" "+d.dir.State()+" ")) {
		t.Errorf("the state directory is no mount here, %v", err)
	}

	// Unmounted means free, though the mount is older than the daemon.
	umount(t, early)
	d.remove(d.add(disks[0]))

	// A filesystem mounted after the start holds storage, found through a
	// symbolic link; the daemon sees its true place.
	ext4FS.make(t, disks[1])
	late := mount(t, disks[1])
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(late, link); err != nil {
		t.Fatal(err)
	}
	dev := d.add(disks[2])
	s := d.create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: filepath.Join(link, "differences")}}})
	if st, err := os.Stat(filepath.Join(late, "differences")); err != nil || st.Size() == 0 {
		t.Errorf("the storage is not on %s: %v, %v", disks[1], st, err)
	}
	d.taken(s.ID)
	d.destroy(s.ID)
	if _, err := os.Stat(filepath.Join(late, "differences")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the storage is left: %v", err)
	}
	umount(t, late)
	d.remove(dev)
}

// TestStopRefused: SIGTERM removes nothing while a filter is used, and names the
// user; after that it removes all.
func TestStopRefused(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 2, 64<<20)
	d := startDaemon(t)
	idle, used := d.add(disks[0]), d.add(disks[1])
	ext4FS.make(t, used.Link)
	dir := mount(t, used.Link)
	refused := func(t *testing.T, why string) {
		t.Helper()
		if err := unix.Kill(d.pid, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the refusal in the log", func() bool {
			b, _ := os.ReadFile(d.log)
			return bytes.Contains(b, []byte("not stopped")) && bytes.Contains(b, []byte(why))
		})
		if a := d.call("ublk-blksnap", "daemon", "stop"); a.status != 5 || !strings.Contains(a.errout, why) {
			t.Errorf("daemon stop: %+v", a)
		}
		if all, err := d.Devices(ctx(t)); err != nil || len(all) != 2 {
			t.Errorf("%d devices, %v", len(all), err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(why), 0o600); err != nil {
			t.Error(err)
		}
		run(t, "sync", filepath.Join(dir, "file"))
	}
	refused(t, "mounted on "+dir)

	umount(t, dir)
	f, err := os.Open(used.Path)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir() // nothing is mounted: a file like any other
	refused(t, fmt.Sprintf("(process %d)", os.Getpid()))
	f.Close()

	s := d.take(0, idle)
	refused(t, "held by snapshot "+s.ID)
	d.destroy(s.ID)

	if a := d.call("ublk-blksnap", "daemon", "stop"); a.status != 0 || a.errout != "" {
		t.Fatalf("daemon stop: %+v", a)
	}
	// It returns when the daemon has ended.
	if alive(d.pid) {
		t.Error("the daemon still runs")
	}
	if !d.ended(patience) || d.err != nil {
		t.Fatalf("the daemon does not end: %v", d.err)
	}
	if a := d.call("ublk-blksnap", "daemon", "stop"); a.status != 4 {
		t.Errorf("daemon stop without a daemon: %+v", a)
	}
	waitFor(t, "the end of the devices", func() bool { return len(ublkDevices()) == 0 })
	for _, path := range []string{idle.Link, used.Link} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	ext4FS.clean(t, disks[1])
}

// TestKilled: without recovery SIGKILL ends the I/O of its devices with errors.
// Nothing hangs, and the next daemon begins from a clean machine.
func TestKilled(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 2, 64<<20)
	d := startDaemon(t)
	dev, other := d.add(disks[0]), d.add(disks[1])
	s := d.take(0, other)
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link, "errors=continue")
	writer := func(path string) chan error {
		end := make(chan error, 1)
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_SYNC|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer f.Close()
			for {
				if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
					end <- err
					return
				}
			}
		}()
		return end
	}
	writers := []chan error{writer(filepath.Join(dir, "file")), writer(other.Path), writer(s.Images[0].Path)}
	time.Sleep(300 * time.Millisecond)
	if err := unix.Kill(d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for i, w := range writers {
		t.Logf("writer %d: %v", i, await(t, "the end of a writer", w))
	}
	if !d.ended(patience) {
		t.Fatal("the process does not end")
	}
	if _, err := try("umount", dir); err != nil {
		t.Errorf("the dead filesystem cannot be unmounted: %v", err)
	}

	// Who looks is told, and no daemon is started.
	for _, args := range [][]string{{"list"}, {"status", dev.Name}, {"remove", dev.Name}, {"snapshot", "list"}, {"cbt", "info", dev.Name}, {"snapshot", "take", s.ID}} {
		a := d.call("ublk-blksnap", args...)
		for _, w := range []string{"no daemon runs", fmt.Sprintf("process %d", d.pid), "start it with",
			"filter " + dev.Name + " over " + disks[0] + " (" + dev.Path + ")", "filter " + other.Name + " over " + disks[1],
			"snapshot " + s.ID + " of " + other.Name + " with differences in /dev/shm"} {
			if a.status != 4 || a.out != "" || !strings.Contains(a.errout, w) {
				t.Errorf("%v without a daemon: %+v; want %q", args, a, w)
			}
		}
	}

	// As if it had died in a take: a filesystem stands still, and is on record.
	still := loopDisk(t, 64<<20, 512)
	ext4FS.make(t, still)
	frozen := mount(t, still)
	run(t, "fsfreeze", "-f", frozen)
	if err := os.WriteFile(filepath.Join(d.dir.State(), "frozen"), []byte(frozen+"\x00"), 0o600); err != nil {
		t.Fatal(err)
	}

	// The next daemon on the same directory.
	next := exec.Command(program(t), "daemon", "--run-dir", string(d.dir))
	next.Stdout, next.Stderr = os.Stdout, os.Stderr
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the next daemon", func() bool { _, err := d.Info(ctx(t)); return err == nil })
	if _, err := try("fsfreeze", "-u", frozen); err == nil {
		t.Error("a filesystem that the dead daemon froze still stands still")
	}
	if left := ublkDevices(); len(left) > 0 {
		t.Errorf("devices of the dead daemon: %v", left)
	}
	for _, kind := range []string{"cbt", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(d.dir.State(), kind)); err != nil || len(left) > 0 {
			t.Errorf("state of the dead daemon: %v, %v", left, err)
		}
	}
	// It knows what is missing until it is there again.
	lost := fmt.Sprintf("ublk-blksnap: the daemon before (process %d) died, and with it the filter %s over", d.pid, dev.Name)
	if a := d.call("ublk-blksnap", "list"); a.status != 0 || !strings.HasPrefix(a.errout, lost) {
		t.Errorf("list after a death: %+v", a)
	}
	if a := d.call("ublk-blksnap", "status", other.Name); a.status != 3 || !strings.Contains(a.errout, "which died: add it again: ublk-blksnap add "+disks[1]) {
		t.Errorf("status of what died: %+v", a)
	}
	if a := d.call("ublk-blksnap", "snapshot", "info", s.ID); a.status != 3 || !strings.Contains(a.errout, "which died") {
		t.Errorf("snapshot info of what died: %+v", a)
	}
	var back []control.Device
	for _, disk := range disks {
		again, err := d.AddDevice(ctx(t), control.AddRequest{Path: disk})
		if err != nil {
			t.Error(err)
			continue
		}
		back = append(back, again)
	}
	if i, err := d.Info(ctx(t)); err != nil || i.Lost != nil {
		t.Errorf("all filters are there again, and missed: %+v, %v", i.Lost, err)
	}
	for _, again := range back {
		if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: again.Name}); err != nil {
			t.Error(err)
		}
	}
	if err := next.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := next.Wait(); err != nil {
		t.Error(err)
	}
	run(t, "e2fsck", "-p", disks[0])
}

// TestOrphan: a device with recovery outlives its daemon, its I/O waiting. The
// next daemon throws it away only when told to; then the I/O fails.
func TestOrphan(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	yes := true
	dev := d.add(disk, func(r *control.AddRequest) { r.Recovery = &yes })
	if !dev.Recovery {
		t.Fatal("no recovery")
	}
	ext4FS.make(t, dev.Link)
	dir := mount(t, dev.Link, "errors=continue")
	if err := unix.Kill(d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !d.ended(patience) {
		t.Fatal("the process does not end")
	}
	written := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(dev.Path, os.O_RDWR|unix.O_DSYNC, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 4096), 32<<20)
			f.Close()
		}
		written <- err
	}()
	next := exec.Command(program(t), "daemon", "--run-dir", string(d.dir))
	next.Stdout, next.Stderr = os.Stdout, os.Stderr
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the next daemon", func() bool { _, err := d.Info(ctx(t)); return err == nil })
	d.refused([]string{"left by a daemon that died", "remove --force " + dev.Path}, "remove", dev.Path)
	d.refused([]string{"left by a daemon that died", "remove --force " + dev.Name}, "remove", dev.Name)
	d.refused([]string{"the name " + dev.Name + " is taken by " + dev.Path, "remove --force " + dev.Path}, "add", disk)
	if a := d.call("ublk-blksnap", "list"); a.status != 0 || !strings.Contains(a.errout, "whose I/O waits, "+dev.Name) {
		t.Errorf("list while I/O waits: %+v", a)
	}
	select {
	case err := <-written:
		t.Fatalf("the write did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if a := d.call("ublk-blksnap", "remove", "--force", dev.Name); a.status != 0 {
		t.Errorf("%+v", a)
	}
	if err := await(t, "the end of the write", written); err == nil {
		t.Error("a write succeeded without a daemon")
	}
	if a := d.call("ublk-blksnap", "list"); a.status != 0 || !strings.Contains(a.errout, "the filter "+dev.Name) || strings.Contains(a.errout, "waits") {
		t.Errorf("list when nothing waits any more: %+v", a)
	}
	if _, err := try("umount", dir); err != nil {
		t.Error(err)
	}
	waitFor(t, "the end of the device", func() bool { return len(ublkDevices()) == 0 })
	again, err := d.AddDevice(ctx(t), control.AddRequest{Path: disk})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.RemoveDevice(ctx(t), control.RemoveRequest{Device: again.Name}); err != nil {
		t.Error(err)
	}
	if err := next.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := next.Wait(); err != nil {
		t.Error(err)
	}
}

// TestRemovedByForce: the users of a filter get errors, those of its images too,
// and the snapshot breaks aloud.
func TestRemovedByForce(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	s := d.take(0, dev)
	image, err := os.OpenFile(s.Images[0].Path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var kinds []string
	watched := make(chan error, 1)
	go func() {
		watched <- d.Watch(context.Background(), s.ID, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil })
	}()
	if a := d.call("ublk-blksnap", "remove", "--force", dev.Name); a.status != 0 || a.errout != "" {
		t.Fatalf("%+v", a)
	}
	if err := <-watched; err != nil && control.CodeOf(err) != control.NotFound {
		t.Error(err)
	} else if got := strings.Join(kinds, " "); err == nil && got != "created taken corrupted destroyed" {
		t.Errorf("events: %s", got)
	}
	if _, err := image.Read(alignedBuf(4096)); err == nil {
		t.Error("the image of a removed device can be read")
	}
	if ss, err := d.Snapshots(ctx(t)); err != nil || len(ss) != 0 {
		t.Errorf("snapshots left: %v, %v", ss, err)
	}
	image.Close()
	d.remove(d.add(disk))
}

func alignedBuf(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return b
}

// TestTwoDaemons: the names are the machine's, whoever serves the devices: no
// daemon takes one from another, or removes it.
func TestTwoDaemons(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 2, 64<<20)
	a, b := startDaemon(t), startDaemon(t)
	named := func(name string) func(*control.AddRequest) {
		return func(r *control.AddRequest) { r.Name = name }
	}
	leads := func(link string, to control.Device) {
		t.Helper()
		if got, err := os.Readlink(link); err != nil || got != "../"+filepath.Base(to.Path) {
			t.Errorf("%s leads to %s, %v; want %s", link, got, err, to.Path)
		}
	}
	// Who can only read the directories holds nobody up.
	dev, err := os.Open("/dev")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := unix.Flock(int(dev.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	first := a.add(disks[0], named("data"))
	_, err = b.AddDevice(ctx(t), control.AddRequest{Path: disks[1], Name: "data"})
	want(t, err, control.Exists, "the name data is taken by "+first.Path, fmt.Sprintf("another daemon serves (process %d)", a.pid), "--name")
	leads(first.Link, first)
	second := b.add(disks[1], named("other"))

	// A third one begins, beside both, and clears away only what is dead.
	dead := "/dev/ublk-blksnap/dead"
	if err := os.Symlink("../ublkb77", dead); err != nil {
		t.Fatal(err)
	}
	startDaemon(t).stop()
	leads(first.Link, first)
	leads(second.Link, second)
	if _, err := os.Lstat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link of a device that is gone: %v", err)
	}

	// A link that leads elsewhere is not removed with the device it once led to.
	if err := errors.Join(os.Remove(second.Link), os.Symlink("../"+filepath.Base(first.Path), second.Link)); err != nil {
		t.Fatal(err)
	}
	b.remove(second)
	leads(second.Link, first)
	leads(first.Link, first)
	if err := os.Remove(second.Link); err != nil {
		t.Fatal(err)
	}

	// The name is free when its device is gone.
	a.remove(first)
	if _, err := os.Lstat(first.Link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
	again := b.add(disks[1], named("data"))
	leads(first.Link, again)
	b.remove(again)
}

// TestRunDirOfOthers: a run directory that somebody has prepared is refused, and
// nothing that is root's is touched through it.
func TestRunDirOfOthers(t *testing.T) {
	needVM(t)
	precious := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "run")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const nobody = 65534
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	prepare := exec.Command("ln", "-s", precious, filepath.Join(dir, "daemon.log"))
	prepare.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := prepare.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	refused := func(in, why string) {
		t.Helper()
		for _, args := range [][]string{{"add", "/dev/null"}, {"daemon"}} {
			out, err := try(program(t), append([]string{"--run-dir", in}, args...)...)
			if err == nil || !strings.Contains(out, why) {
				t.Errorf("%v in %s: %v, %s; want %q", args, in, err, out, why)
			}
		}
		if b, err := os.ReadFile(precious); err != nil || string(b) != "precious" {
			t.Errorf("precious holds %q, %v", b, err)
		}
	}
	refused(dir, "belongs to user 65534")
	refused(filepath.Join(dir, "below"), "belongs to user 65534")
	if left := entries(dir); left != 1 {
		t.Errorf("%d files in the directory of another", left)
	}
	if err := os.Chown(dir, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	refused(dir, "can be written to by others")
	// Closed now, but what is in it is still his.
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := try(program(t), "--run-dir", dir, "add", "/dev/null"); err == nil || !strings.Contains(out, "daemon.log is a symbolic link: remove it") {
		t.Errorf("a log that is a link: %v, %s", err, out)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "precious" {
		t.Errorf("precious holds %q, %v", b, err)
	}
}
