package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// TestReload: a program takes over in the same process, again and again. Who calls
// meanwhile waits, nobody else can have the lock, and the guard stays.
func TestReload(t *testing.T) {
	rootOnly(t)
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := guardedBy(t, RunDir(t.TempDir()), own)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	pid, guard := daemonPID(t, s.Dir), oneGuard(t, s.Dir)

	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(3)
	untilStop := func(f func() (ok bool)) {
		defer wg.Done()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if !f() {
				return
			}
		}
	}
	go untilStop(func() bool {
		f, err := s.Dir.lock()
		if err == nil {
			f.Close()
			t.Error("the lock was free")
		}
		return err != nil
	})
	for _, socket := range []string{s.Dir.Socket(), s.Dir.ReadSocket()} {
		go untilStop(func() bool {
			c := control.NewClient(socket)
			defer c.Close()
			// A call that is under way may be broken off; none is refused.
			if _, err := c.Info(ctx); err != nil && (strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "no daemon runs")) {
				t.Errorf("a call during the reload: %v", err)
				return false
			}
			return true
		})
	}
	c := control.NewClient(s.Dir.Socket())
	defer c.Close()
	watched := watchBoth(t, s.Dir)
	var last time.Time
	for range 3 {
		done, err := c.Reload(ctx, control.ReloadRequest{Program: own})
		if err != nil {
			t.Fatal(err)
		}
		if done.Program != own || done.From != "9" || done.To != control.Version || !done.At.After(last) || done.Pause <= 0 || done.Pause > time.Minute || done.Images < done.Pause || done.Quiesced != 2 {
			t.Errorf("reloaded: %+v", done)
		}
		last = done.At
	}
	// If it dies before they ask again, they still know that it was not stopped.
	watched(control.Unavailable)
	// A program that cannot be exec'd after all leaves this one.
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{bad, bad + ".none"} {
		if _, err := c.Reload(ctx, control.ReloadRequest{Program: program}); control.CodeOf(err) != control.Internal || !strings.Contains(err.Error(), "exec "+program) {
			t.Errorf("reload by %s: %v", program, err)
		}
	}
	if i, err := c.Info(ctx); err != nil || i.Reloaded == nil || i.Reloaded.Error == "" || i.Reloaded.Program != own {
		t.Errorf("%+v, %v", i.Reloaded, err)
	}
	close(stop)
	wg.Wait()
	if now := daemonPID(t, s.Dir); now != pid {
		t.Errorf("the daemon is process %d, was %d", now, pid)
	}
	if now := oneGuard(t, s.Dir); now != guard {
		t.Errorf("the guard is process %d, was %d", now, guard)
	}
	// Without a prober nobody can ask another program; this one begins anew, to have one.
	i, err := c.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, prober := range childrenOf(t, pid) {
		kill(t, prober)
	}
	eventually(t, "a reload for want of a prober", func() bool {
		now, err := c.Info(ctx)
		return err == nil && now.Reloaded != nil && now.Reloaded.At.After(i.Reloaded.At)
	})
	if len(childrenOf(t, pid)) != 1 || daemonPID(t, s.Dir) != pid {
		t.Errorf("process %d has the children %v", pid, childrenOf(t, pid))
	}
	// It is guarded as before.
	kill(t, pid)
	next(t, s, pid)
	watched = watchBoth(t, s.Dir)
	stopDaemon(t, s.Dir)
	watched(control.Interrupted)
	eventually(t, "the end of all processes", func() bool { return len(processesOf(s.Dir)) == 0 })
}

// watchBoth watches at both sockets, without a client that would go on. It returns when both
// have had an event. ended says whether the watches end with that code.
func watchBoth(t *testing.T, dir RunDir) (ended func(control.Code)) {
	t.Helper()
	answers := map[string]*json.Decoder{}
	for _, socket := range []string{dir.Socket(), dir.ReadSocket()} {
		resp, err := rawClient(t, socket).Post("http://d/v1/snapshot/watch", "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		answers[socket] = json.NewDecoder(resp.Body)
		var first control.EventLine
		if err := answers[socket].Decode(&first); err != nil || first.Event == nil {
			t.Fatalf("watch at %s: %+v, %v", socket, first, err)
		}
	}
	return func(want control.Code) {
		t.Helper()
		for socket, answer := range answers {
			var last control.EventLine
			if err := answer.Decode(&last); err != nil || last.Error == nil || last.Error.Code != want {
				t.Errorf("a watch at %s ends with %+v, %v, want %s", socket, last, err, want)
			}
		}
	}
}

// childrenOf are the processes that the process has made, and that live.
func childrenOf(t *testing.T, pid int) (pids []int) {
	t.Helper()
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		for _, child := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(child)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return pids
}

// TestCheckProgram: what cannot take over is refused before anything has changed.
func TestCheckProgram(t *testing.T) {
	p, err := disk.StartProber("ublk-blksnap", ProbeCommand, "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	dir := RunDir(t.TempDir())
	args := []string{"daemon", "--run-dir", string(dir)}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkProgram(context.Background(), p, own, args); err != nil {
		t.Error(err)
	}
	script := func(text string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for program, why := range map[string]string{
		filepath.Join(t.TempDir(), "none"):                               "no such file",
		script("no program"):                                             "exec format error",
		script("#!/bin/sh\necho >&2 'ublk-blksnap: bad'; exit 2\n"):      "cannot take over: bad",
		script("#!/bin/sh\necho '{\"version\":\"0.0.1\",\"format\":1}'"): "knows state of format 1",
		script("#!/bin/sh\necho hello"):                                  "it says \"hello\"",
		script("#!/bin/sh\necho '{}'"):                                   "it says \"{}\"",
	} {
		if err := checkProgram(context.Background(), p, program, args); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
	}
	d := &Daemon{opLock: make(chan struct{}, 1), host: disk.Machine(), opts: Options{Dir: dir, Prober: p, Program: script("no program"), Args: args}}
	d.activity.Store(new(string))
	for _, program := range []string{"", "relative"} {
		if _, err := d.Reload(context.Background(), control.ReloadRequest{Program: program}); err == nil {
			t.Errorf("reload by %q is begun", program)
		}
	}
	// What was refused holds nobody up.
	select {
	case d.opLock <- struct{}{}:
		<-d.opLock
	default:
		t.Error("the daemon does no change any more")
	}
	p.Close()
	var e *control.Error
	if err := checkProgram(context.Background(), p, own, args); err == nil || errors.As(err, &e) {
		t.Errorf("without a prober: %v", err)
	}
	if _, err := d.Reload(context.Background(), control.ReloadRequest{Program: own}); control.CodeOf(err) != control.Unavailable {
		t.Errorf("a program that nobody has asked: %v", err)
	}
}

// TestRenewProber: it is tried until there is a prober.
func TestRenewProber(t *testing.T) {
	ended, tries := make(chan struct{}), 0
	close(ended)
	renewProber(context.Background(), quiet(), ended, time.Millisecond, func() error {
		if tries++; tries < 3 {
			return errors.New("a storage does not answer")
		}
		return nil
	})
	if tries != 3 {
		t.Errorf("%d tries", tries)
	}
}
