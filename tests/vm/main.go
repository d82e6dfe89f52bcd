// Command vm runs a command as root in a virtual machine with a stock Debian kernel, on the file tree of the host.
//
//	vm [flags] COMMAND [ARGUMENT…]
//
// One word is a line for bash, several are a program and its arguments. The command starts in the current directory,
// which the guest shows at the same path; what it writes is lost, except below the directory $VM_OUT. Its output and
// exit status become vm's own; vm's status is 124 if the time was up, 125 if the machine did not work, and 123 if
// the command ended before a kill that was asked for. After such a kill it is 0.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/tests/vm/machine"
)

// Exit statuses of our own.
const (
	statusNotKilled = 123
	statusTimeout   = 124
	statusBroken    = 125
)

func main() {
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(status)
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run(args []string) (status int, err error) {
	var (
		cfg              machine.Config
		disks, files, ev list
		killAfter        time.Duration
		killOn, console  string
		where            string
		fetch, noSkips   bool
	)
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	flags.StringVar(&cfg.Kernel, "kernel", env("KERNEL", "6.12"), `kernel: "newest" or a version such as 6.12 (KERNEL)`)
	flags.StringVar(&cfg.Accel, "accel", env("VM_ACCEL", ""), "kvm or tcg; kvm where a trial boot works, if empty (VM_ACCEL)")
	flags.StringVar(&cfg.Cache, "cache", env("VM_CACHE", ".cache/vm"), "directory for kernels (VM_CACHE)")
	flags.StringVar(&cfg.Out, "out", env("VM_OUT", ""), "directory that the command may write to; cache/out, if empty (VM_OUT)")
	flags.BoolVar(&cfg.Udev, "udev", env("VM_UDEV", "") != "", "run udev in the guest (VM_UDEV)")
	flags.StringVar(&where, "where", env("VM", "machine"), "machine; host, which must have ublk; or auto, host if it has (VM)")
	flags.BoolVar(&noSkips, "no-skips", false, "fail if the output tells of a skipped Go test that does not say \""+allowedSkip+"\"")
	flags.BoolVar(&fetch, "fetch", false, "fetch the kernel, print its release, and end")
	flags.StringVar(&console, "console", env("VM_CONSOLE", ""), "file for the kernel's messages (VM_CONSOLE)")
	flags.Var(&disks, "disk", "NAME=SIZE: new disk at /dev/disk/by-vm/NAME, gone afterwards; size in bytes, or with K, M, G, T")
	flags.Var(&files, "disk-file", "[NAME=]PATH[:SIZE]: disk image that stays; made if missing and SIZE is given")
	flags.Var(&ev, "e", "NAME or NAME=VALUE: environment of the command")
	flags.DurationVar(&killAfter, "kill-after", 0, "kill the machine this long after the command has started")
	flags.StringVar(&killOn, "kill-on", "", "kill the machine as soon as the command prints a line with this text")
	flags.Func("mem", "memory of the guest in MiB, or with M or G (VM_MEM; 4G)", func(s string) error { return setMem(&cfg, s) })
	flags.IntVar(&cfg.CPUs, "cpus", 0, "processors of the guest (VM_CPUS; 2)")
	flags.DurationVar(&cfg.Timeout, "timeout", 0, "limit for the whole run (VM_TIMEOUT; 20m)")
	if err := envFlags(flags, map[string]string{"mem": "VM_MEM", "cpus": "VM_CPUS", "timeout": "VM_TIMEOUT"}); err != nil {
		return statusBroken, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 20 * time.Minute
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0, nil
	case err != nil:
		return statusBroken, nil // flag has told
	}
	if cfg.Cache, err = filepath.Abs(cfg.Cache); err != nil {
		return statusBroken, err
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if fetch {
		kernel, err := machine.Fetch(ctx, cfg.Cache, cfg.Kernel)
		if err != nil {
			return statusBroken, err
		}
		fmt.Println(kernel.Release)
		return 0, nil
	}
	if cfg.Command = flags.Args(); len(cfg.Command) == 0 {
		return statusBroken, errors.New("no command given; see vm -help")
	}
	if cfg.Dir, err = os.Getwd(); err != nil {
		return statusBroken, fmt.Errorf("find current directory: %w", err)
	}
	if cfg.Dir, err = filepath.EvalSymlinks(cfg.Dir); err != nil {
		return statusBroken, fmt.Errorf("find current directory: %w", err)
	}
	if cfg.Out == "" {
		cfg.Out = filepath.Join(cfg.Cache, "out")
	}
	if cfg.Out, err = filepath.Abs(cfg.Out); err != nil {
		return statusBroken, err
	}
	if err := os.MkdirAll(cfg.Out, 0o755); err != nil {
		return statusBroken, fmt.Errorf("create output directory: %w", err)
	}
	cfg.Env = machine.Env()
	for _, v := range ev {
		if !strings.Contains(v, "=") {
			v += "=" + os.Getenv(v)
		}
		cfg.Env = append(cfg.Env, v)
	}
	cfg.Stdout, cfg.Stderr = os.Stdout, os.Stderr
	judge := &skips{to: os.Stdout}
	if noSkips {
		cfg.Stdout = judge
		defer func() {
			if status == 0 && err == nil {
				if err = judge.err(); err != nil {
					status = 1
				}
			}
		}()
	}
	switch where {
	case "machine":
	case "host", "auto":
		if hasUblk() {
			return runHere(ctx, cfg)
		}
		if where == "host" {
			return statusBroken, errors.New("this machine's kernel has no ublk (modprobe ublk_drv failed)")
		}
	default:
		return statusBroken, fmt.Errorf("where %q: want machine, host or auto", where)
	}

	for _, d := range disks {
		disk, err := newDisk(d)
		if err != nil {
			return statusBroken, err
		}
		defer disk.close()
		cfg.Disks = append(cfg.Disks, disk.Disk)
	}
	for i, f := range files {
		disk, err := keptDisk(f, i)
		if err != nil {
			return statusBroken, err
		}
		cfg.Disks = append(cfg.Disks, disk)
	}

	var log bytes.Buffer
	cfg.Console = &log
	if console != "" {
		f, err := os.Create(console)
		if err != nil {
			return statusBroken, fmt.Errorf("create console log: %w", err)
		}
		defer f.Close()
		cfg.Console = f
	}

	kill := make(chan struct{}, 1)
	if killOn != "" {
		cfg.Stdout = &watcher{to: cfg.Stdout, text: killOn, seen: kill}
	}
	m, err := machine.Start(ctx, cfg)
	if err != nil {
		return statusBroken, err
	}
	ended := make(chan struct{})
	killed := make(chan bool, 1)
	go func() {
		var after <-chan time.Time
		if killAfter > 0 {
			select {
			case <-m.Running():
				after = time.After(killAfter)
			case <-ended:
			}
		}
		select {
		case <-kill:
			m.Kill()
			killed <- true
		case <-after:
			m.Kill()
			killed <- true
		case <-ended:
			killed <- false
		}
	}()
	status, err = m.Wait()
	close(ended)
	byUs := <-killed
	switch {
	case errors.Is(err, machine.ErrKilled) && byUs:
		return 0, nil
	case errors.Is(err, machine.ErrKilled):
		return statusBroken, errors.New("interrupted")
	case errors.Is(err, machine.ErrTimeout):
		return statusTimeout, err
	case err != nil:
		if log.Len() > 0 {
			err = fmt.Errorf("%w%s", err, keepLog(cfg.Cache, log.Bytes()))
		}
		return statusBroken, err
	case killOn != "" || killAfter > 0:
		return statusNotKilled, fmt.Errorf("the command ended with status %d before the kill", status)
	}
	return status, nil
}

// keepLog saves the console's messages of a machine that died and says where.
func keepLog(cache string, log []byte) string {
	name := filepath.Join(cache, "console.log")
	if err := os.WriteFile(name, log, 0o644); err != nil {
		return ""
	}
	return "\nall of the console: " + name
}

// hasUblk says whether this machine's own kernel can do it.
func hasUblk() bool {
	if _, err := os.Stat("/dev/ublk-control"); err == nil {
		return true
	}
	return exec.Command("modprobe", "ublk_drv").Run() == nil
}

// runHere runs the command without a machine.
func runHere(ctx context.Context, cfg machine.Config) (status int, err error) {
	words := cfg.Command
	if len(words) == 1 {
		words = []string{"bash", "-c", words[0]}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.Timeout, machine.ErrTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Env = append(os.Environ(), append(cfg.Env, "VM_OUT="+cfg.Out)...)
	cmd.Stdout, cmd.Stderr = cfg.Stdout, cfg.Stderr
	// The whole group ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.Is(context.Cause(ctx), machine.ErrTimeout):
		return statusTimeout, fmt.Errorf("%w after %v", machine.ErrTimeout, cfg.Timeout)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	}
	return statusBroken, err
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// envFlags sets flags from the environment; the command line, parsed later, overrides them.
func envFlags(flags *flag.FlagSet, names map[string]string) error {
	for name, variable := range names {
		if value := os.Getenv(variable); value != "" {
			if err := flags.Set(name, value); err != nil {
				return fmt.Errorf("%s=%s: %w", variable, value, err)
			}
		}
	}
	return nil
}

func setMem(cfg *machine.Config, s string) error {
	if n, err := strconv.Atoi(s); err == nil {
		cfg.MemMiB = n
		return nil
	}
	n, err := parseSize(s)
	cfg.MemMiB = int(n >> 20)
	return err
}

// parseSize reads a number of bytes with an optional binary unit.
func parseSize(s string) (int64, error) {
	m := regexp.MustCompile(`^(\d+)([KMGT]?)$`).FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("size %q: want a number of bytes, or one with K, M, G or T", s)
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q: %w", s, err)
	}
	return n << (10 * (strings.Index("KMGT", m[2]) + 1) * min(1, len(m[2]))), nil
}

// scratch is a disk image without a name.
type scratch struct {
	machine.Disk
	image *os.File
}

func (s *scratch) close() { s.image.Close() }

func newDisk(spec string) (*scratch, error) {
	name, size, ok := strings.Cut(spec, "=")
	if !ok {
		return nil, fmt.Errorf("disk %q: want NAME=SIZE", spec)
	}
	n, err := parseSize(size)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp("", "vm-disk-")
	if err != nil {
		return nil, fmt.Errorf("create disk: %w", err)
	}
	os.Remove(f.Name()) // QEMU reaches it through our descriptor
	if err := f.Truncate(n); err != nil {
		f.Close()
		return nil, fmt.Errorf("create disk: %w", err)
	}
	file := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	return &scratch{machine.Disk{Name: name, File: file}, f}, nil
}

func keptDisk(spec string, i int) (machine.Disk, error) {
	disk := machine.Disk{Name: fmt.Sprintf("file%d", i), File: spec}
	if name, file, ok := strings.Cut(spec, "="); ok {
		disk.Name, disk.File = name, file
	}
	if m := regexp.MustCompile(`^(.*):(\d+[KMGT]?)$`).FindStringSubmatch(disk.File); m != nil {
		disk.File = m[1]
		if _, err := os.Stat(disk.File); errors.Is(err, os.ErrNotExist) {
			size, err := parseSize(m[2])
			if err != nil {
				return disk, err
			}
			f, err := os.Create(disk.File)
			if err != nil {
				return disk, fmt.Errorf("create disk: %w", err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				return disk, fmt.Errorf("create disk: %w", err)
			}
		}
	}
	if _, err := os.Stat(disk.File); err != nil {
		return disk, fmt.Errorf("open disk: %w", err)
	}
	return disk, nil
}

// watcher passes its input on and tells once when a line with text has gone by.
type watcher struct {
	to   io.Writer
	text string
	seen chan<- struct{}
	line []byte
}

func (w *watcher) Write(p []byte) (int, error) {
	w.line = append(w.line, p...)
	for {
		end := bytes.IndexByte(w.line, '\n')
		if end < 0 {
			break
		}
		if w.seen != nil && bytes.Contains(w.line[:end], []byte(w.text)) {
			w.seen <- struct{}{}
			w.seen = nil
		}
		w.line = w.line[end+1:]
	}
	return w.to.Write(p)
}
