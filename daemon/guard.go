package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Where no service manager starts a daemon anew that has died, a guard does: a small
// process that waits until nobody holds the daemon's lock. If something waits for a
// daemon then, it starts the next one; if not, it ends.
//
//	daemon ──asks──> prober ──starts, when guard.lock is free──> guard
//	  │ holds daemon.lock                                         │ holds guard.lock,
//	  └──────────────────── dies: the lock is free ──────────────>┘ starts the next daemon
//
// There is one guard at most, because it holds guard.lock. It outlives the daemon and
// the prober; if it is what dies, the prober gets its lock and starts another. It has
// no file of a filesystem open and works in the root directory of the mount namespace
// that the daemon was started in, so that the next one begins as the first did.

// GuardCommand is the command of the program that is a guard.
const GuardCommand = "guard"

const (
	guardLockName = "guard.lock"
	startName     = stateName + "/start"
)

// startRecord says how the daemon that runs was started, and who starts the next one
// if it dies. A daemon that ends as it should removes it.
type startRecord struct {
	By      starts   `json:"by"`
	Program string   `json:"program"` // its path
	Args    []string `json:"args"`    // without the program's name
	// Of a resident daemon: the program of which Program is the copy, and what the next one
	// has to have in its environment.
	Installed string   `json:"installed,omitempty"`
	Env       []string `json:"env,omitempty"`
}

// starts says who starts the next daemon.
type starts string

const (
	byGuard   starts = "guard"
	bySystemd starts = "systemd"
	byOther   starts = "other" // who has set guard = false
)

// The guard of an older program reads the record of a newer one, after a reload. So its
// version stays, whatever is added to it.
const (
	startKind    = "start"
	startVersion = 1
)

func (d RunDir) startRecord() (r startRecord, err error) {
	body, _, err := statefile.Read(d.path(startName), startKind, startVersion)
	if err == nil {
		err = json.Unmarshal(body, &r)
	}
	return r, err
}

// Supervised says whether systemd starts the daemon anew if it dies: it waits to be
// told of the start.
func Supervised() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// setGuard puts on record who starts the next daemon if this one dies, and starts a
// guard if that is one; needs the daemon's lock.
func (o *Options) setGuard() error {
	r := startRecord{By: byGuard, Program: o.Program, Args: o.Args}
	switch {
	case o.Dir.Resident() && o.Prober != nil:
		r.Program, r.Installed, r.Env = o.Dir.path(residentName), o.Program, residentEnvironment()
	case Supervised():
		r.By = bySystemd
	case !o.Config.Guard || o.Prober == nil:
		r.By = byOther
	}
	// If a guard is there that shall not be, this sends it away.
	if err := statefile.Write(o.Dir.path(startName), startKind, startVersion, r); err != nil {
		return fail(err, "put on record how to start the next daemon")
	}
	if r.By != byGuard {
		return nil
	}
	lock, err := o.Dir.file(guardLockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fail(err, "start the guard")
	}
	defer lock.Close()
	if r.Installed != "" {
		o.Dir.endOtherGuard()
	}
	namespace := sharedNamespace
	if os.Getenv(namespaceEnv) == ownNamespace {
		namespace = ownNamespace
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.Config.DiskTimeout)
	defer cancel()
	if err := o.Prober.Keep(ctx, lock, "ublk-blksnap", GuardCommand, "--run-dir", string(o.Dir), namespace); err != nil {
		return fail(err, "start the guard")
	}
	return nil
}

// dismissGuard ends the guard's work, for a daemon that ends as it should; needs the
// daemon's lock, whose end then ends the guard.
func (o *Options) dismissGuard() error {
	err := o.Dir.remove(startName)
	if o.Prober != nil {
		ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
		defer cancel()
		err = errors.Join(err, o.Prober.LetGo(ctx))
	}
	return err
}

