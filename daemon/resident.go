package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// A resident daemon can serve the very volume that its program and its configuration lie on,
// as those of the machine's root filesystem do. When it dies, all I/O of that volume waits for
// the next daemon, which must be started without any: systemd cannot, nor can a shell, because
// they would have to be read. So the program and the configuration are copied to the state
// directory, which is memory that is never swapped. The daemon, its prober and its guard run
// from there, and the guard starts the next daemon under systemd too:
//
//	daemon (copy) ──dies──> guard (copy) starts the next daemon (copy), which takes over
//	     │                                                             ^
//	     └──> systemd starts /usr/sbin/ublk-blksnap, which can be read │ by now, and
//	          names that daemon to systemd as the unit's main process ─┘
//
// A program that is started while a resident daemon has left something goes on as the copy
// before it takes the lock: it might be stopped in the middle, for want of its next page.

const (
	residentName       = stateName + "/program"
	residentConfigName = stateName + "/config"
)

// Resident says whether this process runs from the copy of its program in the state
// directory.
func (d RunDir) Resident() bool {
	var own, state unix.Stat_t
	err := errors.Join(unix.Stat("/proc/self/exe", &own), unix.Stat(d.State(), &state))
	mounted, _ := isMountPoint(d.State())
	return err == nil && mounted && own.Dev == state.Dev
}

// ConfigFile is where the configuration of path is read from: a resident daemon has a copy,
// which is as old as its start or the last reload.
func (d RunDir) ConfigFile(path string) string {
	if d.Resident() {
		return d.path(residentConfigName)
	}
	return path
}

// GoOnResident goes on as the copy of the program, if a resident daemon has left something
// that waits. It returns if not, or if that cannot be.
func (d RunDir) GoOnResident() error {
	if os.Getenv(namespaceEnv) != "" || d.Resident() {
		return nil
	}
	r, err := d.startRecord()
	if err != nil || r.Installed == "" || !d.survivors() {
		return nil //nolint:nilerr // there is none
	}
	beResident()
	return fail(unix.Exec(d.path(residentName), os.Args, os.Environ()), "go on as %s", d.path(residentName))
}

// ownProgram is the program of this process, even if its file has been replaced.
const ownProgram = "/proc/self/exe"

// copyFile is disk.Host.CopyFile as this process sees the files.
func copyFile(from, to string, mode os.FileMode) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() && from != os.DevNull {
		return fmt.Errorf("%s is no file, which could be read again", from)
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return disk.ReplaceFile(to, f, mode)
}

// beResident is called before this process goes on as the copy of the program. Without a time
// zone that would read /etc/localtime before all else.
func beResident() { _ = os.Setenv("TZ", "UTC") }

// nextCopy is the end of the name of a copy that no daemon uses yet.
const nextCopy = ".next"

// copyToMemory has a program, and the configuration that it is to have, copied to the state
// directory, beside those in use. A configuration that is not there is an empty one.
func (d RunDir) copyToMemory(byHost func(from, to string, mode os.FileMode) error, program, config string) error {
	for _, f := range []struct {
		from, to string
		mode     os.FileMode
	}{{program, residentName, 0o700}, {config, residentConfigName, 0o600}} {
		begun, _ := filepath.Glob(d.path(f.to) + nextCopy + "*") // by one that has died meanwhile
		for _, path := range begun {
			_ = os.Remove(path)
		}
		by := byHost
		if f.from == ownProgram {
			by = copyFile
		}
		err := by(f.from, d.path(f.to)+nextCopy, f.mode)
		if f.from == config && errors.Is(err, os.ErrNotExist) {
			err = copyFile(os.DevNull, d.path(f.to)+nextCopy, f.mode)
		}
		if err != nil {
			return fail(err, "copy %s to memory", f.from)
		}
	}
	return nil
}

// useCopies puts the copies in the place of those in use, the program first: it may know
// parameters that the one before does not.
func (d RunDir) useCopies() (program string, err error) {
	for _, name := range []string{residentName, residentConfigName} {
		if err := os.Rename(d.path(name)+nextCopy, d.path(name)); err != nil {
			return "", fail(err, "use what was copied to memory")
		}
	}
	return d.path(residentName), nil
}

