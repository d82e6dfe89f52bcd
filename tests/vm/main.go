// Command vm runs a command as root in a virtual machine with a stock Debian kernel, on the file tree of the host.
//
//	vm [flags] COMMAND [ARGUMENT…]
//
// If COMMAND is one word, it is a line for bash. Several words are a program and its arguments. The command starts in the
// current directory, which the guest shows at the same path. What the command writes is lost, except below the directory
// $VM_OUT. Its output and exit status become vm's own. Otherwise vm's status is 124 if the time was up, 125 if the machine
// did not work, and 130 if vm was interrupted. If a kill was asked for, the status is 0 after the kill, and 123 if the
// command ended before it.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/tests/vm/machine"
)

// Exit statuses of our own.
const (
	statusNotKilled   = 123
	statusTimeout     = 124
	statusBroken      = 125
	statusInterrupted = 130
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(status)
}

// options is what the command line and the environment ask for.
type options struct {
	machine.Config
	env       list          // of the command, on top of machine.Env
	newDisks  list          // NAME=SIZE
	files     list          // [NAME=]PATH[:SIZE][,volatile]
	killAfter time.Duration // no kill if zero
	killOn    string        // no kill if empty
	console   string
	where     string
	fetch     bool
	noSkips   bool
	again     bool
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// parse reads the command line on top of the environment. Its error is flag.ErrHelp if only help was wanted.
func parse(args []string) (*options, error) {
	o := &options{}
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	flags.StringVar(&o.Kernel, "kernel", env("KERNEL", "6.12"), `"newest" or a version such as 6.12 (KERNEL)`)
	flags.StringVar(&o.Accel, "accel", env("VM_ACCEL", ""), "kvm or tcg; kvm where a trial boot works, if empty (VM_ACCEL)")
	flags.StringVar(&o.Cache, "cache", env("VM_CACHE", ""), "directory for kernels; .cache/vm of the module, if empty (VM_CACHE)")
	flags.StringVar(&o.Out, "out", env("VM_OUT", ""), "directory that the command may write to; cache/out, if empty (VM_OUT)")
	flags.BoolVar(&o.Udev, "udev", env("VM_UDEV", "") != "", "run udev in the guest (VM_UDEV)")
	flags.BoolVar(&o.Systemd, "systemd", env("VM_SYSTEMD", "") != "", "run the command under systemd, as a service (VM_SYSTEMD)")
	flags.BoolVar(&o.FineTimers, "fine-timers", false, "have timers exact to the microsecond with emulated processors too, for what measures times")
	flags.StringVar(&o.Root, "root", "", "disk image with a Debian that is booted instead of the host's tree; made if missing")
	flags.StringVar(&o.where, "where", env("VM", "machine"), "machine; host, which must have ublk; or auto, host if it has (VM)")
	flags.BoolVar(&o.noSkips, "no-skips", false, fmt.Sprintf("fail if the output tells of a skipped Go test that does not say one of %q, or of no test at all", allowedSkips))
	flags.BoolVar(&o.again, "again", false, "run the command again, from its start, if an emulated processor ended the machine by a fault of its own")
	flags.BoolVar(&o.fetch, "fetch", false, "fetch the kernel, print its release, and end")
	flags.StringVar(&o.console, "console", env("VM_CONSOLE", ""), "file for the kernel's messages (VM_CONSOLE)")
	flags.Var(&o.newDisks, "disk", "NAME=SIZE: new disk at /dev/disk/by-vm/NAME, gone afterwards; size in bytes, or with K, M, G, T")
	flags.Var(&o.files, "disk-file", "[NAME=]PATH[:SIZE][,volatile]: disk image that stays; made if missing and SIZE is given; a volatile one loses what was not flushed")
	flags.Var(&o.env, "e", "NAME or NAME=VALUE: environment of the command")
	flags.DurationVar(&o.killAfter, "kill-after", 0, "kill the machine this long after the command has started")
	flags.StringVar(&o.killOn, "kill-on", "", "kill the machine as soon as the command prints a line with this text")
	flags.Func("mem", "memory of the guest in MiB, or with M or G (VM_MEM; 4G)", func(s string) error { return setMem(&o.Config, s) })
	flags.IntVar(&o.CPUs, "cpus", 2, "processors of the guest (VM_CPUS)")
	flags.DurationVar(&o.Timeout, "timeout", 20*time.Minute, "limit for the whole run (VM_TIMEOUT)")
	for name, variable := range map[string]string{"mem": "VM_MEM", "cpus": "VM_CPUS", "timeout": "VM_TIMEOUT"} {
		if value := os.Getenv(variable); value != "" {
			if err := flags.Set(name, value); err != nil {
				return nil, fmt.Errorf("%s=%s: %w", variable, value, err)
			}
		}
	}
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	o.Command = flags.Args()
	switch {
	case len(o.Command) == 0 && !o.fetch:
		return nil, errors.New("no command given; see vm -help")
	case o.where != "machine" && o.where != "host" && o.where != "auto":
		return nil, fmt.Errorf("where %q: want machine, host or auto", o.where)
	}
	for i, v := range o.env {
		if !strings.Contains(v, "=") {
			o.env[i] = v + "=" + os.Getenv(v)
		}
	}
	return o, o.resolve()
}

// resolve makes every path absolute: the guest has the same ones.
func (o *options) resolve() (err error) {
	if o.Dir, err = os.Getwd(); err != nil {
		return fmt.Errorf("find current directory: %w", err)
	}
	if o.Dir, err = filepath.EvalSymlinks(o.Dir); err != nil {
		return fmt.Errorf("find current directory: %w", err)
	}
	o.Tree = moduleRoot(o.Dir)
	if o.Cache == "" {
		o.Cache = filepath.Join(o.Tree, ".cache/vm")
	}
	if o.Cache, err = filepath.Abs(o.Cache); err != nil {
		return fmt.Errorf("find cache: %w", err)
	}
	if o.Out == "" {
		o.Out = filepath.Join(o.Cache, "out")
	}
	if o.Root != "" {
		if o.Root, err = filepath.Abs(o.Root); err != nil {
			return fmt.Errorf("find root: %w", err)
		}
	}
	if o.Out, err = filepath.Abs(o.Out); err != nil {
		return fmt.Errorf("find output directory: %w", err)
	}
	if err := os.MkdirAll(o.Out, 0o755); err != nil {
		return fmt.Errorf("create output directory: %w", err)
	}
	return nil
}

// moduleRoot is the directory of the Go module that dir lies in, or dir.
func moduleRoot(dir string) string {
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
		if d == filepath.Dir(d) {
			return dir
		}
	}
}

