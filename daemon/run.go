package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
	// Program is the path of the program that runs, and Args are those that it was
	// started with: the next daemon is started the same way.
	Program string
	Args    []string
	// Prober tells what devices hold; Run starts one.
	Prober *disk.Prober

	progress *progress // of the start
}

// ProbeCommand is the command of the program that serves a Prober. Its argument is
// the directory below which it finds its tools.
const ProbeCommand = "probe"

// stopper is an API that is freed in two steps.
type stopper interface {
	control.API
	// What is measured. It waits for no disk and for no request.
	prometheus.Gatherer
	// Serves is called when clients are answered from now on.
	Serves()
	// Answers waits until every thread that serves I/O has shown that it does.
	Answers(ctx context.Context) error
	// GiveUp gives all devices up, for a program that takes over in this process. Of
	// the API only Info may be called after that. It says how many were quiesced.
	GiveUp(ctx context.Context) (quiesced int, err error)
	// EndWithMachine is a Stop that destroys snapshots and removes each filter that nobody
	// uses. While it gives an error, some are left.
	EndWithMachine(ctx context.Context) error
	// Close frees what Stop left, at the end of the process.
	Close()
}

// notifier is the API of a daemon that ends when it has been stopped, or is to be
// another program.
type notifier struct {
	stopper
	stopped  chan struct{}
	reloads  chan control.Reloaded
	reloaded *control.Reloaded // the last reload, which ended with this program; or nil
}

// Stop implements control.API.
func (n notifier) Stop(ctx context.Context) error {
	err := n.stopper.Stop(ctx)
	if err == nil {
		close(n.stopped) // a second one finds nothing that it may stop
		return nil
	}
	notify("STATUS=asked to stop, but " + err.Error())
	return err
}

// EndWithMachine implements stopper.
func (n notifier) EndWithMachine(ctx context.Context) error {
	err := n.stopper.EndWithMachine(ctx)
	if err == nil {
		close(n.stopped)
		return nil
	}
	notify("STATUS=the machine ends, but " + err.Error())
	return err
}

// Reload implements control.API.
func (n notifier) Reload(ctx context.Context, r control.ReloadRequest) (control.Reloaded, error) {
	plan, err := n.stopper.Reload(ctx, r)
	if err == nil {
		n.reloads <- plan // there is one at most: no change comes after it
	}
	return plan, err
}

// Info implements control.API.
func (n notifier) Info(ctx context.Context) (control.Info, error) {
	i, err := n.stopper.Info(ctx)
	i.Reloaded = n.reloaded
	return i, err
}

// Run is the daemon. It serves until a client, SIGTERM or SIGINT tells it to stop
// while no device is in use, or SIGPWR says that the machine ends, if it
// runs under systemd.
func Run(o Options) error {
	// The prober starts before there is anything that it must not inherit, and before
	// there is a disk to serve.
	var err error
	if o.Prober, err = disk.StartProber("ublk-blksnap", ProbeCommand, host(0).Root); err != nil && o.Dir.Resident() {
		return fail(err, "start without the process that goes along paths") // whoever started this tries again
	} else if err != nil {
		o.Log.Warn("cannot start the process that asks blkid: a block device is storage only with --overwrite", "error", err)
	} else {
		defer o.Prober.Close()
	}
	for _, err := range ublk.PrepareProcess() {
		o.Log.Warn("the process could not be prepared in full for serving disks", "error", err)
	}
	if err := run(o, func(o Options) (stopper, error) { return New(o) }); err != nil {
		return err
	}
	o.awaitGuard()
	return nil
}

func run(o Options, open func(Options) (stopper, error)) error {
	// Signals come first, because from the first device on no signal may end or stop
	// the process by itself.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT, unix.SIGPWR)
	defer signal.Stop(signals)
	ignoreSignals()

	if err := o.Dir.make(); err != nil {
		return err
	}
	lock, err := o.Dir.takeLock()
	if err != nil {
		return err
	}
	defer lock.Close()
	reload, l, err := takeReload()
	if err != nil {
		o.Log.Warn("callers that wait for the daemon are cut off", "error", err)
	}
	if err := o.Dir.migrate(); err != nil {
		return err
	}
	// Before there is anything that would have to wait for the next daemon.
	if err := o.setGuard(); err != nil && o.Dir.Resident() {
		return err // because nobody else could start the next
	} else if err != nil {
		o.Log.Warn("nobody starts the next daemon if this one dies", "error", err)
	}
	o.progress = &progress{}
	stopExtending := extendStart(o.progress, o.Config.patience(), reload != nil)
	opened, err := open(o)
	stopExtending()
	if err != nil {
		return err
	}
	defer opened.Close()
	api := notifier{stopper: opened, stopped: make(chan struct{}), reloads: make(chan control.Reloaded, 1)}
	if reload != nil {
		now, _ := opened.Info(context.Background())
		api.reloaded = reload.end(o.Log, now)
	}
	if reload != nil && reload.Ending {
		select {
		case signals <- unix.SIGPWR:
		default: // it is full of others
		}
	}
	if l == nil {
		if l, err = o.Dir.listen(); err != nil {
			return err
		}
	}
	var readers *net.UnixListener
	if reload != nil {
		readers = reload.readers
	}
	return o.serve(api, l, readers, lock, signals)
}

