// Package guest is the machine in which the tests of the real program run: what it
// has, disks and filesystems to destroy, commands, files, and patience. Whatever a
// function here makes goes away with its test; that fails if somebody still holds
// it.
//
//	UBLK_BLKSNAP_VM=1     there is ublk, root, and nothing of value (set by the machine)
//	UBLK_BLKSNAP_BIN      the program; bin/ublk-blksnap of the tree, if empty
//	UBLK_BLKSNAP_LONG=1   minutes instead of seconds for whatever runs for a time
//	UBLK_BLKSNAP_SHARE    0 or 1: which share of NeedEither's tests is run, all, if empty; what wants four queues is another machine's
//	UBLK_BLKSNAP_KILLS    how often the daemon is killed under load; 200 in the long form, if empty
package guest

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Need skips a test that needs root, ublk, and disks to destroy.
func Need(t testing.TB) {
	t.Helper()
	if os.Getenv("UBLK_BLKSNAP_VM") != "1" {
		t.Skip("needs root and ublk: make integration")
	}
}

// NeedEither is Need, for a test of what is the same with every kernel. Of two machines that
// share these tests each runs about half of them.
func NeedEither(t testing.TB) {
	t.Helper()
	Need(t)
	share := os.Getenv("UBLK_BLKSNAP_SHARE")
	sum := fnv.New32a()
	fmt.Fprint(sum, t.Name())
	if Shares() && share != strconv.FormatUint(uint64(sum.Sum32()%2), 10) {
		t.Skip("the other machine runs it: UBLK_BLKSNAP_SHARE=" + share)
	}
}

// Shares says whether other machines run some of the tests that this one could run.
func Shares() bool { return os.Getenv("UBLK_BLKSNAP_SHARE") != "" }

// NeedKernel skips a test of what an older kernel does not have.
func NeedKernel(t testing.TB, major, minor int, what string) {
	t.Helper()
	if !KernelAtLeast(t, major, minor) {
		t.Skipf("needs kernel %d.%d: %s", major, minor, what)
	}
}

// KernelAtLeast says whether the kernel is of that version or newer.
func KernelAtLeast(t testing.TB, major, minor int) bool {
	t.Helper()
	return !ublk.OlderThan(ublk.KernelRelease(), fmt.Sprintf("%d.%d", major, minor))
}

// Long says whether tests shall take as long as they can use.
func Long() bool { return os.Getenv("UBLK_BLKSNAP_LONG") == "1" }

// Span is how long something runs that could run for ever.
func Span(short, long time.Duration) time.Duration {
	if Long() {
		return long
	}
	return short
}

// QueueCounts are the numbers of queues that tests try: those of 1, 2 and 4 that
// the machine has processors for, as the kernel makes no more.
func QueueCounts() []int {
	return slices.DeleteFunc([]int{1, 2, 4}, func(n int) bool { return n > max(1, runtime.NumCPU()) })
}

// kernelComplaints are the lines of the kernel's log that no test provokes.
func kernelComplaints() []string {
	f, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return []string{err.Error()}
	}
	defer f.Close()
	var bad []string
	line := make([]byte, 8192)
	for {
		n, err := unix.Read(int(f.Fd()), line)
		if errors.Is(err, unix.EPIPE) { // overwritten meanwhile
			continue
		}
		if err != nil || n <= 0 {
			return bad
		}
		_, text, _ := strings.Cut(string(line[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		// A debug exception in the kernel, which sets no breakpoints and takes no single steps here: an
		// emulated processor's own, as with machine.ErrStale.
		if strings.Contains(text, "exc_debug_kernel") {
			continue
		}
		for _, s := range []string{"BUG:", "WARNING:", "Oops", "blocked for more than", "lockup", "general protection", "Kernel panic", "Out of memory"} {
			if strings.Contains(text, s) {
				bad = append(bad, text)
			}
		}
	}
}

// TreeFile is the absolute path of a file of this tree, from wherever below it.
func TreeFile(t testing.TB, name string) string {
	t.Helper()
	for dir := "."; ; dir = filepath.Join(dir, "..") {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			path, err := filepath.Abs(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			return path
		}
		if root, err := filepath.Abs(dir); err != nil || root == "/" {
			t.Fatalf("no go.mod above the current directory: %v", err)
		}
	}
}

// Entries is the number of entries of a directory, 0 if there is none.
func Entries(dir string) int {
	list, _ := os.ReadDir(dir)
	return len(list)
}

// UblkDevices are the names of all ublk devices and disks.
func UblkDevices() []string {
	chars, _ := filepath.Glob("/sys/class/ublk-char/*")
	disks, _ := filepath.Glob("/sys/block/ublkb*")
	var out []string
	for _, p := range append(chars, disks...) {
		out = append(out, filepath.Base(p))
	}
	return out
}

// Main is the main function of a folder of tests. It looks at the kernel's log
// when all is done: a test may pass over a kernel that has complained.
func Main(m *testing.M) {
	status := m.Run()
	if os.Getenv("UBLK_BLKSNAP_VM") == "1" {
		if bad := kernelComplaints(); len(bad) > 0 {
			fmt.Printf("--- FAIL: the kernel's log\n    %s\n", strings.Join(bad, "\n    "))
			status = 1
		}
	}
	os.Exit(status)
}
