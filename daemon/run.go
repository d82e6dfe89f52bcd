package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Options are what a daemon is started with.
type Options struct {
	Dir        RunDir
	Config     Config
	ConfigPath string // where Config comes from, for Info
	Log        *Log
	// Ready is called once, when the daemon answers.
	Ready func()
	// Prober tells what devices hold; Run starts one.
	Prober *disk.Prober
}

// ProbeCommand is the command of the program that serves a Prober, with the
// directory below which it finds its tools as its argument.
const ProbeCommand = "probe"

// stopper is an API that is freed in two steps.
type stopper interface {
	control.API
	// Close frees what Stop left, at the end of the process.
	Close()
}

// ending is the API of a daemon that ends when it has been stopped.
type ending struct {
	stopper
	stopped chan struct{}
}

// Stop implements control.API.
func (e ending) Stop(ctx context.Context) error {
	err := e.stopper.Stop(ctx)
	if err == nil {
		close(e.stopped) // a second one finds nothing that it may stop
		return nil
	}
	notify("STATUS=asked to stop, but " + err.Error())
	return err
}

// Run is the daemon: it serves until it is told to stop, by a client or by
// SIGTERM or SIGINT, and no device is in use any more.
func Run(o Options) error {
	// Before anything that it must not inherit, and before there is a disk.
	var err error
	if o.Prober, err = disk.StartProber("ublk-blksnap", ProbeCommand, host(0).Root); err != nil {
		o.Log.Warn("cannot look into block devices", "error", err)
	} else {
		defer o.Prober.Close()
	}
	for _, err := range ublk.PrepareProcess() {
		o.Log.Warn("the process is not as it should be", "error", err)
	}
	return run(o, func() (stopper, error) { return NewDaemon(o) })
}

func run(o Options, open func() (stopper, error)) error {
	// Signals first: from the first device on, none may end or stop the process
	// unasked.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT)
	defer signal.Stop(signals)
	ignoreSignals()

	if err := o.Dir.make(); err != nil {
		return err
	}
	lock, err := o.Dir.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	opened, err := open()
	if err != nil {
		return err
	}
	defer opened.Close()
	api := ending{opened, make(chan struct{})}

	l, err := o.Dir.listen()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	srv := newServer(api, o.Log.Logger, usualPatience)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	served := make(chan error, 1)
	go func() { served <- srv.Serve(&crowd{Listener: l, places: make(chan struct{}, maxConnections)}) }()
	o.Log.Info("daemon started", "version", control.Version, "pid", os.Getpid(), "socket", o.Dir.Socket())
	if o.Ready != nil {
		o.Ready()
	}
	notify("READY=1")

	for {
		select {
		case err := <-served:
			return fail(err, "serve %s", o.Dir.Socket())
		case s := <-signals:
			if s == unix.SIGQUIT {
				logGoroutines(o.Log)
				continue
			}
			o.Log.Info("asked to stop", "signal", s.String())
			go func() { // a client may be at it already, and come first
				if err := api.Stop(ctx); err != nil && ctx.Err() == nil {
					o.Log.Error("not stopped, still serving", "error", err)
				}
			}()
		case <-api.stopped:
			notify("STOPPING=1")
			// Watchers would never end; whoever asked for the stop gets its answer.
			cancel()
			limited, done := context.WithTimeout(context.Background(), answerTimeout)
			_ = srv.Shutdown(limited)
			done()
			_ = srv.Close()
			_ = os.Remove(o.Dir.Socket())
			o.Log.Info("daemon stopped")
			return nil
		}
	}
}

// logGoroutines logs what everybody is doing, for who wants to know what hangs.
func logGoroutines(log *Log) {
	b := make([]byte, 1<<20)
	b = b[:runtime.Stack(b, true)]
	for _, g := range strings.Split(string(b), "\n\n") {
		log.Info("goroutine", "stack", g)
	}
}

// answerTimeout is how long the end of a daemon waits for clients to take their
// last answers.
const answerTimeout = 5 * time.Second

