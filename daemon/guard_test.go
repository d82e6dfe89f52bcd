package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// guarded starts a daemon with a guard, which has something to lose. It is started by
// a script.
func guarded(t *testing.T) Starter {
	t.Helper()
	rootOnly(t)
	dir := RunDir(t.TempDir())
	if err := dir.make(); err != nil {
		t.Fatal(err)
	}
	program := dir.path("program")
	text := fmt.Sprintf("#!/bin/sh\nTEST_DAEMON=guarded exec %s \"$@\"\n", os.Args[0])
	if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return guardedBy(t, dir, program)
}

// guardedBy is guarded with that program in place of the script.
func guardedBy(t *testing.T, dir RunDir, program string) Starter {
	t.Helper()
	rootOnly(t)
	if err := dir.make(); err != nil {
		t.Fatal(err)
	}
	if err := dir.subdir(stateName, 0o700); err != nil {
		t.Fatal(err)
	}
	leaveRecord(t, dir)
	s := Starter{Dir: dir, Program: program}
	if _, err := s.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Whatever the test came to, nothing of it may stay.
		_ = os.Remove(dir.path(startName))
		for unseen := 0; unseen < 10; time.Sleep(5 * time.Millisecond) { // one in the middle of an exec is not seen
			unseen++
			for _, pid := range processesOf(dir) {
				_ = unix.Kill(pid, unix.SIGKILL)
				unseen = 0
			}
		}
	})
	return s
}

