package systemd

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hang has one thread of a process stand still until the process is killed.
func hang(t *testing.T, pid, thread string) {
	t.Helper()
	stopped := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // who traces is a thread
		tid := findThread(pid, thread)
		err := unix.PtraceSeize(tid)
		if err == nil {
			err = unix.PtraceInterrupt(tid)
		}
		var status unix.WaitStatus
		if err == nil {
			_, err = unix.Wait4(tid, &status, unix.WALL, nil)
		}
		stopped <- err
		for err == nil && status.Stopped() { // the process is not gone before its thread has been waited for
			_, err = unix.Wait4(tid, &status, unix.WALL, nil)
		}
	}()
	if err := <-stopped; err != nil {
		t.Fatalf("stop thread %s of process %s: %v", thread, pid, err)
	}
}

// findThread is the number of the thread of that name, 0 if there is none.
func findThread(pid, name string) int {
	names, _ := filepath.Glob("/proc/" + pid + "/task/*/comm")
	for _, path := range names {
		if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == name {
			tid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return tid
		}
	}
	return 0
}
