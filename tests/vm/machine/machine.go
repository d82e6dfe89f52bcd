package machine

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrTimeout says that the command did not end within Config.Timeout.
	ErrTimeout = errors.New("the time is up")
	// ErrKilled says that Kill, or the end of the context, came before the command's end.
	ErrKilled = errors.New("the machine was killed")
	// ErrDied says that the guest ended without telling a status: a kernel panic, or a machine that never came up.
	ErrDied = errors.New("the machine died")
	// ErrStale comes with ErrDied where the kernel met a breakpoint that it had set to patch its code and had taken away
	// again: QEMU 7.2's emulated processors may keep what they have translated in between. Nothing here sets breakpoints
	// of its own.
	ErrStale = errors.New("the emulated processor ran code that was no longer there")
)

// Accelerators for Config.Accel.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// bootTimeout bounds the time from the start of QEMU to the start of the command. It is generous because the
// processors may be shared with other work and the emulated ones are slow.
const bootTimeout = 3 * time.Minute

// HostTree is where a guest with a root of its own has the host's file tree, read-only.
const HostTree = "/run/host"

// Config says what to boot and what to run. The zero value of every optional field is a usable default.
type Config struct {
	Cache  string // directory for kernels; see Fetch
	Kernel string // see Fetch
	Accel  string // KVM, TCG, or empty for KVM where it works and else TCG
	MemMiB int    // memory of the guest, 4096 if zero
	CPUs   int    // 2 if zero
	Disks  []Disk // more disks
	// FineTimers has timers that are exact to the microsecond with emulated processors too, instead of to the tick of 4 ms.
	FineTimers bool
	Udev       bool // run systemd-udevd; otherwise device-mapper is told to do without
	// Root is the raw image of a disk whose system runs instead of the host's: see MakeRoot. Out is not for it.
	Root    string
	Systemd bool     // have systemd for process 1, with all it brings; see the package's doc
	Out     string   // directory of the host that the guest may write to, at the same path; none if empty
	Dir     string   // where the command starts
	Tree    string   // kept visible should it lie under /tmp or /run; Dir if empty
	Env     []string // NAME=VALUE, the command's environment but for VM_OUT and DM_DISABLE_UDEV; Env() if nil
	Command []string // one word is a line for bash, several are a program and its arguments
	Stdout  io.Writer
	Stderr  io.Writer
	Console io.Writer     // the kernel's messages; nowhere if nil
	Timeout time.Duration // for the whole run; no limit if zero
}

// Machine is a running guest. Its methods may be called from any goroutine.
type Machine struct {
	cancel  context.CancelCauseFunc
	running chan struct{}
	done    chan struct{}
	status  int
	err     error
}

//go:embed init.sh
var initScript []byte

//go:embed guest.sh
var guestScript []byte

// Start boots the machine and returns at once. The command's output goes to cfg.Stdout and cfg.Stderr from two
// goroutines, so they must be safe for that if they are the same. When ctx ends, the machine is killed.
func Start(ctx context.Context, cfg Config) (*Machine, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("boot a machine: only root may, for virtiofsd shows it every file of this one")
	}
	if cfg.MemMiB == 0 {
		cfg.MemMiB = 4096
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 2
	}
	if cfg.Env == nil {
		cfg.Env = Env()
	}
	kernel, err := Fetch(ctx, cfg.Cache, cfg.Kernel)
	if err != nil {
		return nil, err
	}
	if cfg.Accel == "" {
		if cfg.Accel, err = chooseAccel(ctx, cfg); err != nil {
			return nil, err
		}
	}
	return start(ctx, cfg, kernel)
}

// Wait returns the command's exit status, or an error if the command did not get to its end: ErrTimeout, ErrKilled or
// ErrDied. When it returns, nothing of the machine is left.
func (m *Machine) Wait() (status int, err error) {
	<-m.done
	return m.status, m.err
}

// Running is closed when the command has started.
func (m *Machine) Running() <-chan struct{} { return m.running }

// Ran says whether the command has started.
func (m *Machine) Ran() bool {
	select {
	case <-m.running:
		return true
	default:
		return false
	}
}

// Kill ends the machine as a power failure would. Wait then returns ErrKilled, unless the command ended before.
func (m *Machine) Kill() {
	m.cancel(ErrKilled)
	<-m.done
}

