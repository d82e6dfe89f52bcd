package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// TestMain lets the test binary be a daemon, a prober and a guard, for the tests of
// starting one.
func TestMain(m *testing.M) {
	how, verb := os.Getenv("TEST_DAEMON"), ""
	if len(os.Args) > 1 {
		verb = os.Args[1]
	}
	switch {
	case how != "":
		os.Exit(testDaemon(how, os.Args))
	case verb == "daemon":
		os.Exit(testDaemon("guarded", os.Args))
	case verb == ProbeCommand:
		_ = disk.ServeProbes(3, "/")
		os.Exit(0)
	case verb == GuardCommand:
		err := EnterGuard(os.Args[4])
		if err == nil {
			err = Guard(RunDir(os.Args[3]), slog.LevelInfo)
		}
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runFake runs a daemon over a fake in this process.
func runFake(t *testing.T, dir RunDir, fake *fakeAPI) (ended chan error) {
	t.Helper()
	ready := make(chan struct{})
	ended = make(chan error, 1)
	go func() {
		ended <- run(Options{Dir: dir, Log: quiet(), Ready: func() { close(ready) }}, func(Options) (stopper, error) { return fake, nil })
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	return ended
}

func TestSecondDaemon(t *testing.T) {
	dir := RunDir(t.TempDir())
	fake := &fakeAPI{}
	ended := runFake(t, dir, fake)
	opened := false
	err := run(Options{Dir: dir, Log: quiet()}, func(Options) (stopper, error) { opened = true; return fake, nil })
	want := fmt.Sprintf("start the daemon: another daemon (process %d) runs on %s", os.Getpid(), dir)
	if control.CodeOf(err) != control.Exists || err.Error() != want {
		t.Errorf("second daemon: %v, want %s", err, want)
	}
	if opened {
		t.Error("the second daemon opened the driver")
	}
	if _, err := control.NewClient(dir.Socket()).Info(context.Background()); err != nil {
		t.Errorf("the first one is disturbed: %v", err)
	}
	unix.Kill(os.Getpid(), unix.SIGTERM)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := RunDir(t.TempDir())
	if err := os.WriteFile(dir.Socket(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.path(lockName), []byte("123456\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ended := runFake(t, dir, &fakeAPI{})
	if _, err := control.NewClient(dir.Socket()).Info(context.Background()); err != nil {
		t.Error(err)
	}
	unix.Kill(os.Getpid(), unix.SIGTERM)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestSIGTERM: a daemon with devices in use goes on serving, and ends when asked
// again after that.
func TestSIGTERM(t *testing.T) {
	dir := RunDir(t.TempDir())
	fake := &fakeAPI{stops: make(chan error)}
	ended := runFake(t, dir, fake)
	unix.Kill(os.Getpid(), unix.SIGTERM)
	fake.stops <- errors.New("vdb: mounted on /mnt")
	if _, err := control.NewClient(dir.Socket()).Info(context.Background()); err != nil {
		t.Fatalf("no longer served: %v", err)
	}
	select {
	case err := <-ended:
		t.Fatalf("ended: %v", err)
	default:
	}
	unix.Kill(os.Getpid(), unix.SIGINT)
	fake.stops <- nil
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if fake.closings != 1 {
		t.Errorf("closed %d times", fake.closings)
	}
}

// TestStop: the same by a client, which gets the reason or the daemon's end.
func TestStop(t *testing.T) {
	dir := RunDir(t.TempDir())
	fake := &fakeAPI{stops: make(chan error, 2)}
	ended := runFake(t, dir, fake)
	ctx := context.Background()
	c := control.NewClient(dir.Socket())
	fake.stops <- &control.Error{Code: control.Busy, Message: "vdb: mounted on /mnt"}
	raw := rawClient(t, dir.Socket())
	if err := post(t, raw, "stop", strings.NewReader("{}")); control.CodeOf(err) != control.Busy || err.Error() != "vdb: mounted on /mnt" {
		t.Errorf("%v", err)
	}
	if _, err := c.Info(ctx); err != nil {
		t.Fatalf("no longer served: %v", err)
	}
	fake.stops <- nil
	if err := post(t, raw, "stop", strings.NewReader("{}")); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if fake.closings != 1 {
		t.Errorf("closed %d times", fake.closings)
	}
	if _, err := c.Info(ctx); control.CodeOf(err) != control.Unavailable {
		t.Errorf("after the end: %v", err)
	}
}

func TestStartErrorFreesTheLock(t *testing.T) {
	dir := RunDir(t.TempDir())
	err := run(Options{Dir: dir, Log: quiet()}, func(Options) (stopper, error) { return nil, unix.ENODEV })
	if !errors.Is(err, unix.ENODEV) {
		t.Fatal(err)
	}
	f, err := dir.lock()
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// TestNothingAfterStop: what waited for its turn while the daemon removed all
// gets none.
func TestNothingAfterStop(t *testing.T) {
	d := &Daemon{opLock: make(chan struct{}, 1)}
	if err := d.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.begin(late, "add"); control.CodeOf(err) != control.Timeout {
		t.Errorf("%v", err)
	}
}
