package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
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
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	dir, call := fresh(t)
	a := call("add", disk)
	if a.Status != 0 || a.Out != "/dev/ublk-blksnap/ram0\n" || a.Err != "" {
		t.Fatalf("%+v", a)
	}
	pid := pidOf(t, dir)
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("the daemon is in the session of %d, %v", sid, err)
	}
	if a := call("list"); a.Status != 0 || !strings.Contains(a.Out, disk) {
		t.Errorf("%+v", a)
	}
	var list []control.Device
	if a := call("list", "--json"); json.Unmarshal([]byte(a.Out), &list) != nil || len(list) != 1 {
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
	if a := call("daemon"); a.Status != 1 || a.Err != fmt.Sprintf("ublk-blksnap: start the daemon: another daemon (process %d) runs on %s\n", pid, dir) {
		t.Errorf("second daemon: %+v", a)
	}
	if a := call("remove", "ram0"); a.Status != 0 || a.Out != "" || a.Err != "" {
		t.Errorf("%+v", a)
	}
	if _, err := os.Lstat("/dev/ublk-blksnap/ram0"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the end of the daemon", func() bool { return !alive(pid) })
}

// TestNamespace: the daemon keeps no mount of the machine alive, and yet reaches
// what is mounted after its start.
func TestNamespace(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 3, 64<<20)
	guest.Ext4.Make(t, disks[0])
	early := guest.Mount(t, disks[0])
	d := program.Start(t)

	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", d.PID))
	if err != nil {
		t.Fatal(err)
	}
	if ours, err := os.Readlink("/proc/self/ns/mnt"); err != nil || own == ours {
		t.Errorf("the daemon is in our mount namespace %s, %v", ours, err)
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", d.PID))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(info, []byte(early)) {
		t.Errorf("the daemon keeps a mount:\n%s", info)
	}
	// State outlives the daemon: it is mounted where we see it.
	if m, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !bytes.Contains(m, []byte(" "+d.RunDir.State()+" ")) {
		t.Errorf("the state directory is no mount here, %v", err)
	}

	// Unmounted means free, though the mount is older than the daemon.
	guest.Unmount(t, early)
	d.Remove(d.Add(disks[0]))

	// A filesystem mounted after the start holds storage, found through a
	// symbolic link; the daemon sees its true place.
	guest.Ext4.Make(t, disks[1])
	late := guest.Mount(t, disks[1])
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(late, link); err != nil {
		t.Fatal(err)
	}
	dev := d.Add(disks[2])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: filepath.Join(link, "differences")}}})
	if st, err := os.Stat(filepath.Join(late, "differences")); err != nil || st.Size() == 0 {
		t.Errorf("the storage is not on %s: %v, %v", disks[1], st, err)
	}
	d.Taken(s.ID)
	d.Destroy(s.ID)
	if _, err := os.Stat(filepath.Join(late, "differences")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the storage is left: %v", err)
	}
	guest.Unmount(t, late)
	d.Remove(dev)
}

// TestStopRefused: SIGTERM removes nothing while a filter is used, and names the
// user; after that it removes all.
func TestStopRefused(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	d := program.Start(t)
	idle, used := d.Add(disks[0]), d.Add(disks[1])
	guest.Ext4.Make(t, used.Link)
	dir := guest.Mount(t, used.Link)
	refused := func(t *testing.T, why string) {
		t.Helper()
		if err := unix.Kill(d.PID, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		guest.WaitFor(t, "the refusal in the log", func() bool {
			b, _ := os.ReadFile(d.Log)
			return bytes.Contains(b, []byte("not stopped")) && bytes.Contains(b, []byte(why))
		})
		if a := d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 5 || !strings.Contains(a.Err, why) {
			t.Errorf("daemon stop: %+v", a)
		}
		if all, err := d.Devices(guest.Context(t)); err != nil || len(all) != 2 {
			t.Errorf("%d devices, %v", len(all), err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(why), 0o600); err != nil {
			t.Error(err)
		}
		guest.Run(t, "sync", filepath.Join(dir, "file"))
	}
	refused(t, "mounted on "+dir)

	guest.Unmount(t, dir)
	f, err := os.Open(used.Path)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir() // nothing is mounted: a file like any other
	refused(t, fmt.Sprintf("(process %d)", os.Getpid()))
	f.Close()

	s := d.Take(0, idle)
	refused(t, "held by snapshot "+s.ID)
	d.Destroy(s.ID)

	if a := d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 0 || a.Err != "" {
		t.Fatalf("daemon stop: %+v", a)
	}
	// It returns when the daemon has ended.
	if alive(d.PID) {
		t.Error("the daemon still runs")
	}
	if !d.Ended(guest.Patience) || d.Err != nil {
		t.Fatalf("the daemon does not end: %v", d.Err)
	}
	if a := d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 4 {
		t.Errorf("daemon stop without a daemon: %+v", a)
	}
	guest.WaitFor(t, "the end of the devices", func() bool { return len(guest.UblkDevices()) == 0 })
	for _, path := range []string{idle.Link, used.Link} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	guest.Ext4.Check(t, disks[1])
}

// TestTwoDaemons: the names are the machine's, whoever serves the devices: no
// daemon takes one from another, or removes it.
func TestTwoDaemons(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	a, b := program.Start(t), program.Start(t)
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
	first := a.Add(disks[0], named("data"))
	_, err = b.AddDevice(guest.Context(t), control.AddRequest{Path: disks[1], Name: "data"})
	program.WantError(t, err, control.Exists, "the name data is taken by "+first.Path, fmt.Sprintf("another daemon serves (process %d)", a.PID), "--name")
	leads(first.Link, first)
	second := b.Add(disks[1], named("other"))

	// A third one begins, beside both, and clears away only what is dead.
	dead := "/dev/ublk-blksnap/dead"
	if err := os.Symlink("../ublkb77", dead); err != nil {
		t.Fatal(err)
	}
	program.Start(t).StopAndWait()
	leads(first.Link, first)
	leads(second.Link, second)
	if _, err := os.Lstat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link of a device that is gone: %v", err)
	}

	// A link that leads elsewhere is not removed with the device it once led to.
	if err := errors.Join(os.Remove(second.Link), os.Symlink("../"+filepath.Base(first.Path), second.Link)); err != nil {
		t.Fatal(err)
	}
	b.Remove(second)
	leads(second.Link, first)
	leads(first.Link, first)
	if err := os.Remove(second.Link); err != nil {
		t.Fatal(err)
	}

	// The name is free when its device is gone.
	a.Remove(first)
	if _, err := os.Lstat(first.Link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
	again := b.Add(disks[1], named("data"))
	leads(first.Link, again)
	b.Remove(again)
}

// TestRunDirOfOthers: a run directory that somebody has prepared is refused, and
// nothing that is root's is touched through it.
func TestRunDirOfOthers(t *testing.T) {
	guest.NeedEither(t)
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
			out, err := guest.Try(program.Path(t), append([]string{"--run-dir", in}, args...)...)
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
	if left := guest.Entries(dir); left != 1 {
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
	if out, err := guest.Try(program.Path(t), "--run-dir", dir, "add", "/dev/null"); err == nil || !strings.Contains(out, "daemon.log is a symbolic link: remove it") {
		t.Errorf("a log that is a link: %v, %s", err, out)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "precious" {
		t.Errorf("precious holds %q, %v", b, err)
	}
}
