package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hookDir is a directory of hooks.
func hookDir(t *testing.T, hooks map[string]string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hooks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, text := range hooks {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindHooks(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx := context.Background()
	dir := hookDir(t, map[string]string{"20-b": "", "10-a.sh": "", ".hidden": "", "10-a.sh~": "", "x.dpkg-old": ""})
	if names, err := p.FindHooks(ctx, dir); err != nil || !slices.Equal(names, []string{"10-a.sh", "20-b"}) {
		t.Errorf("%v, %v", names, err)
	}
	if names, err := findHooks("/proc/self/root", dir); err != nil || len(names) != 2 { // as the daemon reaches them
		t.Errorf("%v, %v", names, err)
	}
	if names, err := p.FindHooks(ctx, filepath.Join(dir, "none")); err != nil || len(names) > 0 {
		t.Errorf("without a directory: %v, %v", names, err)
	}
	// Whatever another than root could have put there, or that cannot be run, is no hook that
	// may be passed over.
	for what, spoil := range map[string]func(path string) error{
		"not root's alone":    func(path string) error { return os.Chmod(path, 0o775) },
		"root's alone: chown": func(path string) error { return os.Chown(path, 65534, 0) },
		"cannot be executed":  func(path string) error { return os.Chmod(path, 0o644) },
		"no regular file":     func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/bin/true", path)) },
		dir + " is not root":  func(string) error { return os.Chmod(dir, 0o777) },
	} {
		if err := errors.Join(os.Chmod(dir, 0o755), os.RemoveAll(filepath.Join(dir, "20-b")), os.WriteFile(filepath.Join(dir, "20-b"), nil, 0o755), spoil(filepath.Join(dir, "20-b"))); err != nil {
			t.Fatal(err)
		}
		if names, err := p.FindHooks(ctx, dir); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v, %v", what, names, err)
		}
		if err := p.RunHook(ctx, Hook{Path: filepath.Join(dir, "20-b"), Limit: time.Minute}); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s is run: %v", what, err)
		}
	}
}

