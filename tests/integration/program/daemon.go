// Package program is the program under test: daemons with run directories of their
// own, calls of the command, and what they hold and leave behind. A method fails
// the daemon's test if what it does fails.
package program

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// Path is the path of the program under test.
func Path(t testing.TB) string {
	t.Helper()
	path := os.Getenv("UBLK_BLKSNAP_BIN")
	if path == "" {
		path = guest.TreeFile(t, "bin/ublk-blksnap")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: make build", err)
	}
	return path
}

// Daemon is a running daemon with a run directory of its own.
type Daemon struct {
	*control.Client
	t      testing.TB
	RunDir daemon.RunDir
	// StateDir is the state_dir that it was started with.
	StateDir string
	PID      int
	// Program is another program than that under test, for the next Launch.
	Program string
	args    []string
	cmd     *exec.Cmd
	Log     string        // file
	hangs   bool          // it did not answer
	threads []string      // that it began with, see namedThreads
	end     chan struct{} // closed when the process has ended
	Err     error         // of its end
	rescuer *exec.Cmd     // the next process, if this one crashed; nil before end is closed
}

// testParams are the parameters of daemons here: small enough for a machine
// with a few GiB, and for every limit to be reached.
var testParams = []string{
	"diff_storage_minimum=8192", // 4 MiB
	"diff_buffer_pool_size=8M",
	"state_size=512M",
	"guard=false", // a test that kills its daemon decides about the next
}

// Start starts a daemon with parameters key=value on top of testParams. When the
// test ends it is told to stop, and must not leave anything.
func Start(t testing.TB, params ...string) *Daemon {
	t.Helper()
	return StartLogging(t, nil, params...)
}

