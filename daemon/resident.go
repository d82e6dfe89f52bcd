package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// makeResident has a program, and the configuration that it is to have, copied to the state
// directory. A configuration that is not there is an empty one.
func (d RunDir) makeResident(byHost func(from, to string, mode os.FileMode) error, program, config string) (path string, err error) {
	for _, f := range []struct {
		from, to string
		mode     os.FileMode
	}{{config, residentConfigName, 0o600}, {program, residentName, 0o700}} {
		begun, _ := filepath.Glob(d.path(f.to) + ".*") // by one that has died meanwhile
		for _, path := range begun {
			_ = os.Remove(path)
		}
		to := byHost
		if f.from == ownProgram {
			to = copyFile
		}
		err := to(f.from, d.path(f.to), f.mode)
		if f.from == config && errors.Is(err, os.ErrNotExist) {
			err = copyFile(os.DevNull, d.path(f.to), f.mode)
		}
		if err != nil {
			return "", fail(err, "copy %s to memory", f.from)
		}
	}
	return d.path(residentName), nil
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

// HandOver tells systemd, which has started this process as the unit's, that the resident
// daemon that runs already is the unit's main process. It waits until that answers.
func HandOver(ctx context.Context, dir RunDir) error {
	r, err := dir.startRecord()
	if err != nil || r.Installed == "" {
		return errors.Join(errors.New("the daemon that runs is not resident"), err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c := control.NewClient(dir.Socket())
	defer c.Close()
	for {
		info, err := c.Info(ctx)
		if err == nil && info.PID > 0 {
			notify(fmt.Sprintf("MAINPID=%d\nREADY=1", info.PID))
			return nil
		}
		select {
		case <-ctx.Done():
			return fail(errors.Join(ctx.Err(), err), "wait for the daemon that the guard has started")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// checkResident says why no daemon could follow this one while the volume waited that its
// program lies on.
func (d *Daemon) checkResident() error {
	if d.opts.Dir.Resident() && running(d.opts.Prober) {
		return nil
	}
	return errors.New("a daemon that takes over could not read it")
}

// residentFix is the way out of that.
func (d *Daemon) residentFix() string {
	config := d.opts.ConfigPath
	if config == "" {
		config = DefaultConfigPath
	}
	return "set resident = true in " + filepath.Clean(config) + ", then: ublk-blksnap daemon reload"
}
