package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestEndWithMachine: at the end of the machine the daemon tries until nothing is in use,
// and systemd-shutdown spares it meanwhile. A stop that is refused does not end it.
func TestEndWithMachine(t *testing.T) {
	first := arguments(t)
	t.Cleanup(func() { // for the processes that later tests look for
		if err := setFirstArgument(first[0]); err != nil {
			t.Error(err)
		}
	})
	dir := RunDir(t.TempDir())
	// Without systemd the signal means nothing.
	fake := &fakeAPI{stops: make(chan error), ends: make(chan error)}
	ended := runFake(t, dir, fake)
	unix.Kill(os.Getpid(), unix.SIGPWR)
	unix.Kill(os.Getpid(), unix.SIGTERM) // answered later
	select {
	case fake.ends <- nil:
		t.Error("the end of the machine, and nobody said so")
	case fake.stops <- nil:
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	systemd(t)
	fake = &fakeAPI{stops: make(chan error), ends: make(chan error)}
	ended = runFake(t, dir, fake)
	unix.Kill(os.Getpid(), unix.SIGTERM)
	fake.stops <- errors.New("held by snapshot 7")
	unix.Kill(os.Getpid(), unix.SIGPWR)
	for range 3 {
		fake.ends <- errors.New("vdb: used as swap space")
		if _, err := control.NewClient(dir.Socket()).Info(context.Background()); err != nil {
			t.Fatalf("no longer served: %v", err)
		}
		unix.Kill(os.Getpid(), unix.SIGPWR) // systemd repeats it
	}
	if now := arguments(t); !bytes.Equal(now, append([]byte("@"), first[1:]...)) {
		t.Errorf("systemd-shutdown would kill %q", now)
	}
	fake.ends <- nil
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if fake.closings != 1 {
		t.Errorf("closed %d times", fake.closings)
	}
}

// TestReloadAtTheEnd: if another program takes over at that time, it knows that the machine
// ends.
func TestReloadAtTheEnd(t *testing.T) {
	rootOnly(t)
	systemd(t)
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "program")
	script := fmt.Sprintf("#!/bin/sh\nNOTIFY_SOCKET=%s exec %s \"$@\"\n", os.Getenv("NOTIFY_SOCKET"), own)
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	s := guardedBy(t, RunDir(t.TempDir()), program)
	pid := daemonPID(t, s.Dir)
	spared := func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return bytes.HasPrefix(b, []byte("@"))
	}
	if spared() {
		t.Fatal("before the end")
	}
	unix.Kill(pid, unix.SIGPWR)
	eventually(t, "the end of the machine", spared)
	c := control.NewClient(s.Dir.Socket())
	defer c.Close()
	// The fake never comes to its end, as one that waits for its turn, which the reload has.
	if done, err := c.Reload(context.Background(), control.ReloadRequest{Program: own}); err != nil || done.Program != own {
		t.Fatalf("%+v, %v", done, err)
	}
	eventually(t, "the end of the machine, in the program that has taken over", spared)
	if now := daemonPID(t, s.Dir); now != pid {
		t.Errorf("the daemon is process %d, was %d", now, pid)
	}
}

// TestSignalCame: it knows too if nobody has heard the signal yet.
func TestSignalCame(t *testing.T) {
	signals := make(chan os.Signal, 4)
	for _, all := range [][]os.Signal{nil, {unix.SIGTERM}, {unix.SIGPWR}, {unix.SIGTERM, unix.SIGPWR, unix.SIGTERM}} {
		for _, s := range all {
			signals <- s
		}
		if got, want := came(unix.SIGPWR, signals), slices.Contains(all, os.Signal(unix.SIGPWR)); got != want || len(signals) != 0 {
			t.Errorf("%v: %v, and %d are left", all, got, len(signals))
		}
	}
}

func arguments(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cmdline")
	if err != nil || len(b) == 0 {
		t.Fatalf("%q, %v", b, err)
	}
	return b
}

// TestNothingNewAtTheEnd: what would add something is refused, what takes away is not.
func TestNothingNewAtTheEnd(t *testing.T) {
	d := &Daemon{opLock: make(chan struct{}, 1)}
	d.activity.Store(new(string))
	d.ending.begun.Store(true)
	for range 2 { // the lock is free again
		if _, err := d.AddDevice(context.Background(), control.AddRequest{}); control.CodeOf(err) != control.Busy {
			t.Errorf("add: %v", err)
		}
		if _, err := d.CreateSnapshot(context.Background(), control.CreateRequest{}); control.CodeOf(err) != control.Busy {
			t.Errorf("create: %v", err)
		}
		if _, err := d.Reload(context.Background(), control.ReloadRequest{}); control.CodeOf(err) != control.Busy {
			t.Errorf("reload: %v", err)
		}
	}
	if err := d.EndWithMachine(context.Background()); err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.begin(late, "add"); control.CodeOf(err) != control.Timeout {
		t.Errorf("after the end: %v", err)
	}
}
