package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// An upgrade in place is a death on purpose, in the same process: the daemon gives
// its devices up and execs the new program, which takes over what is on record as
// after any death. So there is one path for both. The process keeps its number, the
// lock and the socket, where callers wait meanwhile:
//
//	Reload: ask the program whether it could take over ── no: nothing has changed
//	   │ yes: the caller is told to wait
//	   v
//	give up the devices, where the driver knows how; their I/O waits from now on
//	   │
//	exec the program ── fails: exec this one ──> take over, serve, tell the pause

// reloadEnv tells the program that is exec'd what is going on: a reloading.
const reloadEnv = "UBLK_BLKSNAP_RELOAD"

// reloading is a reload that is under way, and what it hands on.
type reloading struct {
	control.Reloaded
	Socket int  `json:"socket"`           // the file descriptor of the socket, which listens
	Read   int  `json:"read,omitempty"`   // the same of the socket for readers, if there is one
	Prober int  `json:"prober"`           // the process of the program before, a child of this one
	Ending bool `json:"ending,omitempty"` // systemd has told the program before that the machine ends

	readers *net.UnixListener // what became of Read
}

// giveUpTime is how long the daemon waits for requests under way before it gives its
// devices up. Those that take longer are begun anew by the next program.
const giveUpTime = 5 * time.Second

// CheckTakeoverFlag is the flag of the daemon's command that has it say only whether
// it could take over.
const CheckTakeoverFlag = "check-takeover"

// Reload implements control.API. After it nothing is changed any more; run does the
// rest.
func (d *Daemon) Reload(ctx context.Context, r control.ReloadRequest) (control.Reloaded, error) {
	end, err := d.beginNew(ctx, "reload")
	if err != nil {
		return control.Reloaded{}, err
	}
	plan, err := d.planReload(ctx, r)
	if err != nil {
		end()
		return plan, fail(err, "reload")
	}
	return plan, nil
}

// planReload makes sure that the program could take over.
func (d *Daemon) planReload(ctx context.Context, r control.ReloadRequest) (control.Reloaded, error) {
	plan := control.Reloaded{At: time.Now().Round(0), Program: r.Program, From: control.Version}
	if plan.Program == "" {
		plan.Program = d.opts.Program
	}
	if !filepath.IsAbs(plan.Program) {
		return plan, invalid("program %q: not an absolute path", plan.Program)
	}
	if hanging := d.hangingStorage(); len(hanging) > 0 {
		return plan, &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "storage " + publicPaths(strings.Join(hanging, ", ")) + " does not answer", Fix: "try again when it does, or when the snapshot has ended"}
	}
	if running(d.opts.Prober) {
		if !d.opts.Dir.Resident() { // which has it copied
			if err := d.checkProgramPlace(plan.Program); err != nil {
				return plan, err
			}
		}
		err := checkProgram(ctx, d.opts.Prober, plan.Program, d.opts.Args)
		if err == nil && d.opts.Dir.Resident() {
			err = d.opts.Dir.copyToMemory(d.host.CopyFile, plan.Program, d.opts.ConfigPath)
		}
		if !errors.Is(err, disk.ErrGone) {
			return plan, err
		}
	}
	// Nobody can ask a program. This one needs not be asked, and begins with a prober.
	if plan.Program != d.opts.Program {
		return plan, &control.Error{Code: control.Unavailable, Errno: unix.ESRCH, Message: "the process that runs programs for the daemon is gone", Fix: "have this program take over first: ublk-blksnap daemon reload"}
	}
	return plan, nil
}

// patience is how long a store may take before a reload is refused for it.
const patience = 2 * time.Second

// hangingStorage names the storages that do not answer. The exec of a program waits for all
// that the kernel does for this process. If one of these storages holds that up, all I/O
// would wait for it, because nobody serves it by then.
func (d *Daemon) hangingStorage() (names []string) {
	first := map[*snapshot]uint64{} // how far each was at the first look
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		names = nil
		for _, s := range d.sortedSnapshots() {
			names = append(names, s.snap.Returning()...)
			d.mu.Lock()
			releasing, storage := s.releasing, slices.Clone(s.storage)
			d.mu.Unlock()
			if releasing {
				continue
			}
			_, done := s.snap.Waiting()
			if was, seen := first[s]; !seen {
				first[s] = done
			} else if was != done {
				continue // it has got on
			}
			for _, name := range s.snap.UnderWay() {
				if slices.ContainsFunc(storage, func(st control.Storage) bool { return st.Path == name }) {
					names = append(names, name)
				}
			}
		}
		if len(names) == 0 || time.Now().After(end) {
			return names
		}
	}
}