func TestRunHook(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := hookDir(t, map[string]string{
		"says":  "#!/bin/sh\necho \"$1 $PHASE $PATH $(pwd)\" >$OUT\ntrap >>$OUT\nsed -n 's/^SigIgn://p' /proc/self/status >>$OUT\n",
		"fails": "#!/bin/sh\necho one\necho the database is down >&2\nexit 3\n",
		// It and its child go together.
		"hangs":  "#!/bin/sh\nsleep 1000 &\necho $$ $! >$OUT\nwait\n",
		"stays":  "#!/bin/sh\ntrap '' TERM\nsleep 1000 &\necho $$ $! >$OUT\nwait; wait\n",
		"leaves": "#!/bin/sh\nsleep 1000 &\necho $$ $! >$OUT\n",
	})
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	out := filepath.Join(dir, "out")
	run := func(ctx context.Context, name string, limit time.Duration) error {
		return p.RunHook(ctx, Hook{Path: filepath.Join(dir, name), Args: []string{"pre"}, Env: []string{"PHASE=pre", "OUT=" + out}, Limit: limit})
	}
	// said are the processes that a hook has told.
	said := func() (pids [2]int) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			text, _ := os.ReadFile(out)
			if n, _ := fmt.Sscan(string(text), &pids[0], &pids[1]); n == 2 && strings.HasSuffix(string(text), "\n") {
				_ = os.Remove(out)
				return pids
			}
			if time.Now().After(end) {
				t.Fatalf("the hook has said %q", text)
			}
		}
	}
	gone := func(what string) {
		t.Helper()
		for _, pid := range said() {
			for end := time.Now().Add(time.Minute); alive(pid); time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%s: process %d is left", what, pid)
				}
			}
		}
	}
	bg := context.Background()
	if err := run(bg, "says", time.Minute); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(out)
	lines, ignored, _ := strings.Cut(string(text), "\t")
	if want := "pre pre /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /\n"; err != nil || lines != want {
		t.Errorf("the hook has %q, want %q", lines, want)
	}
	// But for the signals that C libraries keep to themselves (32 to 34), which no shell and
	// no Go program can change: whoever started this test may ignore one.
	if set, err := strconv.ParseUint(strings.TrimSpace(ignored), 16, 64); err != nil || set&^(7<<31) != 0 {
		t.Errorf("the hook ignores the signals %q", ignored)
	}
	// A daemon with a mount namespace of its own runs it in that of process 1.
	ns := hookDir(t, map[string]string{"ns": "#!/bin/sh\nreadlink /proc/self/ns/mnt /proc/self/root >$OUT\n"})
	if namespace, err := os.Readlink("/proc/1/ns/mnt"); err == nil {
		hold, end, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		a := runHook("/proc/1/root", Hook{Path: filepath.Join(ns, "ns"), Env: []string{"OUT=" + out}, Limit: time.Minute}, hold)
		text, err := os.ReadFile(out)
		if want := namespace + "\n/\n"; a.Error != "" || err != nil || string(text) != want {
			t.Errorf("%+v, in %q, %v; want %q", a, text, err, want)
		}
		hold.Close()
		end.Close()
	}
	if err := run(bg, "fails", time.Minute); !errors.Is(err, ErrHookFailed) || !strings.Contains(err.Error(), "exit status 3: the database is down") {
		t.Errorf("%v", err)
	}
	_ = os.Remove(out)
	if err := run(bg, "hangs", time.Second); !errors.Is(err, ErrHookLate) {
		t.Errorf("%v", err)
	}
	gone("overdue")
	ctx, cancel := context.WithCancel(bg)
	time.AfterFunc(500*time.Millisecond, cancel)
	if err := run(ctx, "stays", time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	gone("cancelled")
	// What a hook leaves behind is its own business: a session with a database, say.
	if err := run(bg, "leaves", time.Minute); err != nil {
		t.Error(err)
	}
	left := said()
	if !alive(left[1]) {
		t.Error("what a hook has left running was killed")
	}
	_ = unix.Kill(left[1], unix.SIGKILL)

	// The hook of a daemon that dies: here the Prober cannot tell its end from a death.
	ended := make(chan error)
	go func() { ended <- run(bg, "hangs", time.Minute) }()
	pids := said()
	p.socket.Close()
	select {
	case <-p.ended:
		t.Error("the prober has left a hook behind")
	case <-time.After(200 * time.Millisecond):
	}
	_ = unix.Kill(-pids[0], unix.SIGKILL)
	<-ended
	<-p.ended
}

// TestOutputIsNotKept: however much a program prints, little of it is in memory, and of a hook
// the last line is told.
func TestOutputIsNotKept(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const print = "echo first; head -c 100000000 /dev/zero; echo; echo last; "
	dir := hookDir(t, map[string]string{"dumps": "#!/bin/sh\n" + print + "echo the database is down >&2\nexit 3\n"})
	hold, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	defer end.Close()
	var a answer
	var ran Ran
	for what, f := range map[string]func(){
		"a hook": func() { a = runHook("/", Hook{Path: filepath.Join(dir, "dumps"), Limit: time.Minute}, hold) },
		"a command": func() {
			ran, err = (&errands{root: "/"}).run(Command{Path: "/bin/sh", Args: []string{"sh", "-c", print + "{ " + print + "} >&2"}})
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 4<<20 {
			t.Errorf("%s that prints 100 MB took %d MiB of memory", what, took>>20)
		}
	}
	if a.Error != "exit status 3: the database is down" {
		t.Errorf("the hook: %.100q", a.Error)
	}
	for _, out := range []string{ran.Out, ran.Said} {
		if err != nil || ran.Status != 0 || len(out) != keptOutput || !strings.HasPrefix(out, "first\n") {
			t.Errorf("the command: %d, %v, %d bytes: %.10q", ran.Status, err, len(out), out)
		}
	}
}

func alive(pid int) bool {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(text), ") Z ")
}