// StartLogging is Start with another place for the log than a file.
func StartLogging(t testing.TB, stderr *os.File, params ...string) *Daemon {
	t.Helper()
	guest.Need(t)
	dir := t.TempDir()
	d := &Daemon{t: t, RunDir: daemon.RunDir(filepath.Join(dir, "run")), Log: filepath.Join(dir, "log")}
	config := filepath.Join(dir, "conf")
	values := map[string]string{}
	for _, p := range slices.Concat(testParams, []string{"state_dir=" + filepath.Join(dir, "state")}, params) {
		key, value, _ := strings.Cut(p, "=")
		if _, err := strconv.Atoi(value); err != nil && value != "true" && value != "false" {
			value = strconv.Quote(value)
		}
		values[key] = value
	}
	d.StateDir, _ = strconv.Unquote(values["state_dir"])
	var b strings.Builder
	for key, value := range values {
		fmt.Fprintf(&b, "%s = %s\n", key, value)
	}
	if err := os.WriteFile(config, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	before := guest.UblkDevices()
	d.args = []string{"daemon", "--run-dir", string(d.RunDir), "--config", config}
	d.launch(stderr)
	d.Client = control.NewClient(d.RunDir.Socket())
	t.Cleanup(func() {
		processes := d.processes()
		if !d.Ended(0) && !t.Failed() {
			d.noThreads()
		}
		d.StopAndWait()
		d.noProcesses(processes)
		if t.Failed() {
			d.showLog()
		}
		// The last one who looked at a device may still be on the way out.
		guest.WaitFor(t, fmt.Sprintf("the end of the ublk devices, before: %v", before), func() bool { return len(guest.UblkDevices()) <= len(before) })
		_ = unix.Unmount(d.RunDir.State(), unix.MNT_DETACH)
		d.Close()
	})
	d.answers()
	d.threads = d.namedThreads()
	return d
}

// launch starts the process.
func (d *Daemon) launch(stderr *os.File, env ...string) {
	d.t.Helper()
	log, err := os.OpenFile(d.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	program := d.Program
	if program == "" {
		program = Path(d.t)
	}
	d.cmd = exec.Command(program, d.args...)
	d.cmd.Env = append(os.Environ(), "GOTRACEBACK=crash") // a panic ends with a signal too
	d.cmd.Env = append(d.cmd.Env, env...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if stderr != nil {
		d.cmd.Stderr = stderr
	}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.PID = d.cmd.Process.Pid
	cmd, end := d.cmd, make(chan struct{})
	d.end = end
	go func() {
		d.Err = cmd.Wait()
		if crashed(cmd.ProcessState) {
			d.rescue(cmd)
		}
		close(end)
	}()
}

// crashed says whether a process ended by a signal that nobody sends to it.
func crashed(s *os.ProcessState) bool {
	status, ok := s.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && !slices.Contains([]syscall.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT}, status.Signal())
}

// rescue fails the test of a daemon that crashed, and starts the next one: without it the
// test would wait for its requests until the machine's time is up, and tell nothing.
func (d *Daemon) rescue(dead *exec.Cmd) {
	d.t.Errorf("the daemon crashed: %v", d.Err)
	log, err := os.OpenFile(d.Log, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		d.t.Error(err)
		return
	}
	defer log.Close()
	next := exec.Command(dead.Path, d.args...)
	next.Stdout, next.Stderr = log, log
	if err := next.Start(); err != nil {
		d.t.Error(err)
		return
	}
	d.rescuer = next
}

// answers waits until the daemon does.
func (d *Daemon) answers() {
	d.t.Helper()
	guest.WaitFor(d.t, "an answer of the daemon", func() bool {
		select {
		case <-d.end:
			d.showLog()
			d.t.Fatalf("the daemon ended at once: %v", d.Err)
		default:
		}
		_, err := d.Info(guest.Context(d.t))
		return err == nil
	})
}

// Kill is kill -9, and the wait until the process is dead.
func (d *Daemon) Kill() {
	d.t.Helper()
	if err := unix.Kill(d.PID, unix.SIGKILL); err != nil {
		d.t.Fatal(err)
	}
	if !d.Ended(guest.Patience) {
		d.t.Fatal("the process does not end")
	}
}

// Launch starts the process again, on what the dead one left, and does not wait for
// its answer. env is added to its environment.
func (d *Daemon) Launch(env ...string) {
	d.t.Helper()
	d.launch(nil, env...)
}

// With adds flags to the processes that are started from now on.
func (d *Daemon) With(flags ...string) { d.args = append(d.args, flags...) }

// Restart is Launch, and the wait for its answer.
func (d *Daemon) Restart(env ...string) {
	d.t.Helper()
	d.Launch(env...)
	d.answers()
}

// In is the daemon for a part of a test.
func (d *Daemon) In(t testing.TB) *Daemon {
	part := *d
	part.t = t
	return &part
}

// shownLog is how much of a log a test that fails shows, in bytes: all of it, unless
// the daemon repeated itself.
const shownLog = 64 << 10

func (d *Daemon) showLog() {
	d.t.Helper()
	b, _ := os.ReadFile(d.Log)
	if len(b) > shownLog {
		for _, line := range bytes.Split(b[:len(b)-shownLog], []byte("\n")) {
			if bytes.Contains(line, []byte("level=ERROR")) {
				d.t.Logf("an error before what is shown below:\n%s", line)
			}
		}
		b = b[len(b)-shownLog:]
	}
	d.t.Logf("the daemon's log:\n%s", b)
}

// Ended says whether the daemon ends within limit.
func (d *Daemon) Ended(limit time.Duration) bool {
	select {
	case <-d.end:
		return true
	case <-time.After(limit):
		return false
	}
}

// StopAndWait asks the daemon to stop and makes sure that it does.
func (d *Daemon) StopAndWait() {
	d.t.Helper()
	select {
	case <-d.end: // by the test, or it crashed
		if d.rescuer != nil {
			_ = d.rescuer.Process.Signal(unix.SIGTERM)
			_ = d.rescuer.Wait()
		}
		return
	default:
	}
	_ = unix.Kill(d.PID, unix.SIGTERM)
	if !d.Ended(guest.Patience) {
		d.t.Errorf("the daemon does not stop")
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
		_ = unix.Kill(d.PID, unix.SIGQUIT)
		if !d.Ended(5 * time.Second) {
			_ = unix.Kill(d.PID, unix.SIGKILL)
			d.Ended(5 * time.Second)
		}
		return
	}
	if d.Err != nil {
		d.t.Errorf("the daemon ended with %v", d.Err)
	}
}