// awaitGuard waits for the end of a guard that was dismissed. The daemon's lock is
// free.
func (o *Options) awaitGuard() {
	for end := time.Now().Add(answerTimeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		f, err := o.Dir.file(guardLockName, os.O_RDWR, 0)
		if err != nil {
			return // there was none
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		f.Close()
		if err == nil {
			return
		}
	}
}

// EnterGuard makes this process, which a Prober has started, a guard's: after that it
// is in the mount namespace from which daemons are started. The namespace is that of
// the daemon. It returns once that is so.
func EnterGuard(namespace string) error {
	unix.CloseOnExec(guardLockFD) // no daemon that it starts shall hold it
	if namespace != ownNamespace {
		return leaveDirectory()
	}
	// A thread may change its namespace if it shares its root directory with no other.
	// The whole process is there when this thread has started it anew.
	runtime.LockOSThread()
	ns, err := unix.Open("/proc/1/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Unshare(unix.CLONE_FS)
	}
	if err == nil {
		err = unix.Setns(ns, unix.CLONE_NEWNS)
	}
	if err == nil {
		_, err = unix.FcntlInt(guardLockFD, unix.F_SETFD, 0)
	}
	if err != nil {
		return fail(err, "enter the machine's mount namespace")
	}
	args := slices.Clone(os.Args)
	args[len(args)-1] = sharedNamespace
	return fail(unix.Exec("/proc/self/exe", args, os.Environ()), "start the guard anew")
}

// guardName is what a guard's process is called.
const guardName = "ublk-guard"

// guardLockFD is guard.lock, locked, as the Prober hands it on.
const guardLockFD = 3

// The pauses of a guard between starts that fail. They are what I/O waits at least
// when the reason has gone.
const (
	firstPause = 50 * time.Millisecond
	longPause  = 5 * time.Second
)

// Guard is the life of a guard.
func Guard(dir RunDir, level slog.Level) error {
	// What waits for the next daemon must not depend on memory that is on a disk which
	// waits itself, nor on a terminal's signals. The signals come second, because the
	// first needs one of them.
	failed := ublk.PrepareProcess()
	ignoreSignals()
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGQUIT)
	_ = os.WriteFile("/proc/self/comm", []byte(guardName), 0)
	out, err := dir.openLog()
	if err != nil {
		return err
	}
	log := NewLog(out, level, false)
	for _, err := range failed {
		log.Warn("the guard is not as it should be", "error", err)
	}
	return dir.guard(log.Logger)
}

func (d RunDir) guard(log *slog.Logger) error {
	said := ""
	for pause := firstPause; ; {
		if err := d.awaitDeath(); err != nil {
			return err
		}
		r, err := d.startRecord()
		if err != nil || r.By != byGuard || !d.survivors() {
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				log.Error("the guard cannot start the next daemon", "error", err)
			}
			return nil
		}
		if pause == firstPause {
			log.Warn("the daemon has died: the guard starts the next one")
		}
		err = launch(context.Background(), d, r.Program, r.Args, r.Env, true)
		if err != nil && control.CodeOf(err) != control.Exists {
			if err.Error() != said { // once, however often it is tried
				said = err.Error()
				log.Error("the next daemon does not start: it is tried again", "program", r.Program, "error", err)
			}
			// The file may have been replaced by one that cannot serve what waits. This
			// program could.
			err = launch(context.Background(), d, "/proc/self/exe", r.Args, r.Env, true)
		}
		if err == nil || control.CodeOf(err) == control.Exists {
			pause, said = firstPause, ""
			continue
		}
		time.Sleep(pause)
		pause = min(2*pause, longPause)
	}
}

// awaitDeath waits until no process holds the daemon's lock. It holds the lock for no
// longer than the kernel needs to say so.
func (d RunDir) awaitDeath() error {
	f, err := d.file(lockName, os.O_RDWR, 0)
	if err != nil {
		return fail(err, "watch the daemon")
	}
	defer f.Close()
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return fail(err, "watch the daemon")
		}
	}
}
