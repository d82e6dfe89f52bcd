package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// Starter knows how to reach the daemon of a run directory, and how to start it.
type Starter struct {
	Dir        RunDir
	ConfigPath string // empty: the default
	Program    string // empty: this one
	// Starting is called when a daemon is about to be started, with what the one
	// before lost if it died; may be nil.
	Starting func(*control.Lost)
}

// startTimeout is how long a daemon may take until it answers. That includes loading
// the driver and clearing away what a dead daemon left.
const startTimeout = 60 * time.Second

// Connect gives a client of the daemon that runs. If the daemon has died, and something
// waits for the next one, it starts that, unless others do (guard = false). Else it
// starts none, because that would hide that a daemon has died. The error,
// control.Unavailable, says then what was lost.
func (s Starter) Connect(ctx context.Context) (*control.Client, error) {
	return s.reach(ctx, func() bool {
		r, err := s.Dir.startRecord()
		return err == nil && r.By != byOther && s.Dir.survivors()
	})
}

// Ask is Connect for what shall not start a daemon: to stop it.
func (s Starter) Ask(ctx context.Context) (*control.Client, error) {
	return s.reach(ctx, func() bool { return false })
}

// Start gives a client of the daemon, which it starts if none runs.
func (s Starter) Start(ctx context.Context) (*control.Client, error) {
	return s.reach(ctx, func() bool { return true })
}

func (s Starter) reach(ctx context.Context, start func() bool) (*control.Client, error) {
	c := control.NewClient(s.Dir.Socket())
	_, err := c.Info(ctx)
	e := (*control.Error)(nil)
	if code := control.CodeOf(err); os.Geteuid() != 0 && (code == control.Denied || code == control.Unavailable) {
		// Perhaps he may look. He never starts a daemon.
		c = control.NewClient(s.Dir.ReadSocket())
		if _, err = c.Info(ctx); errors.As(err, &e) && e.Code == control.Denied {
			e.Fix = "run this as root, or as a member of the group that the configuration names"
		} else if e != nil && e.Code == control.Unavailable && start() {
			return nil, &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: "ask the daemon: not root", Fix: "run this as root"}
		}
		return c, err
	}
	if !errors.As(err, &e) || e.Code != control.Unavailable {
		return c, err
	}
	lost, damaged := s.Dir.lost()
	if !start() {
		if lost != nil {
			e.Message += ": " + lost.String()
		} else if damaged != nil {
			e.Message += ": what the one before had is not known: " + damaged.Error()
		}
		return c, err
	}
	if s.Starting != nil {
		s.Starting(lost)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := s.start(ctx); err != nil && control.CodeOf(err) != control.Exists {
		return nil, err
	}
	// Exists: another command, or the guard, has just started one, which may not listen
	// yet.
	for {
		_, err := c.Info(ctx)
		if control.CodeOf(err) != control.Unavailable || err == nil || ctx.Err() != nil {
			return c, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// unitName is the daemon's systemd unit, as dist/ has it.
const unitName = "ublk-blksnap.service"

// systemdRuns is a directory that exists only if systemd is process 1.
var systemdRuns = "/run/systemd/system"

// startUnit starts the daemon as the machine's service, and returns false if there is
// no such service. If this process started the daemon itself, the daemon would be
// part of the caller's login session and end with it.
func (s Starter) startUnit(ctx context.Context) (bool, error) {
	if _, err := os.Stat(systemdRuns); err != nil || s.Dir != DefaultRunDir || s.ConfigPath != "" {
		return false, nil //nolint:nilerr // no systemd
	}
	if known := exec.CommandContext(ctx, "systemctl", "cat", unitName).Run() == nil; !known {
		return false, nil
	}
	out, err := exec.CommandContext(ctx, "systemctl", "start", unitName).CombinedOutput()
	if err != nil {
		return true, &control.Error{Code: control.Unavailable, Errno: unix.ECONNREFUSED, Fix: "journalctl -u " + unitName,
			Message: fmt.Sprintf("start the daemon: systemctl start %s: %v: %s", unitName, err, strings.TrimSpace(string(out)))}
	}
	return true, nil
}

func (s Starter) start(ctx context.Context) error {
	if started, err := s.startUnit(ctx); started {
		return err
	}
	if err := s.Dir.make(); err != nil {
		return err
	}
	program := s.Program
	if program == "" {
		program = "/proc/self/exe"
	}
	args := []string{"daemon", "--run-dir", string(s.Dir)}
	if r, err := s.Dir.startRecord(); s.ConfigPath != "" {
		args = append(args, "--config", s.ConfigPath)
	} else if err == nil && s.Dir.survivors() {
		args = r.Args // as the one that died
	}
	return launch(ctx, s.Dir, program, args, nil, false)
}

// launch starts a daemon on the directory and waits until it answers, or for the
// error that keeps it from that. An orphan is no child of this process, but a sibling: so
// that systemd hears of its death, if that is the parent.
func launch(ctx context.Context, dir RunDir, program string, args, env []string, orphan bool) error {
	log, err := dir.openLog()
	if err != nil {
		return fail(err, "start the daemon")
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fail(err, "start the daemon")
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fail(err, "start the daemon")
	}
	defer r.Close()

	// The daemon gets a session of its own, so that neither the terminal's signals nor
	// its end reach it.
	sys := &syscall.SysProcAttr{Setsid: true}
	if orphan {
		sys.Cloneflags = unix.CLONE_PARENT
	}
	p, err := os.StartProcess(program, slices.Concat([]string{"ublk-blksnap"}, args, []string{"--report-fd", "3"}), &os.ProcAttr{
		Dir:   "/",
		Env:   append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, env...),
		Files: []*os.File{null, log, log, w},
		Sys:   sys,
	})
	w.Close()
	if err != nil {
		return fail(err, "start the daemon")
	}
	// If the daemon ends before this process, it shall leave no zombie.
	go func() { _, _ = p.Wait() }()

	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Now()) })
	defer stop()
	var report startReport
	switch err := json.NewDecoder(r).Decode(&report); {
	case ctx.Err() != nil:
		return fail(ctx.Err(), "start the daemon")
	case err != nil:
		return &control.Error{Code: control.Unavailable, Errno: unix.ECONNREFUSED, Message: "start the daemon: it ended at once", Fix: "see " + dir.Log()}
	case report.Error != nil:
		return report.Error
	}
	return nil
}

// startReport is what a daemon that was started by a command says, once, through the
// pipe that it inherited: an error, or that nothing is wrong.
type startReport struct {
	Error *control.Error `json:"error,omitempty"`
}

// ReportStart tells the command that started this daemon, through the inherited
// file descriptor fd, that it runs (err nil) or why not. It may be called once.
func ReportStart(fd int, err error) {
	if fd < 3 {
		return
	}
	f := os.NewFile(uintptr(fd), "starter")
	defer f.Close()
	var r startReport
	if err != nil && !errors.As(err, &r.Error) {
		r.Error = &control.Error{Code: control.Internal, Message: err.Error()}
	}
	_ = json.NewEncoder(f).Encode(r)
}
