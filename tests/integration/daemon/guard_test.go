package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// guardOf is the only guard there is.
func guardOf(t testing.TB) (pid int) {
	t.Helper()
	guest.WaitFor(t, "one guard", func() bool {
		all := program.Processes("ublk-guard")
		if len(all) == 1 {
			pid = all[0]
		}
		return len(all) == 1
	})
	return pid
}

// ours are all processes of ours.
func ours() (pids []int) {
	for _, comm := range []string{"ublk-guard", "ublk-probe", "ublk-blksnap"} {
		pids = append(pids, program.Processes(comm)...)
	}
	return pids
}

// TestGuard: without systemd too a daemon that dies is followed by the next one, under
// a filesystem that only notices a pause. The guard that sees to it is in the mount
// namespace from which daemons are started, keeps no filesystem from being unmounted,
// and is not chosen when memory ends.
func TestGuard(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	guest.Ext4.Make(t, disks[1])
	early := guest.Mount(t, disks[1])
	dir, call := fresh(t)
	if a := call("add", disks[0], "--name", "data"); a.Status != 0 {
		t.Fatalf("%+v", a)
	}
	t.Cleanup(func() {
		if t.Failed() { // nothing of it shall be in the way of the next test
			said, _ := os.ReadFile(filepath.Join(dir, "daemon.log"))
			t.Logf("the daemon's log:\n%s", said)
			call("remove", "--force", "data")
			call("daemon", "stop")
		}
	})
	guard := guardOf(t)
	namespace := func(pid int) string {
		t.Helper()
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	if namespace(guard) != namespace(1) {
		t.Errorf("the guard is in the mount namespace %s, process 1 in %s", namespace(guard), namespace(1))
	}
	if score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", guard)); err != nil || strings.TrimSpace(string(score)) != "-1000" {
		t.Errorf("the guard's oom_score_adj is %s, %v", score, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", guard))
	if err != nil || strings.Contains(string(status), "\nVmLck:\t       0 kB") {
		t.Errorf("the guard's memory is not locked: %s, %v", status, err)
	}
	guest.Unmount(t, early)
	guest.Ext4.Make(t, disks[1]) // nobody has it open: its filesystem is gone

	const link = "/dev/ublk-blksnap/data"
	guest.Ext4.Make(t, link)
	at := guest.Mount(t, link)
	sums := guest.SomeFiles(t, filepath.Join(at, "files"), 1)
	stop := guest.BusyFiles(t, at)
	pid := pidOf(t, dir)
	next := func() {
		t.Helper()
		dead := pid
		guest.WaitFor(t, "the next daemon", func() bool {
			b, _ := os.ReadFile(filepath.Join(dir, "daemon.lock")) // may be empty for an instant
			_, err := fmt.Sscan(string(b), &pid)
			return err == nil && pid != dead && alive(pid)
		})
		if err := os.WriteFile(filepath.Join(at, "file"), []byte("now"), 0o600); err != nil {
			t.Error(err)
		}
		guest.Run(t, "sync", filepath.Join(at, "file"))
		// It may not answer yet. Then the command says who has died.
		if a := call("list"); a.Status != 0 || !strings.Contains(a.Out, disks[0]) || a.Err != "" && !strings.Contains(a.Err, ") died, ") {
			t.Errorf("%+v", a)
		}
		if namespace(pid) == namespace(1) {
			t.Errorf("the next daemon is in the mount namespace of process 1")
		}
	}
	kill := func(pids ...int) {
		t.Helper()
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		kill(pid)
		next()
	}
	kill(guard)
	guest.WaitFor(t, "another guard", func() bool { return guardOf(t) != guard })
	kill(pid)
	next()

	// Guard and daemon at once: the process that asks blkid is left, and starts a guard.
	guard = guardOf(t)
	for _, pid := range []int{guard, pid} {
		_ = unix.Kill(pid, unix.SIGSTOP)
	}
	kill(guard, pid)
	next()
	// A prober that is killed is replaced too, in the same daemon.
	probers := program.Processes("ublk-probe")
	kill(probers...)
	guest.WaitFor(t, "another prober", func() bool {
		now := program.Processes("ublk-probe")
		return len(now) == 1 && !slices.Contains(probers, now[0])
	})
	if now := pidOf(t, dir); now != pid {
		t.Errorf("the daemon is process %d, was %d", now, pid)
	}

	// With nobody left the next command starts the daemon, whatever it asks.
	guardOf(t)
	all := ours()
	for _, pid := range all {
		_ = unix.Kill(pid, unix.SIGSTOP) // so that none starts another in between
	}
	kill(all...)
	guest.WaitFor(t, "the end of all", func() bool { return len(ours()) == 0 })
	dead := pid
	if a := call("daemon", "stop"); a.Status != 4 || !strings.Contains(a.Err, fmt.Sprintf("(process %d) died", dead)) || len(ours()) > 0 {
		t.Errorf("a stop that finds the daemon dead: %+v, and there are %v", a, ours())
	}
	if a := call("list"); a.Status != 0 || !strings.Contains(a.Out, disks[0]) || !strings.Contains(a.Err, fmt.Sprintf("(process %d) died", dead)) {
		t.Errorf("%+v", a)
	}
	next()
	stop()
	guest.SameFiles(t, filepath.Join(at, "files"), sums)
	guest.Unmount(t, at)
	if a := call("daemon", "stop"); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	if left := ours(); len(left) > 0 {
		t.Errorf("processes %v are left when the daemon has stopped", left)
	}
	guest.Ext4.Check(t, disks[0])
}
