package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// What else the process of a Prober does for a daemon, because the daemon must not
// fork: it runs a program and tells its output, and it keeps a process running.

// Command is a program to run, found below the root directory that the Prober was
// started with.
type Command struct {
	Path string   `json:"path"`
	Args []string `json:"args"` // the first is its name
}

// Ran is how a Command has ended.
type Ran struct {
	Status int    `json:"status"` // its exit status, -1 if a signal ended it
	Out    string `json:"out"`    // what it printed on standard output first, as far as kept
	Said   string `json:"said"`   // and on standard error
}

const (
	// runLimit is how long a Command may run.
	runLimit = time.Minute
	// keptOutput is how much of a program's output is told, in bytes.
	keptOutput = 8 << 10
	// keepPause is the time from the end of a kept process to the start of the next. It
	// grows up to longKeepPause while the processes do not live as long as that.
	keepPause     = 50 * time.Millisecond
	longKeepPause = 5 * time.Second
	// farewell is how long a Prober's process outlives the daemon if it keeps a process
	// running, which may have been killed with the daemon, on a machine that is short of
	// memory or of time. From then on keepPause does not grow.
	farewell = time.Second
)

// ErrCannotRun: a Command could not be run, or did not end in time.
var ErrCannotRun = errors.New("cannot be run")

// Run runs a command.
func (p *Prober) Run(ctx context.Context, c Command) (Ran, error) {
	a, err := p.ask(ctx, question{Run: &c})
	switch {
	case err != nil:
		return Ran{}, err
	case a.Ran == nil:
		return Ran{}, fmt.Errorf("%w: %s", ErrCannotRun, a.Error)
	}
	return *a.Ran, nil
}

// Keep has a process of this program with args run from now on: whenever lock is
// free, the Prober takes it (flock(2)) and starts one, which inherits it as its file
// descriptor 3 and holds it for life. One that runs already, whoever started it, is
// so left alone until it ends. The processes outlive the Prober.
func (p *Prober) Keep(ctx context.Context, lock *os.File, args ...string) error {
	a, err := p.ask(ctx, question{Keep: args}, lock)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return err
}

// LetGo ends what Keep began. A process that runs goes on.
func (p *Prober) LetGo(ctx context.Context) error {
	_, err := p.ask(ctx, question{LetGo: true})
	return err
}

// DM gives an order to device-mapper. If ctx ends before it is done, the error is that of ctx,
// and what becomes of it is open. If the order's own limit has ended, the error is
// context.DeadlineExceeded too, and nothing has changed.
func (p *Prober) DM(ctx context.Context, o dm.Order) (dm.Info, error) {
	a, err := p.ask(ctx, question{DM: &o})
	switch {
	case err != nil:
		return dm.Info{}, err
	case a.Late:
		return dm.Info{}, fmt.Errorf("%w: %s", context.DeadlineExceeded, a.Error)
	case a.Errno != 0:
		return dm.Info{}, &dmError{a.Error, a.Errno}
	case a.DM == nil:
		return dm.Info{}, errors.New(a.Error)
	}
	return *a.DM, nil
}

// dmError is an error that another process has had.
type dmError struct {
	text  string
	errno unix.Errno
}

func (e *dmError) Error() string { return e.text }
func (e *dmError) Unwrap() error { return e.errno }

// errands is what a Prober's process has to do.
type errands struct {
	root    string
	keeps   atomic.Bool
	letGo   atomic.Bool
	leaving chan struct{} // closed when the daemon has gone
}

// end is called when the daemon has gone.
func (e *errands) end() {
	close(e.leaving)
	if e.keeps.Load() && !e.letGo.Load() {
		time.Sleep(farewell)
	}
}

func (e *errands) do(q question, files []*os.File) answer {
	switch {
	case q.Probe && len(files) == 1:
		holds, err := Blkid(e.root, files[0])
		a := answer{Holds: holds, NoTool: errors.Is(err, ErrNoTool)}
		if err != nil {
			a.Error = err.Error()
		}
		return a
	case q.Read != nil:
		return q.Read.read()
	case q.Thaw && len(files) == 1:
		return request(files[0], uapi.FITHAW)
	case q.Partition != "":
		return failed(addPartitions(q.Partition, q.Sequence, q.Table))
	case q.FindHooks != "":
		names, err := findHooks(e.root, q.FindHooks)
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Hooks: names}
	case q.DM != nil:
		info, err := q.DM.Do()
		a := failed(err)
		a.DM, a.Late = &info, errors.Is(err, context.DeadlineExceeded)
		return a
	case q.Run != nil:
		ran, err := e.run(*q.Run)
		if err != nil {
			return answer{Error: err.Error()}
		}
		return answer{Ran: &ran}
	case len(q.Keep) > 0 && len(files) == 1:
		lock, err := reopen(files[0])
		if err != nil {
			return answer{Error: err.Error()}
		}
		e.keeps.Store(true)
		go e.keep(lock, q.Keep)
		return answer{}
	case q.LetGo:
		e.letGo.Store(true)
		return answer{}
	}
	return answer{Error: "the prober does not know this question"}
}

func (e *errands) run(c Command) (Ran, error) {
	ctx, cancel := context.WithTimeout(context.Background(), runLimit)
	defer cancel()
	var out, said kept
	cmd := exec.CommandContext(ctx, c.Path)
	cmd.Args = c.Args
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.WaitDelay = time.Second
	if e.root != "/" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: e.root}
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return Ran{}, err
	}
	return Ran{Status: cmd.ProcessState.ExitCode(), Out: string(out.text), Said: string(said.text)}, nil
}

// kept is a program's output, of which no more than keptOutput is in memory: the Prober's is
// locked, and a database may be dumped there.
type kept struct {
	text []byte
	last bool // the last part of it is kept, not the first
}

func (k *kept) Write(b []byte) (int, error) {
	if k.last {
		k.text = append(k.text, b[max(0, len(b)-keptOutput):]...)
		k.text = append(k.text[:0], k.text[max(0, len(k.text)-keptOutput):]...)
	} else {
		k.text = append(k.text, b[:min(len(b), keptOutput-len(k.text))]...)
	}
	return len(b), nil
}

// reopen is the same file, opened once more: a lock belongs to what was opened.
func reopen(f *os.File) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
}

// keep is the life of Keep. Of an error there is nobody to tell: it is tried again.
func (e *errands) keep(lock *os.File, args []string) {
	for pause := keepPause; !e.letGo.Load(); {
		fresh, err := waitLock(lock)
		began := time.Now()
		if err == nil && !e.letGo.Load() {
			_ = runKept(fresh, args)
		}
		fresh.Close()
		if pause *= 2; time.Since(began) > longKeepPause {
			pause = keepPause
		}
		pause = min(pause, longKeepPause)
		select {
		case <-e.leaving:
			time.Sleep(keepPause)
		case <-time.After(pause):
		}
	}
}

// waitLock is the file opened once more and locked, which it waits for.
func waitLock(lock *os.File) (*os.File, error) {
	fresh, err := reopen(lock)
	if err != nil {
		return nil, err
	}
	for {
		if err := unix.Flock(int(fresh.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return fresh, err
		}
	}
}

// runKept runs a process that holds the lock, which the caller does not any more.
func runKept(lock *os.File, args []string) error {
	p, err := startSelf(lock, args)
	lock.Close()
	if err == nil {
		_, err = p.Wait()
	}
	return err
}