// serve answers clients until the daemon has been stopped, or this program's end in favour
// of another one. readers is the listener of readers that the program before has handed on.
func (o *Options) serve(api notifier, l, readers *net.UnixListener, lock *os.File, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	srv := newServer(api, o.Log.Logger, defaultTimeouts)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	served := make(chan error, 1)
	api.Serves()
	go func() { served <- srv.Serve(&limitListener{Listener: l, places: make(chan struct{}, maxConnections)}) }()
	readers, readSrv := o.serveReaders(ctx, api, readers)
	o.Log.Info("daemon started", "version", control.Version, "pid", os.Getpid(), "socket", o.Dir.Socket())
	if o.Ready != nil {
		o.Ready()
	}
	notify("READY=1")
	go feedWatchdog(ctx, api, o.Log.Logger)
	go o.offerMetrics(ctx, api)
	renewing, noProber := context.WithCancel(ctx)
	defer noProber()
	if o.Prober != nil {
		go renewProber(renewing, o.Log, o.Prober.Ended(), renewInterval, func() error {
			_, err := api.Reload(renewing, control.ReloadRequest{})
			return err
		})
	}
	// Watchers would never end by themselves. They are told why they do, and whoever asked
	// for the end gets his answer.
	finish := func(why error) {
		cancel(why)
		var wg sync.WaitGroup
		for s, patience := range map[*http.Server]time.Duration{srv: answerTimeout, readSrv: readerTimeout} {
			wg.Add(1)
			go func() {
				defer wg.Done()
				limited, done := context.WithTimeout(context.Background(), patience)
				defer done()
				_ = errors.Join(s.Shutdown(limited), s.Close())
			}()
		}
		wg.Wait()
	}

	ending := false
	// Another program is to take over: it has to know whether the machine ends. A signal that
	// comes from now on is lost, and would otherwise end the new program in its first
	// instant. systemd repeats it.
	handOn := func() bool {
		signal.Ignore(unix.SIGPWR)
		ending = came(unix.SIGPWR, signals) || ending
		return ending
	}
	for {
		select {
		case err := <-served:
			return fail(err, "serve %s", o.Dir.Socket())
		case s := <-signals:
			if s == unix.SIGQUIT {
				logGoroutines(o.Log)
				continue
			}
			if s == unix.SIGPWR {
				if Supervised() && !ending { // systemd repeats it, and means nothing else by it
					ending = true
					o.Log.Info("the machine ends")
					noProber()
					go o.endWithMachine(ctx, api)
				}
				continue
			}
			o.Log.Info("asked to stop", "signal", s.String())
			go func() { // another stop, by a client, may be under way
				if err := api.Stop(ctx); err != nil && ctx.Err() == nil {
					o.Log.Error("not stopped, still serving", "error", err)
				}
			}()
		case plan := <-api.reloads:
			o.Log.Info("another program takes over in this process", "program", plan.Program)
			socket, err := l.File()
			if err != nil {
				return fail(err, "hand the socket on")
			}
			var reading *os.File
			if readers != nil {
				if reading, err = readers.File(); err != nil {
					o.Log.Warn("readers that wait for the daemon are cut off", "error", err)
				}
			}
			finish(errTakenOver)
			return fail(o.exec(api, lock, socket, reading, plan, handOn), "exec %s", plan.Program)
		case <-api.stopped:
			notify("STOPPING=1")
			defer extendStop()()
			finish(nil)
			_, _ = os.Remove(o.Dir.Socket()), os.Remove(o.Dir.ReadSocket())
			if err := o.dismissGuard(); err != nil {
				o.Log.Warn("the guard stays", "error", err)
			}
			o.Log.Info("daemon stopped")
			return nil
		}
	}
}

// errTakenOver ends what goes on for as long as the daemon: the next one may be asked for it.
var errTakenOver = &control.Error{Code: control.Unavailable, Errno: unix.ECONNRESET, Message: "another program takes over in the daemon's process"}

// came says whether s is among the signals that nobody has looked at yet. It takes them all.
func came(s os.Signal, signals <-chan os.Signal) (found bool) {
	for {
		select {
		case next := <-signals:
			found = found || next == s
		default:
			return found
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

// answerTimeout and readerTimeout are how long the end of a daemon waits for root, and for
// readers, to take their last answers.
const (
	answerTimeout = 5 * time.Second
	readerTimeout = time.Second
)

// listen replaces the socket of a dead daemon. The lock proves that it is dead.
func (d RunDir) listen() (*net.UnixListener, error) {
	if err := os.Remove(d.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fail(err, "remove the old socket")
	}
	l, err := listenClosed(d.Socket())
	if err != nil {
		return nil, fail(err, "listen")
	}
	return l, nil
}

// listenClosed listens at a path. The socket is its owner's alone from its first instant on:
// Linux gives a socket in a file system the mode that it has had without a name. It stays
// when it is closed, because it may have been handed on.
func listenClosed(path string) (*net.UnixListener, error) {
	c := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, failed)
	}}
	l, err := c.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	return u, nil
}