// leaveRecord makes something that the next daemon has to serve.
func leaveRecord(t *testing.T, dir RunDir) {
	t.Helper()
	record := filepath.Join(dir.State(), devicesName, "vdb.json")
	if err := os.MkdirAll(filepath.Dir(record), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// processesOf are the processes that have the directory among their arguments, dead
// ones that nobody has waited for excepted. names chooses those with that comm.
func processesOf(dir RunDir, names ...string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range all {
		b, _ := os.ReadFile(file)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "comm"))
		if bytes.Contains(b, []byte(dir)) && (len(names) == 0 || string(comm) == names[0]+"\n") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func oneGuard(t *testing.T, dir RunDir) (pid int) {
	t.Helper()
	eventually(t, "one guard", func() bool {
		all := processesOf(dir, "ublk-guard")
		if len(all) == 1 {
			pid = all[0]
		}
		return len(all) == 1
	})
	return pid
}

// next waits for the daemon after that of a process.
func next(t *testing.T, s Starter, pid int) int {
	t.Helper()
	now := 0
	eventually(t, "the next daemon", func() bool {
		b, _ := os.ReadFile(s.Dir.path(lockName))
		if _, err := fmt.Sscan(string(b), &now); err != nil || now == pid {
			return false
		}
		c, err := s.Connect(context.Background())
		if c != nil {
			c.Close()
		}
		return err == nil
	})
	return now
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// TestGuard: a daemon that dies is followed by another, again and again, whichever of
// the processes died with it before; one that ends leaves nobody.
func TestGuard(t *testing.T) {
	s := guarded(t)
	pid := daemonPID(t, s.Dir)
	first := oneGuard(t, s.Dir)
	for range 3 {
		kill(t, pid)
		pid = next(t, s, pid)
	}
	if again := oneGuard(t, s.Dir); again != first {
		t.Errorf("the guard is process %d, was %d", again, first)
	}
	if sid, err := unix.Getsid(first); err != nil || sid != first {
		t.Errorf("the guard is in the session of %d, %v", sid, err)
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", first))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(files, fmt.Sprintf("/proc/%d/cwd", first)) {
		to, err := os.Readlink(f)
		if err == nil && to != "/" && to != os.DevNull && !strings.HasPrefix(to, string(s.Dir)) && !strings.HasPrefix(to, "anon_inode:") && !strings.HasPrefix(to, "pipe:") {
			t.Errorf("the guard has %s open", to)
		}
	}
	// A guard that dies is followed by another; a signal to stop it is none.
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1, unix.SIGPIPE} {
		if err := unix.Kill(first, sig); err != nil {
			t.Fatal(err)
		}
	}
	if again := oneGuard(t, s.Dir); again != first {
		t.Errorf("signals have ended the guard")
	}
	kill(t, first)
	var second int
	eventually(t, "another guard", func() bool {
		second = oneGuard(t, s.Dir)
		return second != first
	})
	kill(t, pid)
	next(t, s, pid)

	stopDaemon(t, s.Dir)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
	if _, err := os.Stat(s.Dir.path(startName)); !os.IsNotExist(err) {
		t.Errorf("the record of how to start is left: %v", err)
	}
}

// TestGuardPersists: the next daemon is started as soon as it can be, if need be by
// the program of the guard.
func TestGuardPersists(t *testing.T) {
	s := guarded(t)
	oneGuard(t, s.Dir)
	pid := daemonPID(t, s.Dir)
	fails := s.Dir.path("fails")
	if err := os.WriteFile(fails, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	kill(t, pid)
	eventually(t, "the reason in the log", func() bool {
		b, _ := os.ReadFile(s.Dir.Log())
		return bytes.Contains(b, []byte("not yet"))
	})
	if err := os.Remove(fails); err != nil {
		t.Fatal(err)
	}
	pid = next(t, s, pid)
	if err := os.WriteFile(s.Program+".new", []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.Program+".new", s.Program); err != nil {
		t.Fatal(err)
	}
	kill(t, pid)
	next(t, s, pid)
	stopDaemon(t, s.Dir)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
}

// TestGuardEnds: when nothing waits, nobody follows a daemon that dies.
func TestGuardEnds(t *testing.T) {
	s := guarded(t)
	oneGuard(t, s.Dir)
	if err := os.RemoveAll(filepath.Join(s.Dir.State(), devicesName)); err != nil {
		t.Fatal(err)
	}
	kill(t, daemonPID(t, s.Dir))
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
	// Nor does a command start one, unless something waits, and nobody else starts it.
	started := func() bool {
		t.Helper()
		c, err := s.Connect(context.Background())
		c.Close()
		if err != nil && control.CodeOf(err) != control.Unavailable {
			t.Error(err)
		}
		return err == nil
	}
	if started() {
		t.Error("a daemon for nothing")
	}
	leaveRecord(t, s.Dir)
	r, err := s.Dir.startRecord()
	if err != nil {
		t.Fatal(err)
	}
	r.By = byOther
	if err := statefile.Write(s.Dir.path(startName), startKind, startVersion, r); err != nil {
		t.Fatal(err)
	}
	if started() {
		t.Error("a daemon in place of one that somebody else starts")
	}
	r.By = bySystemd
	if err := statefile.Write(s.Dir.path(startName), startKind, startVersion, r); err != nil {
		t.Fatal(err)
	}
	if !started() {
		t.Error("no daemon for what waits")
	}
	stopDaemon(t, s.Dir)
	if started() {
		t.Error("a daemon after the last has stopped")
	}
}

// TestGuardOfOlderProgram: a guard outlives the upgrade of its daemon. What waits for
// the next one then it does not know, but starts it.
func TestGuardOfOlderProgram(t *testing.T) {
	s := guarded(t)
	oneGuard(t, s.Dir)
	if err := os.RemoveAll(filepath.Join(s.Dir.State(), devicesName)); err != nil {
		t.Fatal(err)
	}
	if s.Dir.survivors() {
		t.Error("something is left, and is not there")
	}
	format := filepath.Join(s.Dir.State(), formatName)
	if err := statefile.Write(format, formatKind, stateFormat+1, nil); err != nil {
		t.Fatal(err)
	}
	kill(t, daemonPID(t, s.Dir))
	eventually(t, "an attempt to start the next daemon", func() bool {
		b, _ := os.ReadFile(s.Dir.Log())
		return bytes.Contains(b, []byte("newer version"))
	})
	if err := os.Remove(format); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next daemon", func() bool {
		c, err := s.Ask(context.Background())
		c.Close()
		return err == nil
	})
	stopDaemon(t, s.Dir)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
}

// TestGuardKilledWithDaemon: the prober, which lives a moment longer, starts another
// guard.
func TestGuardKilledWithDaemon(t *testing.T) {
	s := guarded(t)
	guard, pid := oneGuard(t, s.Dir), daemonPID(t, s.Dir)
	for _, pid := range []int{pid, guard} {
		_ = unix.Kill(pid, unix.SIGSTOP) // so that neither does anything about the other
	}
	kill(t, guard)
	kill(t, pid)
	eventually(t, "the next daemon", func() bool {
		b, _ := os.ReadFile(s.Dir.path(lockName))
		now := 0
		_, err := fmt.Sscan(string(b), &now)
		return err == nil && now != pid
	})
	oneGuard(t, s.Dir)
	stopDaemon(t, s.Dir)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
}

// TestAllKilled: with the guard gone as well, the next command that needs the daemon
// starts it, whatever the command.
func TestAllKilled(t *testing.T) {
	s := guarded(t)
	oneGuard(t, s.Dir)
	all := append(processesOf(s.Dir), childrenOf(t, daemonPID(t, s.Dir))...) // the prober would start a guard
	for _, pid := range all {                                                // a guard has no time to be started in between
		_ = unix.Kill(pid, unix.SIGSTOP)
	}
	for _, pid := range all {
		kill(t, pid)
	}
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
	// A stop does not.
	if _, err := s.Ask(context.Background()); control.CodeOf(err) != control.Unavailable || len(processesOf(s.Dir)) > 0 {
		t.Errorf("asked to stop a daemon that is dead: %v, and there are %v", err, processesOf(s.Dir))
	}
	c, err := s.Connect(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	oneGuard(t, s.Dir)
	stopDaemon(t, s.Dir)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
}