// listen replaces what a dead daemon left: the lock says that it is dead.
func (d RunDir) listen() (net.Listener, error) {
	if err := os.Remove(d.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fail(err, "remove the old socket")
	}
	l, err := net.Listen("unix", d.Socket())
	if err != nil {
		return nil, fail(err, "listen")
	}
	if err := os.Chmod(d.Socket(), 0o600); err != nil {
		l.Close()
		return nil, fail(err, "close the socket to others")
	}
	return l, nil
}

// notify tells systemd, if it waits to be told (sd_notify(3)), and does not wait
// for it.
func notify(state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	c, err := net.Dial("unixgram", name)
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = io.WriteString(c, state)
}

// startReport is what a daemon started by a command says through the pipe that
// it inherited, once: an error, or nothing wrong.
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

// Starter knows how to reach the daemon of a run directory, and how to start it.
type Starter struct {
	Dir        RunDir
	ConfigPath string // empty: the default
	Program    string // empty: this one
	// Starting is called when a daemon is about to be started, with what the one
	// before lost if it died; may be nil.
	Starting func(*control.Lost)
}

// startTimeout is how long a daemon may take to answer: loading the driver and
// taking over devices included.
const startTimeout = 60 * time.Second

// Connect gives a client of the daemon that runs. It starts none: that would hide
// that one died. [Unavailable] then says what was lost.
func (s Starter) Connect(ctx context.Context) (*control.Client, error) {
	c := control.NewClient(s.Dir.Socket())
	_, err := c.Info(ctx)
	if e := (*control.Error)(nil); errors.As(err, &e) && e.Code == control.Unavailable {
		if os.Geteuid() != 0 {
			return nil, &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: "ask the daemon: not root", Fix: "run this as root"}
		}
		if l := s.Dir.lost(); l != nil {
			e.Message += ": " + l.String()
		}
	}
	return c, err
}

// Start gives a client of the daemon, which it starts if none runs.
func (s Starter) Start(ctx context.Context) (*control.Client, error) {
	c := control.NewClient(s.Dir.Socket())
	_, err := c.Info(ctx)
	if control.CodeOf(err) != control.Unavailable || err == nil {
		return c, err
	}
	if os.Geteuid() != 0 {
		return nil, &control.Error{Code: control.Denied, Errno: unix.EPERM, Message: "start the daemon: not root", Fix: "run this as root"}
	}
	if s.Starting != nil {
		s.Starting(s.Dir.lost())
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := s.start(ctx); err != nil && control.CodeOf(err) != control.Exists {
		return nil, err
	}
	// Exists: another command has just started one, which may not listen yet.
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

// systemdRuns exists where systemd is process 1.
var systemdRuns = "/run/systemd/system"

// startUnit starts the daemon as the machine's service, if it is one: started
// by us it would be part of the caller's login session and end with it. It
// returns false if there is no such service.
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
	log, err := s.Dir.openLog()
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

	program := s.Program
	if program == "" {
		program = "/proc/self/exe"
	}
	args := []string{"ublk-blksnap", "daemon", "--run-dir", string(s.Dir), "--report-fd", "3"}
	if s.ConfigPath != "" {
		args = append(args, "--config", s.ConfigPath)
	}
	// A session of its own: neither the terminal's signals nor its end reach it.
	p, err := os.StartProcess(program, args, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []*os.File{null, log, log, w},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	w.Close()
	if err != nil {
		return fail(err, "start the daemon")
	}
	// Waited for, so that it leaves no zombie if it ends before us.
	go func() { _, _ = p.Wait() }()

	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Now()) })
	defer stop()
	var report startReport
	switch err := json.NewDecoder(r).Decode(&report); {
	case ctx.Err() != nil:
		return fail(ctx.Err(), "start the daemon")
	case err != nil:
		return &control.Error{Code: control.Unavailable, Errno: unix.ECONNREFUSED, Message: "start the daemon: it ended at once", Fix: "see " + s.Dir.Log()}
	case report.Error != nil:
		return report.Error
	}
	return nil
}
