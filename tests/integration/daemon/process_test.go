package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestInheritsNothing: a daemon that a command starts has nothing of the one who
// typed it, and no signal but those that ask it to stop ends or stops it.
func TestInheritsNothing(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	guest.Ext4.Make(t, disks[1])
	callers := guest.Mount(t, disks[1])
	dir, call := fresh(t)
	const group = "/sys/fs/cgroup/caller"
	for _, c := range []string{"+pids", "+memory", "+cpu"} {
		if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte(c), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(group) })
	for file, limit := range map[string]string{"pids.max": "40", "memory.max": "268435456", "cpu.max": "90000 100000"} {
		if err := os.WriteFile(filepath.Join(group, file), []byte(limit), 0); err != nil {
			t.Fatal(err)
		}
	}

	script := `echo 0 >` + group + `/cgroup.procs && cd ` + callers + ` && exec 9>held 7<held || exit
		umask 0777; ulimit -t 600 -f 8 -d 4000000 -v 8000000 -n 64 -u 60 -s 1024 -i 10 -x 10 || exit
		exec env --block-signal --ignore-signal=HUP,INT,CHLD nice -n 10 ionice -c 3 taskset -c 0 chrt --batch 0 "$@"`
	out, err := exec.Command("bash", "-c", script, "caller", program.Path(t), "--run-dir", dir, "add", disks[0]).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pid := pidOf(t, dir)
	defer func() {
		if a := call("daemon", "stop"); a.Status != 0 {
			t.Errorf("%+v", a)
		}
	}()

	guest.Unmount(t, callers) // neither its directory nor its files are held
	read := func(file string) string {
		t.Helper()
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || cwd != "/" {
		t.Errorf("it works in %s, %v", cwd, err)
	}
	for _, fd := range []int{7, 9} {
		if file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil && strings.HasSuffix(file, "held") {
			t.Errorf("it holds %s open", file)
		}
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("it is in the session of %d, %v", sid, err)
	}
	if name := strings.TrimSpace(read("comm")); name != "ublk-blksnap" {
		t.Errorf("it is called %s", name)
	}
	if groups := strings.TrimSpace(read("cgroup")); groups != "0::/" {
		t.Errorf("it is in the control group %s", groups)
	}
	for _, name := range []string{"cpu time", "file size", "data size", "processes", "address space", "file locks", "locked memory"} {
		for _, line := range strings.Split(read("limits"), "\n") {
			if rest, ok := strings.CutPrefix(line, "Max "+name+" "); ok && !strings.HasPrefix(strings.TrimSpace(rest), "unlimited") {
				t.Errorf("limited: %s", line)
			}
		}
	}
	var files unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &files); err != nil || files.Cur < 65536 {
		t.Errorf("limit of open files %d, %v", files.Cur, err)
	}
	if !strings.Contains(read("status"), "\nUmask:\t0022\n") {
		t.Errorf("the file mode mask is another:\n%s", read("status"))
	}
	var own unix.CPUSet
	if err := unix.SchedGetaffinity(0, &own); err != nil {
		t.Fatal(err)
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		var tid int
		fmt.Sscan(thread.Name(), &tid)
		var cpus unix.CPUSet
		if err := unix.SchedGetaffinity(tid, &cpus); errors.Is(err, unix.ESRCH) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSpace(read("task/" + thread.Name() + "/comm"))
		if strings.HasPrefix(name, "iou-") {
			continue // a worker of the kernel
		}
		if name == "exe" {
			t.Errorf("thread %d is called %s", tid, name)
		}
		// A thread of a queue runs where its queue does.
		if cpus != own && cpus.Count() == 1 && !strings.HasPrefix(name, "ram0") {
			t.Errorf("%s runs on %d processors", name, cpus.Count())
		}
		attr, err := unix.SchedGetAttr(tid, 0)
		if err != nil || attr.Policy != unix.SCHED_NORMAL || attr.Nice != 0 {
			t.Errorf("%s is scheduled by %+v, %v", name, attr, err)
		}
		if prio := guest.Run(t, "ionice", "-p", thread.Name()); !strings.HasPrefix(prio, "none") {
			t.Errorf("%s has the I/O priority %s", name, prio)
		}
	}
	// One thread of the runtime has only those signals that are waited for. Any
	// other may be about to make a thread, with all blocked for that time.
	guest.WaitFor(t, "threads that let signals in", func() bool {
		blocking := 0
		all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		for _, thread := range all {
			status, err := os.ReadFile(thread)
			if err == nil && !strings.HasPrefix(string(status), "Name:\tiou-") && !strings.Contains(string(status), "\nSigBlk:\t0000000000000000\n") {
				blocking++
			}
		}
		return blocking <= 1
	})

	for _, s := range []unix.Signal{unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGALRM, unix.SIGVTALRM, unix.SIGPROF, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGXCPU, unix.SIGXFSZ, unix.SIGSTKFLT, unix.SIGIO, unix.SIGPWR, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGCHLD, unix.SIGURG, 34, 64} {
		if err := unix.Kill(pid, s); err != nil {
			t.Fatalf("%v: %v", s, err)
		}
		if a := call("list"); a.Status != 0 || !strings.Contains(a.Out, disks[0]) || pidOf(t, dir) != pid {
			t.Fatalf("after %v: %+v", s, a)
		}
	}
	guest.WaitFor(t, "what the daemon is doing, in its log", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "daemon.log"))
		return strings.Contains(string(b), "msg=goroutine")
	})
}

// TestCannotForget: what a daemon keeps of the one who started it, because it
// cannot do otherwise, is in its log.
func TestCannotForget(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	dir, call := fresh(t)
	const group = "/sys/fs/cgroup/jail"
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(group) })
	script := "echo 0 >" + group + `/cgroup.procs && umount -R -l /sys/fs/cgroup && exec "$@"`
	out, err := exec.Command("unshare", "-m", "bash", "-c", script, "jail", program.Path(t), "--run-dir", dir, "add", disk).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	said, err := os.ReadFile(filepath.Join(dir, "daemon.log"))
	if err != nil || !strings.Contains(string(said), "start the daemon: leave the control groups of the caller: 0::/jail: its root is not mounted") {
		t.Errorf("the log says %q, %v", said, err)
	}
	if a := call("daemon", "stop"); a.Status != 0 {
		t.Errorf("%+v", a)
	}
}
