package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// dropInherited rids this thread, and the program that it is about to exec, of what
// the process inherited from whoever started it. A daemon outlives its starter, and
// serves others.
//
// It always resets the limits, the mask of signals, the open files and the file mode
// mask, and makes the thread an I/O flusher. If a command started the daemon, it resets the scheduling and the control
// groups too, because the user of the command did not mean them for a daemon. Who
// runs the daemon in the foreground, or as a service, has chosen them for it.
// [ublk.PrepareProcess] does what needs no exec.
func dropInherited(reportFD int) []error {
	var failed []error
	try := func(what string, err error) {
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", what, err))
		}
	}
	try("lift limits", ublk.RaiseLimits())
	// From here on, to wait for memory may be to wait for disks that wait for this daemon.
	try("become an I/O flusher", unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0))
	// A blocked SIGURG would keep the runtime from stopping the queues' threads.
	try("unblock signals", unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{}, nil))
	unix.Umask(0o022)
	try("close inherited files", closeOnExec(reportFD))
	if reportFD < 3 || Supervised() { // a guard may have started it, in the service
		return failed
	}
	try("leave the control groups of the caller", leaveGroups())
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
	try("reset the scheduling", unix.SchedSetAttr(0, &attr, 0))
	var all unix.CPUSet
	for i := range all {
		all[i] = ^all[i] // every processor: the kernel takes those there are
	}
	try("run on every processor", unix.SchedSetaffinity(0, &all))
	const whoProcess = 1 // IOPRIO_WHO_PROCESS; a priority of 0 is none of its own
	try("reset the I/O priority", rawSyscall(unix.SYS_IOPRIO_SET, whoProcess, 0, 0))
	const defaultPolicy = 0 // MPOL_DEFAULT
	try("reset the memory policy", rawSyscall(unix.SYS_SET_MEMPOLICY, defaultPolicy, 0, 0))
	return failed
}

func rawSyscall(trap, a, b, c uintptr) error {
	if _, _, errno := unix.RawSyscall(trap, a, b, c); errno != 0 && errno != unix.ENOSYS {
		return errno
	}
	return nil
}

// closeOnExec closes all files at the exec but the three that everybody has, and
// the one given.
func closeOnExec(but int) error {
	upTo := ^uint32(0)
	if but < 3 {
		return unix.CloseRange(3, uint(upTo), unix.CLOSE_RANGE_CLOEXEC)
	}
	err := unix.CloseRange(uint(but)+1, uint(upTo), unix.CLOSE_RANGE_CLOEXEC)
	if but > 3 {
		err = errors.Join(err, unix.CloseRange(3, uint(but)-1, unix.CLOSE_RANGE_CLOEXEC))
	}
	return err
}

// leaveGroups moves the process to the root of each hierarchy of control groups. So
// it leaves the group of a login, a job or a container, and that group's limits. If
// the process cannot see the hierarchy's real root, the limits above the root that
// it sees stay in force.
func leaveGroups() error {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	return errors.Join(moveToRoots(string(own), string(mounts), func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
	})...)
}

// moveToRoots calls move for the mount of each hierarchy in which the process is not
// at the root. own is the text of its /proc/PID/cgroup (cgroups(7)).
func moveToRoots(own, mounts string, move func(dir string) error) []error {
	var failed []error
	for _, line := range strings.Split(strings.TrimSpace(own), "\n") {
		_, rest, _ := strings.Cut(line, ":")
		controllers, path, _ := strings.Cut(rest, ":")
		if path == "/" || path == "" {
			continue
		}
		dir := hierarchy(controllers, mounts)
		if dir == "" {
			failed = append(failed, fmt.Errorf("%s: its root is not mounted", line))
		} else if err := move(dir); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", line, err))
		}
	}
	return failed
}

// hierarchy is where the root of the hierarchy with these controllers is mounted,
// empty if it is not. No controllers means the hierarchy of version 2.
func hierarchy(controllers, mounts string) string {
	for _, line := range strings.Split(mounts, "\n") {
		mount, fs, _ := strings.Cut(line, " - ")
		m, f := strings.Fields(mount), strings.Fields(fs)
		if len(m) < 5 || len(f) < 3 || m[3] != "/" {
			continue
		}
		if controllers == "" {
			if f[0] == "cgroup2" {
				return m[4]
			}
			continue
		}
		has := strings.Split(f[2], ",")
		missing := func(c string) bool { return !slices.Contains(has, c) }
		if f[0] == "cgroup" && !slices.ContainsFunc(strings.Split(controllers, ","), missing) {
			return m[4]
		}
	}
	return ""
}