func run(ctx context.Context, args []string) (status int, err error) {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0, nil
	} else if err != nil {
		return statusBroken, err
	}
	if o.fetch {
		kernel, err := machine.Fetch(ctx, o.Cache, o.Kernel)
		if err != nil {
			return statusBroken, err
		}
		fmt.Println(kernel.Release)
		return 0, nil
	}

	o.Stdout, o.Stderr = os.Stdout, os.Stderr
	judge := &skips{to: os.Stdout}
	if o.noSkips {
		o.Stdout = judge
	}
	switch here := o.where != "machine" && hasUblk(); {
	case here:
		o.Env = append(os.Environ(), append(o.env, "UBLK_BLKSNAP_VM=1", "VM_OUT="+o.Out)...)
		status, err = runHere(ctx, o.Config)
	case o.where == "host":
		return statusBroken, errors.New("this machine's kernel has no ublk (modprobe ublk_drv failed)")
	default:
		o.Env = append(machine.Env(), o.env...)
		status, err = o.boot(ctx)
	}
	if status == 0 && err == nil && o.noSkips {
		if err = judge.err(); err != nil {
			status = 1
		}
	}
	return status, err
}

// tries is how often a command is started. A machine that dies before it says nothing of the command, and under -again
// neither does one that dies of machine.ErrStale.
const tries = 3

