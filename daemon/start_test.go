package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// TestStartUnit has a systemctl that writes down what it is asked, in place of
// the machine's.
func TestStartUnit(t *testing.T) {
	dir := t.TempDir()
	asked := filepath.Join(dir, "asked")
	script := "#!/bin/sh\necho \"$@\" >>" + asked + "\n[ \"$1\" = cat ] && exit ${CAT:-0}\necho cannot; exit ${START:-0}\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	defer func(old string) { systemdRuns = old }(systemdRuns)

	for _, c := range []struct {
		name       string
		runs       string
		s          Starter
		cat, start string
		started    bool
		err        string
		asked      string
	}{
		{"service", dir, Starter{Dir: DefaultRunDir}, "0", "0", true, "", "cat ublk-blksnap.service\nstart ublk-blksnap.service\n"},
		{"fails", dir, Starter{Dir: DefaultRunDir}, "0", "1", true, "cannot", "cat ublk-blksnap.service\nstart ublk-blksnap.service\n"},
		{"not installed", dir, Starter{Dir: DefaultRunDir}, "1", "0", false, "", "cat ublk-blksnap.service\n"},
		{"no systemd", dir + "/none", Starter{Dir: DefaultRunDir}, "0", "0", false, "", ""},
		{"another run directory", dir, Starter{Dir: RunDir(dir)}, "0", "0", false, "", ""},
		{"another configuration", dir, Starter{Dir: DefaultRunDir, ConfigPath: "/x"}, "0", "0", false, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			systemdRuns = c.runs
			t.Setenv("CAT", c.cat)
			t.Setenv("START", c.start)
			_ = os.Remove(asked)
			started, err := c.s.startUnit(context.Background())
			if started != c.started || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("started %v, %v; want %v, %q", started, err, c.started, c.err)
			}
			if b, _ := os.ReadFile(asked); string(b) != c.asked {
				t.Errorf("systemctl was asked %q, want %q", b, c.asked)
			}
		})
	}
}

// watchedAPI has events, the first of them at its start.
type watchedAPI struct {
	fakeAPI
	log *eventLog
}

func (w *watchedAPI) Watch(ctx context.Context, r control.WatchRequest, each func(control.Event) error) error {
	return w.log.watch(ctx, r, each)
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
	o := Options{Dir: dir, Log: quiet(), Ready: func() {
		if os.Getenv(reloadEnv) == "" && slices.Contains(args, "--report-fd") {
			ReportStart(3, nil)
		}
	}}
	if how == "guarded" {
		if _, err := os.Stat(filepath.Join(string(dir), "fails")); err == nil {
			ReportStart(3, errors.New("not yet"))
			return 1
		}
		o.Config = Config{Guard: true, DiskTimeout: time.Minute, Group: "0"}
		if args[len(args)-1] == "--"+CheckTakeoverFlag {
			t, err := CheckTakeover(dir)
			if err != nil {
				fmt.Fprintln(os.Stderr, "ublk-blksnap:", err)
				return 1
			}
			_ = json.NewEncoder(os.Stdout).Encode(t)
			return 0
		}
		var err error
		o.Args = []string{"daemon", "--run-dir", string(dir)}
		if o.Program = Program(); o.Program == "" { // for Reexec would have set it
			o.Program, err = os.Executable()
		}
		if script := dir.path("program"); err == nil {
			if _, missing := os.Stat(script); missing == nil {
				o.Program = script
			}
		}
		if err != nil {
			ReportStart(3, err)
			return 1
		}
		if o.Prober, err = disk.StartProber("ublk-blksnap", ProbeCommand, "/"); err != nil {
			ReportStart(3, err)
			return 1
		}
		defer o.Prober.Close()
		defer o.awaitGuard()
	}
	fake := &watchedAPI{log: newEventLog()}
	fake.log.notice(control.Event{Kind: control.EventTaken})
	fake.log.answer()
	err := run(o, func(Options) (stopper, error) { return fake, nil })
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
	if err := errors.Join(s.Dir.make(), s.Dir.subdir(stateName, 0o700)); err != nil {
		t.Fatal(err)
	}
	record := func(pid int, birth, more string) {
		t.Helper()
		text := fmt.Sprintf(`{"pid":%d,"birth":%q,"devices":[{"name":"data","original":"/dev/vdb","path":"/dev/ublkb3"}],`+
			`"snapshots":[{"id":"u","name":"nightly","devices":["data"],"storage":["/var/tmp","/dev/vdd"]}]%s}`, pid, birth, more)
		if err := statefile.Write(s.Dir.path(recordName), recordKind, recordFormat, json.RawMessage(text)); err != nil {
			t.Fatal(err)
		}
	}
	record(os.Getpid(), "another boot", "")
	says(fmt.Sprintf("the daemon before (process %d) died, and for the next one wait the filter data over /dev/vdb (/dev/ublkb3), ", os.Getpid()),
		"the snapshot u (nightly) of data with differences in /var/tmp /dev/vdd")
	// One that starts its daemon is told as well.
	var told *control.Lost
	start := starter(t, "well")
	if err := errors.Join(start.Dir.make(), start.Dir.subdir(stateName, 0o700), os.Rename(s.Dir.path(recordName), start.Dir.path(recordName))); err != nil {
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
	// What could not be taken over earlier is not forgotten.
	record(os.Getpid(), "another boot", `,"before":{"pid":1,"devices":[{"name":"old","original":"/dev/vdc","path":"/dev/ublkb1","waits":true,"reason":"no such device"}]}`)
	says("the filter data over", "; not taken over: the filter old over /dev/vdc (/dev/ublkb1), whose I/O waits: no such device")

	// This process lives: nothing is lost.
	record(os.Getpid(), processIdentity(os.Getpid()), "")
	if l, err := s.Dir.lost(); l != nil || err != nil {
		t.Errorf("lost with a daemon that lives: %v, %v", l, err)
	}
	// What was lost is told by a record that can be trusted alone.
	if err := os.WriteFile(s.Dir.path(recordName), []byte(`{"pid":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	says("what the one before had is not known: "+s.Dir.path(recordName), "damaged")
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

func daemonPID(t *testing.T, dir RunDir) (pid int) {
	t.Helper()
	b, err := os.ReadFile(dir.path(lockName))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}