// running says whether there is a prober.
func running(p *disk.Prober) bool {
	if p == nil {
		return false
	}
	select {
	case <-p.Ended():
		return false
	default:
		return true
	}
}

// checkProgramPlace refuses a program on a disk with a filter. When it begins, it would
// have to be read through the filter, whose I/O waits for it.
func (d *Daemon) checkProgramPlace(program string) error {
	place, err := d.host.OpenPlace(program)
	if err != nil {
		return fail(err, "program %s", program)
	}
	defer place.Close()
	for _, dev := range d.sortedDevices() {
		if lies, err := d.host.LiesOn(place, dev.disk.Num, d.lowerDisks); lies && err == nil {
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Fix: "put it on another disk",
				Message: fmt.Sprintf("program %s: lies on %s, which has the filter %s, and could not be read while that waits for it", program, dev.Original, dev.Name)}
		}
	}
	return nil
}

// checkProgram asks a program whether it could take over, with the daemon's arguments.
func checkProgram(ctx context.Context, p *disk.Prober, program string, args []string) error {
	ran, err := p.Run(ctx, disk.Command{Path: program, Args: slices.Concat([]string{"ublk-blksnap"}, args, []string{"--" + CheckTakeoverFlag})})
	refused := func(why string) error {
		return &control.Error{Code: control.Invalid, Errno: unix.ENOEXEC, Message: fmt.Sprintf("%s cannot take over: %s", program, why), Fix: "nothing has changed: the daemon goes on as it is"}
	}
	switch {
	case errors.Is(err, disk.ErrCannotRun):
		return refused(err.Error())
	case err != nil:
		return err
	case ran.Status != 0:
		return refused(strings.TrimPrefix(strings.TrimSpace(ran.Said), "ublk-blksnap: "))
	}
	if t, err := parseTakeover(ran.Out); err != nil {
		return refused(fmt.Sprintf("it says %q", strings.TrimSpace(ran.Out)))
	} else if t.Format < stateFormat {
		return refused(fmt.Sprintf("it knows state of format %d, this is format %d", t.Format, stateFormat))
	}
	return nil
}

// GiveUp implements stopper.
func (d *Daemon) GiveUp(ctx context.Context) (quiesced int, err error) {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	// All at once: a request to one may wait for what the queue of another has to do.
	for _, dev := range d.served() {
		wg.Add(1)
		go func() {
			defer wg.Done()
			done, err := dev.GiveUp(ctx)
			mu.Lock()
			defer mu.Unlock()
			if done {
				quiesced++
			}
			if err != nil {
				errs = append(errs, err)
			}
		}()
	}
	wg.Wait()
	return quiesced, errors.Join(errs...)
}

