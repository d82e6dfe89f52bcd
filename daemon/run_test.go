package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestMain lets the test binary be a daemon, for the tests of starting one.
func TestMain(m *testing.M) {
	if how := os.Getenv("TEST_DAEMON"); how != "" {
		os.Exit(testDaemon(how, os.Args))
	}
	os.Exit(m.Run())
}

func testDaemon(how string, args []string) int {
	dir := RunDir(args[3])
	switch how {
	case "dies":
		return 3
	case "fails":
		ReportStart(3, &control.Error{Code: control.Unsupported, Message: "no ublk driver", Fix: "boot another kernel"})
		return 1
	case "crashes":
		Stderr()
		go panic("on purpose")
		select {}
	case "hangs":
		time.Sleep(5 * time.Second)
		return 1
	}
	fake := &fakeAPI{}
	err := run(Options{Dir: dir, Log: quiet(), Ready: func() { ReportStart(3, nil) }}, func() (stopper, error) { return fake, nil })
	if err != nil {
		ReportStart(3, err)
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// starter starts this test binary, as a daemon that behaves as how says.
func starter(t *testing.T, how string) Starter {
	t.Helper()
	dir := RunDir(t.TempDir())
	script := filepath.Join(t.TempDir(), "program")
	text := fmt.Sprintf("#!/bin/sh\nTEST_DAEMON=%s exec %s \"$@\"\n", how, os.Args[0])
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return Starter{Dir: dir, Program: script}
}

func rootOnly(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: starting a daemon is refused to others")
	}
}

// stopDaemon sends SIGTERM to the daemon of a run directory and waits for its
// end.
func stopDaemon(t *testing.T, dir RunDir) {
	t.Helper()
	if err := unix.Kill(daemonPID(t, dir), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for range 6000 {
		if f, err := dir.lock(); err == nil {
			f.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the daemon does not end")
}

func TestStart(t *testing.T) {
	rootOnly(t)
	s := starter(t, "well")
	starts := 0
	s.Starting = func(*control.Lost) { starts++ }
	ctx := context.Background()
	for range 2 {
		c, err := s.Start(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if i, err := c.Info(ctx); err != nil || i.PID != 7 {
			t.Fatalf("%+v, %v", i, err)
		}
		c.Close()
	}
	if starts != 1 {
		t.Errorf("started %d times", starts)
	}
	for path, mode := range map[string]os.FileMode{string(s.Dir): 0o700, s.Dir.Socket(): 0o600, s.Dir.Log(): 0o600} {
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want %v", path, st.Mode(), err, mode)
		}
	}
	// Nothing but what asks it to stop ends it.
	pid := daemonPID(t, s.Dir)
	for n := unix.Signal(1); n <= 64; n++ {
		switch n {
		case unix.SIGINT, unix.SIGTERM, unix.SIGKILL, unix.SIGSTOP, // end it, or are not for it to say
			unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSYS: // faults
			continue
		}
		if err := unix.Kill(pid, n); err != nil {
			t.Fatal(err)
		}
		c := control.NewClient(s.Dir.Socket())
		if _, err := c.Info(ctx); err != nil {
			t.Fatalf("after signal %d: %v", n, err)
		}
		c.Close()
	}
	stopDaemon(t, s.Dir)
	if _, err := os.Stat(s.Dir.Socket()); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestConnectStartsNothing: who only looks is told that no daemon runs, and what
// went with the last one.
func TestConnectStartsNothing(t *testing.T) {
	rootOnly(t)
	ctx := context.Background()
	s := Starter{Dir: RunDir(filepath.Join(t.TempDir(), "run")), Starting: func(*control.Lost) { t.Error("a daemon is started") }}
	says := func(words ...string) {
		t.Helper()
		_, err := s.Connect(ctx)
		if control.CodeOf(err) != control.Unavailable {
			t.Errorf("%v", err)
		}
		for _, w := range append(words, "no daemon runs on "+string(s.Dir), "start it with ") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v: want %q", err, w)
			}
		}
	}
	says()
	if _, err := os.Stat(string(s.Dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is made: %v", err)
	}
	if err := s.Dir.make(); err != nil {
		t.Fatal(err)
	}
	record := func(pid int, birth, more string) {
		t.Helper()
		text := fmt.Sprintf(`{"version":%d,"pid":%d,"birth":%q,"devices":[{"name":"data","original":"/dev/vdb","path":"/dev/ublkb3"}],`+
			`"snapshots":[{"id":"u","devices":["data"],"storage":["/var/tmp","/dev/vdd"]}]%s}`, recordVersion, pid, birth, more)
		if err := s.Dir.replace(recordName, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	record(os.Getpid(), "another boot", "")
	says(fmt.Sprintf("the daemon before (process %d) died, and with it the filter data over /dev/vdb (/dev/ublkb3), ", os.Getpid()),
		"the snapshot u of data with differences in /var/tmp /dev/vdd")
	// One that starts its daemon is told as well.
	var told *control.Lost
	start := starter(t, "well")
	if err := errors.Join(start.Dir.make(), os.Rename(s.Dir.path(recordName), start.Dir.path(recordName))); err != nil {
		t.Fatal(err)
	}
	start.Starting = func(l *control.Lost) { told = l }
	c, err := start.Start(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	stopDaemon(t, start.Dir)
	if told == nil || told.Devices[0].Name != "data" {
		t.Errorf("told %+v", told)
	}
	// What was lost earlier is not forgotten.
	record(os.Getpid(), "another boot", `,"before":{"pid":1,"devices":[{"name":"old","original":"/dev/vdc","path":"/dev/ublkb1","waits":true}]}`)
	says("the filter data over", "the server of the filter, whose I/O waits, old over /dev/vdc")

	// This process lives: nothing is lost.
	record(os.Getpid(), birthOf(os.Getpid()), "")
	if l := s.Dir.lost(); l != nil {
		t.Errorf("lost with a daemon that lives: %v", l)
	}
	for _, text := range []string{"", "{", `{"version":2}`} {
		if err := s.Dir.replace(recordName, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if l := s.Dir.lost(); l != nil {
			t.Errorf("record %q: %v", text, l)
		}
	}
}

// TestRecord: a daemon's record follows what it has, and what was lost before it
// until that is there again.
func TestRecord(t *testing.T) {
	dir := RunDir(filepath.Join(t.TempDir(), "run"))
	if err := dir.make(); err != nil {
		t.Fatal(err)
	}
	daemon := func() *Daemon {
		d := &Daemon{o: Options{Dir: dir, Log: quiet()}, change: make(chan struct{}, 1), devices: map[string]*device{}, snapshots: map[string]*snapshot{}}
		d.doing.Store(new(string))
		d.takeStock()
		return d
	}
	ctx := context.Background()
	change := func(d *Daemon, f func()) {
		t.Helper()
		end, err := d.begin(ctx, "change")
		if err != nil {
			t.Fatal(err)
		}
		f()
		end()
	}
	// die makes the record one of a daemon that is dead.
	die := func() {
		t.Helper()
		b, err := os.ReadFile(dir.path(recordName))
		if err != nil {
			t.Fatal(err)
		}
		if err := dir.replace(recordName, []byte(strings.ReplaceAll(string(b), birthOf(os.Getpid()), "long ago"))); err != nil {
			t.Fatal(err)
		}
	}
	a := &device{Device: control.Device{Name: "a", Original: "/dev/vda", Path: "/dev/ublkb0"}}
	b := &device{Device: control.Device{Name: "b", Original: "/dev/vdb", Path: "/dev/ublkb1", Recovery: true}}
	s := &snapshot{id: "02e091ec-dae8-41ba-9dae-4e66f1473dd6", images: []*image{{of: a}}, storage: []control.Storage{{Path: "/s"}}}
	first := daemon()
	change(first, func() { first.devices["a"], first.devices["b"], first.snapshots[s.id] = a, b, s })
	if l := dir.lost(); l != nil {
		t.Errorf("lost with a daemon that lives: %v", l)
	}
	// Destroyed, but for its storage, which is on its way back.
	gone := &snapshot{id: "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8", ending: true}
	change(first, func() { first.snapshots[gone.id] = gone })
	die()
	second := daemon()
	for _, ref := range []string{"a", "/dev/vda", "/dev/ublkb0", "/dev/ublk-blksnap/a"} {
		e := second.explainDevice(&control.Error{Code: control.NotFound, Message: "no filter"}, ref)
		if !strings.Contains(e.Message, "which died") || e.Fix != "add it again: ublk-blksnap add /dev/vda --name a" {
			t.Errorf("%s: %v", ref, e)
		}
	}
	if _, err := second.findSnapshot(gone.id); control.CodeOf(err) != control.NotFound || strings.Contains(err.Error(), "died") {
		t.Errorf("a snapshot that was destroyed: %v", err)
	}
	if _, err := second.findSnapshot(s.id); control.CodeOf(err) != control.NotFound || !strings.Contains(err.Error(), "which died") {
		t.Errorf("%v", err)
	}
	change(second, func() { second.devices["a"] = a })
	die()
	third := daemon()
	i, err := third.Info(ctx)
	if err != nil || i.Lost == nil || len(i.Lost.Devices) != 2 || len(i.Lost.Snapshots) != 1 || i.Lost.Devices[1] != (control.LostDevice{Name: "b", Original: "/dev/vdb", Path: "/dev/ublkb1", Waits: true}) {
		t.Fatalf("%+v, %v", i.Lost, err)
	}
	change(third, func() { third.devices["a"], third.devices["other"] = a, b })
	if i, _ := third.Info(ctx); i.Lost != nil {
		t.Errorf("all is there again, and yet lost: %+v", i.Lost)
	}
	third.devices = nil
	if err := third.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir.path(recordName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record outlives a daemon that ended well: %v", err)
	}
}

func TestStartTogether(t *testing.T) {
	rootOnly(t)
	s := starter(t, "well")
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() {
			c, err := s.Start(context.Background())
			if err == nil {
				_, err = c.Info(context.Background())
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	stopDaemon(t, s.Dir)
}

func TestStartTellsWhyNot(t *testing.T) {
	rootOnly(t)
	if _, err := starter(t, "fails").Start(context.Background()); control.CodeOf(err) != control.Unsupported || err.Error() != "no ublk driver: boot another kernel" {
		t.Errorf("fails: %v", err)
	}
	s := starter(t, "dies")
	if _, err := s.Start(context.Background()); control.CodeOf(err) != control.Unavailable || !strings.Contains(err.Error(), s.Dir.Log()) {
		t.Errorf("dies: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := starter(t, "hangs").Start(ctx); control.CodeOf(err) != control.Timeout {
		t.Errorf("hangs: %v", err)
	}
}

// runFake runs a daemon over a fake in this process.
func runFake(t *testing.T, dir RunDir, fake *fakeAPI) (ended chan error) {
	t.Helper()
	ready := make(chan struct{})
	ended = make(chan error, 1)
	go func() {
		ended <- run(Options{Dir: dir, Log: quiet(), Ready: func() { close(ready) }}, func() (stopper, error) { return fake, nil })
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
	err := run(Options{Dir: dir, Log: quiet()}, func() (stopper, error) { opened = true; return fake, nil })
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
	if err := os.WriteFile(dir.lockFile(), []byte("123456\n"), 0o600); err != nil {
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
	err := run(Options{Dir: dir, Log: quiet()}, func() (stopper, error) { return nil, unix.ENODEV })
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
	d := &Daemon{change: make(chan struct{}, 1)}
	if err := d.Stop(context.Background()); err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.begin(late, "add"); control.CodeOf(err) != control.Timeout {
		t.Errorf("%v", err)
	}
}

// TestTurns: changes go one at a time; who stops waiting for a turn gets none.
func TestTurns(t *testing.T) {
	d := &Daemon{change: make(chan struct{}, 1)}
	ctx := context.Background()
	end, err := d.begin(ctx, "first")
	if err != nil || *d.doing.Load() != "first" {
		t.Fatal(err)
	}
	gone, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := d.begin(gone, "second %d", 2); control.CodeOf(err) != control.Timeout || err.Error() != "second 2: took too long" {
		t.Errorf("%v", err)
	}
	if *d.doing.Load() != "first" {
		t.Errorf("doing %s", *d.doing.Load())
	}
	end()
	// A free turn is not for one that has gone away either.
	for range 20 {
		if _, err := d.begin(gone, "second"); control.CodeOf(err) != control.Timeout {
			t.Fatalf("%v", err)
		}
	}
	end, err = d.begin(ctx, "third")
	if err != nil {
		t.Fatal(err)
	}
	end()
	if *d.doing.Load() != "" {
		t.Errorf("doing %s", *d.doing.Load())
	}
}

// TestNoSnapshotOfALeavingDevice: a device whose removal did not come to its end
// has no queues that could make a cut.
func TestNoSnapshotOfALeavingDevice(t *testing.T) {
	d := &Daemon{}
	err := d.addTo(&snapshot{}, &device{Device: control.Device{Name: "data"}, leaving: true})
	if control.CodeOf(err) != control.Busy {
		t.Errorf("added to a snapshot: %v", err)
	}
}

func daemonPID(t *testing.T, dir RunDir) (pid int) {
	t.Helper()
	b, err := os.ReadFile(dir.lockFile())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}
