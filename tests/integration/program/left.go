package program

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// What a daemon has of its own beside what the Go runtime has: threads that it has named,
// and processes.

// namedThreads are the names of the daemon's threads that are neither the runtime's nor
// the kernel's workers.
func (d *Daemon) namedThreads() (names []string) {
	own, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", d.PID))
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", d.PID))
	for _, f := range files {
		name, err := os.ReadFile(f)
		if err != nil || bytes.Equal(name, own) || bytes.HasPrefix(name, []byte("iou-")) {
			continue
		}
		names = append(names, strings.TrimSpace(string(name)))
	}
	slices.Sort(names)
	return names
}

// noThreads makes sure that a daemon without devices has the threads only that it began
// with.
func (d *Daemon) noThreads() {
	d.t.Helper()
	devices, err := d.Devices(guest.Context(d.t))
	snapshots, err2 := d.Snapshots(guest.Context(d.t))
	if err != nil || err2 != nil || len(devices)+len(snapshots) > 0 {
		return
	}
	if i, err := d.Info(guest.Context(d.t)); err != nil || i.Lost != nil {
		return // what it could not take over it may still serve
	}
	guest.WaitFor(d.t, fmt.Sprintf("the end of threads: of %v there were %v", d.namedThreads(), d.threads), func() bool {
		return slices.Equal(d.namedThreads(), d.threads)
	})
}

// processes are the daemon's, its prober and its guard.
func (d *Daemon) processes() (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if text, err := os.ReadFile(f); err == nil && pid != os.Getpid() && bytes.Contains(text, []byte(d.RunDir)) && !slices.Contains(pids, pid) {
			pids = append(pids, pid)
			pids = append(pids, childrenOf(pid)...)
		}
	}
	return pids
}

func childrenOf(pid int) (pids []int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(append(pids, child), childrenOf(child)...)
			}
		}
	}
	return pids
}

// noProcesses makes sure that none of these is there any more, once the daemon has ended,
// nor any that has come since.
func (d *Daemon) noProcesses(before []int) {
	d.t.Helper()
	there := func() (left []int) {
		for _, pid := range append(before, d.processes()...) {
			if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !bytes.Contains(status, []byte(") Z ")) {
				left = append(left, pid)
			}
		}
		return left
	}
	guest.WaitFor(d.t, fmt.Sprintf("the end of the processes %v of %v", there(), before), func() bool { return len(there()) == 0 })
}