// exec is the end of this program in the process. It returns only if neither the new
// program nor this one can be exec'd. At its last instant it asks whether the machine ends.
// reading is the socket for readers, nil if there is none.
func (o *Options) exec(d stopper, lock, socket, reading *os.File, plan control.Reloaded, ending func() bool) error {
	setWatchdog(o.Config.patience())
	asked, prober := running(o.Prober), 0
	// Now, because its path may lead through a filter.
	var program *os.File
	var err error
	if asked {
		path := plan.Program
		if o.Dir.Resident() {
			path, err = o.Dir.useCopies()
		}
		if err == nil {
			program, err = o.host().Open(path, unix.O_PATH, 0)
		}
		limited, cancel := context.WithTimeout(context.Background(), giveUpTime)
		_ = o.Prober.LetGo(limited) // the next program has a prober of its own
		cancel()
		prober = o.Prober.PID()
		o.Prober.Close()
	}
	limited, cancel := context.WithTimeout(context.Background(), giveUpTime)
	defer cancel()
	plan.Began = time.Now().Round(0)
	var givenUp error
	if plan.Quiesced, givenUp = d.GiveUp(limited); givenUp != nil {
		o.Log.Warn("not all devices could be given up before the reload: the kernel takes them back", "error", givenUp)
	}
	held, lockErr := handLock(lock)
	if lockErr != nil {
		return lockErr
	}
	defer runtime.KeepAlive([]*os.File{socket, reading})
	next := reloading{Socket: int(socket.Fd()), Prober: prober}
	if _, err := unix.FcntlInt(socket.Fd(), unix.F_SETFD, 0); err != nil {
		return fail(err, "hand the socket on")
	}
	if reading != nil {
		if _, err := unix.FcntlInt(reading.Fd(), unix.F_SETFD, 0); err == nil {
			next.Read = int(reading.Fd())
		}
	}
	env := slices.DeleteFunc(os.Environ(), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains([]string{programEnv, lockEnv, reloadEnv}, name)
	})
	try := func(path string) error {
		next.Reloaded, next.Ending = plan, ending()
		text, err := json.Marshal(next)
		if err != nil {
			return err
		}
		return unix.Exec(path, append([]string{"ublk-blksnap"}, o.Args...), append(slices.Clone(env), programEnv+"="+plan.Program, held, reloadEnv+"="+string(text)))
	}
	// The thread that execs becomes the process, with all that is its own.
	runtime.LockOSThread()
	if !asked { // it is this one
		return try("/proc/self/exe")
	}
	if err == nil {
		err = try(fmt.Sprintf("/proc/self/fd/%d", program.Fd()))
	}
	// Nothing of the process is lost yet but its devices, which this program takes over.
	plan.Error = fmt.Sprintf("exec %s: %v", plan.Program, err)
	plan.Program = o.Program
	return try("/proc/self/exe")
}

// end completes the report of a reload: all is served again, as the program now says.
func (r *reloading) end(log *Log, now control.Info) *control.Reloaded {
	r.To = control.Version
	r.Images = max(time.Since(r.Began), 0)
	r.Pause = r.Images
	if served := now.Recovered; served != nil {
		r.Images = max(served.At.Sub(r.Began), 0)
		r.Pause = max(r.Images-served.Images+served.Pause, 0)
	}
	if r.Error != "" {
		log.Error("the reload failed: this program goes on", "error", r.Error, "pause", r.Pause)
	} else {
		log.Info("reloaded", "program", r.Program, "from", r.From, "to", r.To, "pause", r.Pause, "images", r.Images, "quiesced", r.Quiesced)
	}
	return &r.Reloaded
}

// takeReload is the reload of which this program is the end, nil if there is none, and
// the socket that it was handed.
func takeReload() (*reloading, *net.UnixListener, error) {
	text := os.Getenv(reloadEnv)
	if text == "" {
		return nil, nil, nil
	}
	_ = os.Unsetenv(reloadEnv)
	var r reloading
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return nil, nil, fail(err, "read what the daemon has handed on")
	}
	if r.Prober > 0 {
		go func() { _, _ = unix.Wait4(r.Prober, nil, 0, nil) }() // if it took its time
	}
	var failed error
	if r.Read > 0 {
		r.readers, failed = takeSocket(r.Read)
	}
	l, err := takeSocket(r.Socket)
	return &r, l, errors.Join(err, failed)
}

// takeSocket is the listening socket that the program before has handed on.
func takeSocket(fd int) (*net.UnixListener, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fail(err, "take the socket")
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, errors.New("take the socket: it is another kind of socket")
	}
	return u, nil
}

// renewInterval is the time between two reloads for want of a prober, at least.
const renewInterval = 10 * time.Second

// renewProber has this program begin anew in its process when its prober has been
// killed: only before there is a disk to serve can it start one. While it cannot, it is tried
// again, at an interval.
func renewProber(ctx context.Context, log *Log, ended <-chan struct{}, interval time.Duration, reload func() error) {
	again := time.NewTicker(interval)
	defer again.Stop()
	select {
	case <-ctx.Done():
		return
	case <-ended:
	}
	for told := false; ; told = true {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
		if !told {
			log.Error("the process that asks blkid and keeps the guard has been killed: this program begins anew, to start another")
		}
		err := reload()
		if err == nil || ctx.Err() != nil {
			return
		}
		if !told {
			log.Error("no reload, which is tried again and again", "error", err)
		}
	}
}