// boot runs the command in a machine.
func (o *options) boot(ctx context.Context) (status int, err error) {
	for i, spec := range o.files {
		disk, err := keptDisk(spec, i)
		if err != nil {
			return statusBroken, err
		}
		o.Disks = append(o.Disks, disk)
	}
	if _, err := os.Stat(o.Root); o.Root != "" && errors.Is(err, os.ErrNotExist) {
		if err := machine.MakeRoot(ctx, o.Cache, o.Root); err != nil {
			return statusBroken, err
		}
	}
	var log bytes.Buffer
	o.Config.Console = &log
	if o.console != "" {
		f, err := os.Create(o.console)
		if err != nil {
			return statusBroken, fmt.Errorf("create console log: %w", err)
		}
		defer f.Close()
		o.Config.Console = f
	}

	for n := 1; ; n++ {
		log.Reset()
		ran := false
		status, ran, err = o.bootOnce(ctx)
		innocent := errors.Is(err, machine.ErrDied) && !ran || errors.Is(err, machine.ErrStale) && o.again
		if !innocent || n == tries {
			break
		}
		fmt.Fprintf(os.Stderr, "vm: %v\nvm: tried again, for the %s time\n", err, []string{"second", "third"}[n-1])
	}
	if errors.Is(err, machine.ErrDied) {
		err = fmt.Errorf("%w%s", err, keepLog(o.Cache, log.Bytes()))
	}
	return status, err
}

// bootOnce is boot without a second try; ran says whether the command began.
func (o *options) bootOnce(ctx context.Context) (status int, ran bool, err error) {
	cfg := o.Config
	cfg.Disks = slices.Clip(cfg.Disks)
	for _, spec := range o.newDisks {
		disk, err := newDisk(spec)
		if err != nil {
			return statusBroken, false, err
		}
		defer disk.close()
		cfg.Disks = append(cfg.Disks, disk.Disk)
	}
	marked := make(chan struct{}, 1)
	if o.killOn != "" {
		cfg.Stdout = &watcher{to: cfg.Stdout, text: o.killOn, seen: marked}
	}
	m, err := machine.Start(ctx, cfg)
	if err != nil {
		return statusBroken, false, err
	}
	ended := make(chan struct{})
	killed := make(chan bool, 1)
	go func() { killed <- o.killWhenDue(m, marked, ended) }()
	status, err = m.Wait()
	close(ended)
	byUs := <-killed
	switch {
	case errors.Is(err, machine.ErrKilled) && byUs:
		return 0, true, nil
	case errors.Is(err, machine.ErrKilled):
		return statusInterrupted, m.Ran(), errors.New("interrupted")
	case errors.Is(err, machine.ErrTimeout):
		return statusTimeout, m.Ran(), err
	case err != nil:
		return statusBroken, m.Ran(), err
	case o.killOn != "" || o.killAfter > 0:
		return statusNotKilled, true, fmt.Errorf("the command ended with status %d before the kill", status)
	}
	return status, true, nil
}

// killWhenDue kills m when that was asked for, and tells whether it has.
func (o *options) killWhenDue(m *machine.Machine, marked, ended <-chan struct{}) bool {
	var due <-chan time.Time
	if o.killAfter > 0 {
		select {
		case <-m.Running():
			due = time.After(o.killAfter)
		case <-ended:
			return false
		}
	}
	select {
	case <-marked:
	case <-due:
	case <-ended:
		return false
	}
	m.Kill()
	return true
}

// keepLog saves the console's messages of a machine that died and says where.
func keepLog(cache string, log []byte) string {
	name := filepath.Join(cache, "console.log")
	if len(log) == 0 || os.WriteFile(name, log, 0o644) != nil {
		return ""
	}
	return "\nall of the console: " + name
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
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