// makeResident is both.
func (d RunDir) makeResident(byHost func(from, to string, mode os.FileMode) error, program, config string) (string, error) {
	if err := d.copyToMemory(byHost, program, config); err != nil {
		return "", err
	}
	return d.useCopies()
}

// endOtherGuard ends a guard that has its program from elsewhere, so that the prober starts a
// resident one; needs the daemon's lock.
func (d RunDir) endOtherGuard() {
	var state, program unix.Stat_t
	if unix.Stat(d.State(), &state) != nil {
		return
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range processes {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			continue
		}
		var owner unix.Stat_t
		if unix.Stat(p, &owner) != nil || owner.Uid != 0 {
			continue // it may have its program on a filesystem that it serves itself
		}
		fd, err := unix.PidfdOpen(pid, 0) // first, so that it is the process that is looked at
		if err != nil {
			continue
		}
		// Whoever reads the command line of a process that is just being read from a disk waits
		// for that.
		name, _ := os.ReadFile(filepath.Join(p, "comm"))
		if string(name) == guardName+"\n" && unix.Stat(filepath.Join(p, "exe"), &program) == nil && program.Dev != state.Dev {
			args, _ := os.ReadFile(filepath.Join(p, "cmdline"))
			if bytes.Contains(args, []byte("\x00"+GuardCommand+"\x00--run-dir\x00"+string(d)+"\x00")) {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
		}
		unix.Close(fd)
	}
}

// serviceEnv is what systemd tells a service, and a daemon that a guard starts has to know
// too.
var serviceEnv = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC"}

// residentEnvironment is what the next daemon has to have from this process.
func residentEnvironment() []string {
	env := []string{"TZ=UTC"}
	for _, name := range serviceEnv {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// ErrNoHandOver: the daemon that runs is none that the service's start could hand over to.
var ErrNoHandOver = errors.New("the daemon that runs is no resident one of this service")

// HandOver tells systemd, which has started this process as the unit's, that the resident
// daemon that runs already is the unit's main process. It waits until that answers, for as
// long as a process has the daemon's lock.
func HandOver(ctx context.Context, dir RunDir) error {
	r, err := dir.startRecord()
	if err != nil || r.Installed == "" || !slices.Contains(r.Env, "NOTIFY_SOCKET="+os.Getenv("NOTIFY_SOCKET")) {
		return errors.Join(ErrNoHandOver, err) // it would not tell systemd that it lives
	}
	c := control.NewClient(dir.Socket())
	defer c.Close()
	for {
		if held, err := dir.holds(lockName); err != nil || !held {
			return errors.Join(errors.New("the daemon that ran has died"), err)
		}
		limited, cancel := context.WithTimeout(ctx, time.Second)
		info, err := c.Info(limited)
		cancel()
		if err == nil && info.PID > 0 {
			notify(fmt.Sprintf("MAINPID=%d\nREADY=1", info.PID))
			return nil
		}
		notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", startStep.Microseconds()))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// holds says whether a process holds a lock of the run directory.
func (d RunDir) holds(name string) (bool, error) {
	lock, err := d.file(name, os.O_RDWR, 0)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// checkResident says why no daemon could follow this one while the volume waited that its
// program lies on.
func (d *Daemon) checkResident() error {
	if !d.opts.Dir.Resident() || !running(d.opts.Prober) {
		return errors.New("a daemon that takes over could not read it")
	}
	if held, err := d.opts.Dir.holds(guardLockName); err != nil || !held {
		return errors.Join(errors.New("the process that would start the next daemon does not run"), err)
	}
	return nil
}

// residentFix is the way out of that.
func (d *Daemon) residentFix() string {
	config := d.opts.ConfigPath
	if config == "" {
		config = DefaultConfigPath
	}
	return "set resident = true in " + filepath.Clean(config) + ", then: ublk-blksnap daemon reload"
}