func start(ctx context.Context, cfg Config, kernel *Kernel) (m *Machine, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := func() {}
	if cfg.Timeout > 0 {
		ctx, stop = context.WithTimeoutCause(ctx, cfg.Timeout, ErrTimeout)
	}
	r := &run{cfg: cfg, status: make(chan string, 16)}
	defer func() {
		r.closeChildEnds()
		if err != nil {
			r.abort()
			stop()
			cancel(nil)
		}
	}()

	initrd, err := orders(cfg, kernel)
	if err != nil {
		return nil, err
	}
	initrdFD := r.give(initrd)
	args := []string{
		"-machine", "q35,memory-backend=mem", "-accel", accelOption(cfg.Accel), "-cpu", cpuOption(cfg.Accel),
		"-smp", strconv.Itoa(cfg.CPUs), "-m", fmt.Sprintf("%dM", cfg.MemMiB),
		"-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", cfg.MemMiB), // shared with virtiofsd
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernel.Image, "-initrd", fmt.Sprintf("/dev/fd/%d", initrdFD),
		"-append", kernelLine(cfg),
	}

	console, fd, err := r.pipe()
	if err != nil {
		return nil, err
	}
	args = append(args, "-chardev", fmt.Sprintf("socket,id=console,fd=%d", fd), "-serial", "chardev:console",
		"-device", serialDevice)
	ports := map[string]*os.File{}
	for _, name := range []string{"stdout", "stderr", "status"} {
		if ports[name], fd, err = r.pipe(); err != nil {
			return nil, err
		}
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", name, fd),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=vm.%s", name, name))
	}

	shares := map[string]string{"host": "/"}
	if cfg.Out != "" && cfg.Root == "" {
		shares["out"] = cfg.Out
	}
	for tag, dir := range shares {
		fd, err := r.share(dir, tag == "host")
		if err != nil {
			return nil, err
		}
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", tag, fd),
			"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=%s,tag=%s", tag, tag))
	}

	disks := cfg.Disks
	if cfg.Root != "" {
		disks = append(slices.Clip(disks), Disk{Name: "root", File: cfg.Root})
	}
	for i, disk := range disks {
		options, err := r.attach(i, disk)
		if err != nil {
			return nil, err
		}
		args = append(args, options...)
	}

	qemu := exec.Command("qemu-system-x86_64", args...)
	qemu.ExtraFiles, qemu.Env = r.childEnds, append(os.Environ(), hugeHeap)
	qemu.Stdout, qemu.Stderr = &r.said, &r.said
	if err := r.spawn(qemu); err != nil {
		return nil, err
	}

	m = &Machine{cancel: cancel, running: make(chan struct{}), done: make(chan struct{})}
	var readers sync.WaitGroup
	tail := &lastLines{}
	copyTo := func(w io.Writer, f *os.File) {
		readers.Add(1)
		go func() {
			defer readers.Done()
			defer f.Close()
			if w == nil {
				w = io.Discard
			}
			if _, err := io.Copy(w, f); err != nil {
				_, _ = io.Copy(io.Discard, f) // the guest must not wait for a reader that has gone
			}
		}()
	}
	copyTo(cfg.Stdout, ports["stdout"])
	copyTo(cfg.Stderr, ports["stderr"])
	if cfg.Console != nil {
		copyTo(io.MultiWriter(tail, cfg.Console), console)
	} else {
		copyTo(tail, console)
	}
	go func() {
		defer close(r.status)
		defer ports["status"].Close()
		lines := bufio.NewScanner(ports["status"])
		for lines.Scan() {
			r.status <- lines.Text()
		}
	}()
	go func() {
		m.status, m.err = r.follow(ctx, m.running)
		r.abort()
		readers.Wait()
		if errors.Is(m.err, ErrDied) {
			for _, line := range strings.Split(tail.alarms(), "\n") {
				if strings.Contains(line, "Kernel panic") {
					m.err = fmt.Errorf("%w: %s", m.err, line)
				}
			}
			if cfg.Accel == TCG && tail.breakpoint() {
				m.err = fmt.Errorf("%w: %w", m.err, ErrStale)
			}
			m.err = fmt.Errorf("%w%s%s", m.err, indent("QEMU and what serves it said", r.said.without(virtiofsdEnd)), indent("last console lines", tail.String()))
		} else if report := tail.alarms(); m.err != nil && report != "" {
			m.err = fmt.Errorf("%w%s", m.err, indent("the guest's kernel reported", report))
		}
		stop()
		cancel(nil)
		close(m.done)
	}()
	return m, nil
}

