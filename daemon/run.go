package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
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

// ProbeCommand is the command of the program that serves a Prober. Its argument is
// the directory below which it finds its tools.
const ProbeCommand = "probe"

// stopper is an API that is freed in two steps.
type stopper interface {
	control.API
	// Close frees what Stop left, at the end of the process.
	Close()
}

// stopNotifier is the API of a daemon that ends when it has been stopped.
type stopNotifier struct {
	stopper
	stopped chan struct{}
}

// Stop implements control.API.
func (n stopNotifier) Stop(ctx context.Context) error {
	err := n.stopper.Stop(ctx)
	if err == nil {
		close(n.stopped) // a second one finds nothing that it may stop
		return nil
	}
	notify("STATUS=asked to stop, but " + err.Error())
	return err
}

// Run is the daemon. It serves until a client, SIGTERM or SIGINT tells it to stop
// while no device is in use.
func Run(o Options) error {
	// The prober starts before there is anything that it must not inherit, and before
	// there is a disk to serve.
	var err error
	if o.Prober, err = disk.StartProber("ublk-blksnap", ProbeCommand, host(0).Root); err != nil {
		o.Log.Warn("cannot start the process that asks blkid: a block device is storage only with --overwrite", "error", err)
	} else {
		defer o.Prober.Close()
	}
	for _, err := range ublk.PrepareProcess() {
		o.Log.Warn("the process could not be prepared in full for serving disks", "error", err)
	}
	return run(o, func() (stopper, error) { return New(o) })
}

func run(o Options, open func() (stopper, error)) error {
	// Signals come first, because from the first device on no signal may end or stop
	// the process by itself.
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
	api := stopNotifier{opened, make(chan struct{})}

	l, err := o.Dir.listen()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	srv := newServer(api, o.Log.Logger, defaultTimeouts)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	served := make(chan error, 1)
	go func() { served <- srv.Serve(&limitListener{Listener: l, places: make(chan struct{}, maxConnections)}) }()
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
			go func() { // another stop, by a client, may be under way
				if err := api.Stop(ctx); err != nil && ctx.Err() == nil {
					o.Log.Error("not stopped, still serving", "error", err)
				}
			}()
		case <-api.stopped:
			notify("STOPPING=1")
			// Watchers would never end by themselves. Whoever asked for the stop gets his
			// answer.
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

// logGoroutines logs what every goroutine is doing, so that one can see what hangs.
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

// listen replaces the socket of a dead daemon. The lock proves that it is dead.
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

// notify tells systemd the state of the daemon, if systemd wants to know
// (sd_notify(3)). It does not wait for systemd.
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