// virtiofsdEnd is what virtiofsd says whenever QEMU has gone.
const virtiofsdEnd = "Unexpected poll revents"

// run is what has to be released when a machine ends.
type run struct {
	cfg       Config
	childEnds []*os.File // inherited by QEMU as descriptors 3, 4, …
	status    chan string
	children  []*child
	said      lastLines // by the children
}

// follow reads the guest's status messages until the command has ended and its disks are synced.
func (r *run) follow(ctx context.Context, running chan<- struct{}) (status int, err error) {
	limit := bootTimeout
	if r.cfg.Root != "" {
		limit *= 3 // a whole system, of which something may be waited for
	}
	boot := time.NewTimer(limit)
	defer boot.Stop()
	var synced <-chan time.Time
	ended := false
	for {
		select {
		case line, ok := <-r.status:
			word, rest, _ := strings.Cut(line, " ")
			switch {
			case !ok && ended:
				return status, nil
			case !ok:
				return 0, ErrDied
			case word == "running":
				boot.Stop()
				close(running)
			case word == "failed":
				return 0, fmt.Errorf("%w: guest cannot %s", ErrDied, rest)
			case word == "status":
				if status, err = strconv.Atoi(rest); err != nil {
					return 0, fmt.Errorf("%w: its status is %q", ErrDied, rest)
				}
				ended = true
				synced = time.After(10 * time.Second) // a sync may hang on a device that the command left dead
			case word == "end":
				return status, nil
			}
		case <-synced:
			return status, nil
		case <-boot.C:
			return 0, fmt.Errorf("%w: it did not come up in %v", ErrDied, limit)
		case <-ctx.Done():
			if ended {
				return status, nil
			}
			if cause := context.Cause(ctx); errors.Is(cause, ErrTimeout) {
				return 0, fmt.Errorf("%w after %v", ErrTimeout, r.cfg.Timeout)
			}
			return 0, ErrKilled
		}
	}
}

// give hands f to QEMU and returns the number it will have there.
func (r *run) give(f *os.File) int {
	r.childEnds = append(r.childEnds, f)
	return 2 + len(r.childEnds)
}

// pipe makes a socket pair of which QEMU gets one end, as descriptor fd.
func (r *run) pipe() (ours *os.File, fd int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("create socket pair: %w", err)
	}
	if err := unix.SetNonblock(pair[0], true); err != nil { // so that the runtime's poller takes it
		return nil, 0, fmt.Errorf("set up socket pair: %w", err)
	}
	return os.NewFile(uintptr(pair[0]), "guest"), r.give(os.NewFile(uintptr(pair[1]), "guest")), nil
}

// share serves dir by virtiofs and returns the descriptor of the connection in QEMU.
func (r *run) share(dir string, readOnly bool) (fd int, err error) {
	// virtiofsd wants a listening socket. One without a name is bound to an abstract address that the kernel picks.
	listener, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("create virtiofs socket: %w", err)
	}
	l := os.NewFile(uintptr(listener), "virtiofs")
	defer l.Close()
	if err := unix.Bind(listener, &unix.SockaddrUnix{}); err != nil {
		return 0, fmt.Errorf("bind virtiofs socket: %w", err)
	}
	if err := unix.Listen(listener, 1); err != nil {
		return 0, fmt.Errorf("listen on virtiofs socket: %w", err)
	}
	addr, err := unix.Getsockname(listener)
	if err != nil {
		return 0, fmt.Errorf("name virtiofs socket: %w", err)
	}
	conn, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("create virtiofs socket: %w", err)
	}
	fd = r.give(os.NewFile(uintptr(conn), "virtiofs"))
	if err := unix.Connect(conn, addr); err != nil {
		return 0, fmt.Errorf("connect virtiofs socket: %w", err)
	}

	args := []string{"--fd=3", "-o", "source=" + dir, "-o", "log_level=err", "-o", "sandbox=chroot"}
	if readOnly {
		args = append(args, "-o", "cache=always") // nobody but the host changes it, and not what a run uses
	} else {
		args = append(args, "-o", "cache=none")
	}
	virtiofsd := exec.Command("/usr/lib/qemu/virtiofsd", args...)
	virtiofsd.ExtraFiles = []*os.File{l}
	virtiofsd.Stderr = &r.said
	return fd, r.spawn(virtiofsd)
}

func (r *run) closeChildEnds() {
	for _, f := range r.childEnds {
		f.Close()
	}
	r.childEnds = nil
}

// abort kills what is still running and waits for it. QEMU is the first that is killed, so that the guest notices nothing.
// The others do not wait for its end: of what it had asked them for, they might do more by then.
func (r *run) abort() {
	for i := len(r.children) - 1; i >= 0; i-- {
		r.children[i].kill()
	}
	for _, c := range r.children {
		<-c.exited
	}
}

// child is a process that dies with us.
type child struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// spawn starts cmd. The parent-death signal follows the thread that forked, so that thread is kept for its time.
func (r *run) spawn(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	c := &child{cmd: cmd, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended shows in what it left unsaid
			close(c.exited)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	r.children = append(r.children, c)
	return nil
}

func (c *child) kill() {
	select {
	case <-c.exited:
	default:
		// The group: virtiofsd has a child of its own.
		_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL)
	}
}

// orders returns the initramfs: busybox, the modules that the root needs, and what the guest is to do.
func orders(cfg Config, kernel *Kernel) (*os.File, error) {
	busybox, err := readProgram("busybox")
	if err != nil {
		return nil, err
	}
	var a archive
	for _, dir := range []string{"bin", "dev", "proc", "sys", "host", "rw", "root", "tree", "vm"} {
		a.dir(dir)
	}
	a.file("bin/busybox", busybox)
	for _, applet := range []string{"cat", "chmod", "chroot", "cp", "insmod", "mkdir", "mount", "sleep", "switch_root", "umount"} {
		a.add("bin/"+applet, unix.S_IFLNK|0o777, []byte("busybox"))
	}
	a.file("init", initScript)

	var modules bytes.Buffer
	needed := []string{"virtio_pci", "virtio_console", "virtiofs", "overlay"}
	if cfg.Root != "" {
		needed = append(needed, "virtio_blk", "crc32c_generic", "ext4", "dm-mod", "dm-crypt", "xts", "aesni-intel", "algif_skcipher")
		a.file("vm/own-root", nil)
	}
	files, err := kernel.moduleFiles(needed...)
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		module, err := readModule(file)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("%d.ko", i)
		a.file("vm/"+name, module)
		fmt.Fprintln(&modules, name)
	}
	a.file("vm/modules", modules.Bytes())
	a.file("vm/guest.sh", guestScript)

	var kept bytes.Buffer
	tree := cfg.Tree
	if tree == "" {
		tree = cfg.Dir
	}
	for _, path := range []string{tree, kernel.Modules, cfg.Out} {
		for _, covered := range []string{"/tmp/", "/run/", "/dev/shm/"} {
			if strings.HasPrefix(path, covered) {
				fmt.Fprintln(&kept, path)
			}
		}
	}
	a.file("vm/kept", kept.Bytes())

	var env, job bytes.Buffer
	fmt.Fprintf(&env, "VM_MODULES=%s\n", quote(kernel.Modules))
	if cfg.Udev {
		fmt.Fprintln(&env, "VM_UDEV=1")
	}
	if cfg.Systemd {
		fmt.Fprintln(&env, "VM_SYSTEMD=1")
	}
	if cfg.Root != "" {
		fmt.Fprintln(&env, "VM_ROOT=1")
		cfg.Out, cfg.Dir = "", HostTree+cfg.Dir
	}
	if len(cfg.Disks) > 0 {
		fmt.Fprintln(&env, "VM_DISKS=1")
	}
	if cfg.Out != "" {
		fmt.Fprintf(&env, "VM_OUT=%s\n", quote(cfg.Out))
		fmt.Fprintf(&job, "export VM_OUT=%s\n", quote(cfg.Out))
	}
	for _, v := range cfg.Env {
		name, value, _ := strings.Cut(v, "=")
		fmt.Fprintf(&job, "export %s=%s\n", name, quote(value))
		if name == "PATH" {
			fmt.Fprintf(&env, "export PATH=%s\n", quote(value))
		}
	}
	if cfg.Dir != "" {
		fmt.Fprintf(&job, "cd %s || exit 125\n", quote(cfg.Dir))
	}
	words := cfg.Command
	if len(words) == 1 {
		words = []string{"bash", "-c", words[0]}
	}
	job.WriteString("exec")
	for _, w := range words {
		job.WriteString(" " + quote(w))
	}
	job.WriteString("\n")
	a.file("vm/env.sh", env.Bytes())
	a.file("vm/job.sh", job.Bytes())
	return a.memfd()
}

// quote returns s as one word of the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func readProgram(name string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return text, nil
}
