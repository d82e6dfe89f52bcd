package integration

import (
	"bufio"
	"bytes"
	"context"
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
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	server "github.com/ublk-blksnap/ublk-blksnap/daemon"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Support for tests that run the real program on real disks: processes, the
// daemon, and what is left behind. Disks are in disks_test.go, contents that
// tell who wrote them in stamp_test.go.
//
//	UBLK_BLKSNAP_VM=1     there is ublk, root, and nothing of value (set by the machine)
//	UBLK_BLKSNAP_BIN      the program; bin/ublk-blksnap of the tree, if empty
//	UBLK_BLKSNAP_LONG=1   minutes instead of seconds for whatever runs for a time

// needVM skips a test that needs root, ublk, and disks to destroy.
func needVM(t testing.TB) {
	t.Helper()
	if os.Getenv("UBLK_BLKSNAP_VM") != "1" {
		t.Skip("needs root and ublk: make integration")
	}
}

// needKernel skips a test of what an older kernel does not have.
func needKernel(t testing.TB, major, minor int, what string) {
	t.Helper()
	if !kernelAtLeast(t, major, minor) {
		t.Skipf("needs kernel %d.%d: %s", major, minor, what)
	}
}

func kernelAtLeast(t testing.TB, major, minor int) bool {
	t.Helper()
	return !ublk.OlderThan(ublk.KernelRelease(), fmt.Sprintf("%d.%d", major, minor))
}

// span is how long something runs that could run for ever.
func span(short, long time.Duration) time.Duration {
	if os.Getenv("UBLK_BLKSNAP_LONG") == "1" {
		return long
	}
	return short
}

// queueCounts are the numbers of queues that tests try: those of 1, 2 and 4 that
// the machine has processors for, as the kernel makes no more.
func queueCounts() []int {
	return slices.DeleteFunc([]int{1, 2, 4}, func(n int) bool { return n > max(1, runtime.NumCPU()) })
}

// TestMain looks at the kernel's log when all is done: a test may pass over a
// kernel that has complained.
func TestMain(m *testing.M) {
	status := m.Run()
	if os.Getenv("UBLK_BLKSNAP_VM") == "1" {
		if bad := kernelComplaints(); len(bad) > 0 {
			fmt.Printf("--- FAIL: the kernel's log\n    %s\n", strings.Join(bad, "\n    "))
			status = 1
		}
	}
	os.Exit(status)
}

// kernelComplaints are the lines of the kernel's log that no test provokes.
func kernelComplaints() []string {
	f, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return []string{err.Error()}
	}
	defer f.Close()
	var bad []string
	line := make([]byte, 8192)
	for {
		n, err := unix.Read(int(f.Fd()), line)
		if errors.Is(err, unix.EPIPE) { // overwritten meanwhile
			continue
		}
		if err != nil || n <= 0 {
			return bad
		}
		_, text, _ := strings.Cut(string(line[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		for _, s := range []string{"BUG:", "WARNING:", "Oops", "blocked for more than", "lockup", "general protection", "Kernel panic", "Out of memory"} {
			if strings.Contains(text, s) {
				bad = append(bad, text)
			}
		}
	}
}

// startChild runs one of these tests, which env tells what to do, in a process of
// its own, and waits for a line that begins with sign: said is the rest of it. The
// process is killed at the end of the test at the latest.
func startChild(t testing.TB, test, env, sign string) (child *exec.Cmd, said string) {
	t.Helper()
	child = exec.Command(os.Args[0], "-test.run=^"+test+"$")
	child.Env = append(os.Environ(), env)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		child.Process.Kill()
		child.Wait()
	})
	var before strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said, ok := strings.CutPrefix(lines.Text(), sign); ok {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return child, said
		}
		before.WriteString(lines.Text() + "\n")
	}
	t.Fatalf("the child ended: %s", before.String())
	return nil, ""
}

// patience is how long a test waits for what has to come, under emulation and
// with the machine busy. It says that something hangs, and never how long
// something may take.
const patience = 3 * time.Minute

// waitFor waits until cond holds.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// await is what comes out of c.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case x := <-c:
		return x
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// try runs a command and returns what it printed on both outputs.
func try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		// What hangs, and where, is in the kernel's log then.
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
		err = fmt.Errorf("took longer than %v: %w", patience, err)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// run is try for a command that must succeed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// status is the exit status of a command that ran.
func status(t testing.TB, err error) int {
	t.Helper()
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Exited():
		return e.ExitCode()
	}
	t.Fatal(err)
	return -1
}

// program is the path of the program under test.
func program(t testing.TB) string {
	t.Helper()
	path := os.Getenv("UBLK_BLKSNAP_BIN")
	if path == "" {
		path = filepath.Join("..", "..", "bin", "ublk-blksnap")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: make build", err)
	}
	return path
}

// daemon is a running daemon with a run directory of its own.
type daemon struct {
	*control.Client
	t   testing.TB
	dir server.RunDir
	pid int
	cmd *exec.Cmd
	log string
	end chan struct{} // closed when the process has ended
	err error         // of its end
}

// testParams are the parameters of daemons here: small enough for a machine
// with a few GiB, and for every limit to be reached.
var testParams = []string{
	"diff_storage_minimum=8192", // 4 MiB
	"diff_buffer_pool_size=8M",
	"state_size=512M",
}

// startDaemon starts a daemon with parameters key=value on top of testParams.
// When the test ends it is told to stop, and must not leave anything.
func startDaemon(t testing.TB, params ...string) *daemon {
	t.Helper()
	return startDaemonLogging(t, nil, params...)
}

// startDaemonLogging is startDaemon with another place for the log than a file.
func startDaemonLogging(t testing.TB, stderr *os.File, params ...string) *daemon {
	t.Helper()
	needVM(t)
	dir := t.TempDir()
	d := &daemon{t: t, dir: server.RunDir(filepath.Join(dir, "run")), log: filepath.Join(dir, "log")}
	config := filepath.Join(dir, "conf")
	values := map[string]string{}
	for _, p := range slices.Concat(testParams, params) {
		key, value, _ := strings.Cut(p, "=")
		if _, err := strconv.Atoi(value); err != nil && value != "true" && value != "false" {
			value = strconv.Quote(value)
		}
		values[key] = value
	}
	var b strings.Builder
	for key, value := range values {
		fmt.Fprintf(&b, "%s = %s\n", key, value)
	}
	if err := os.WriteFile(config, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	before := ublkDevices()

	d.cmd = exec.Command(program(t), "daemon", "--run-dir", string(d.dir), "--config", config)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if stderr != nil {
		d.cmd.Stderr = stderr
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.pid = d.cmd.Process.Pid
	d.end = make(chan struct{})
	go func() {
		d.err = d.cmd.Wait()
		close(d.end)
	}()
	d.Client = control.NewClient(d.dir.Socket())
	t.Cleanup(func() {
		d.stop()
		if t.Failed() {
			d.showLog()
		}
		// The last one who looked at a device may still be on the way out.
		waitFor(t, fmt.Sprintf("the end of the ublk devices, before: %v", before), func() bool { return len(ublkDevices()) <= len(before) })
		_ = unix.Unmount(d.dir.State(), unix.MNT_DETACH)
		d.Close()
	})
	waitFor(t, "an answer of the daemon", func() bool {
		select {
		case <-d.end:
			t.Fatalf("the daemon ended at once: %v", d.err)
		default:
		}
		_, err := d.Info(ctx(t))
		return err == nil
	})
	return d
}

// in is the daemon for a part of a test.
func (d *daemon) in(t testing.TB) *daemon {
	part := *d
	part.t = t
	return &part
}

func (d *daemon) showLog() {
	d.t.Helper()
	b, _ := os.ReadFile(d.log)
	if len(b) > 8<<10 {
		b = b[len(b)-8<<10:]
	}
	d.t.Logf("the daemon's log:\n%s", b)
}

// ended says whether the daemon ends within limit.
func (d *daemon) ended(limit time.Duration) bool {
	select {
	case <-d.end:
		return true
	case <-time.After(limit):
		return false
	}
}

// stop asks the daemon to stop and makes sure that it does.
func (d *daemon) stop() {
	d.t.Helper()
	select {
	case <-d.end: // by the test
		return
	default:
	}
	_ = unix.Kill(d.pid, unix.SIGTERM)
	if !d.ended(patience) {
		d.t.Errorf("the daemon does not stop")
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
		_ = unix.Kill(d.pid, unix.SIGQUIT)
		if !d.ended(5 * time.Second) {
			_ = unix.Kill(d.pid, unix.SIGKILL)
			d.ended(5 * time.Second)
		}
		return
	}
	if d.err != nil {
		d.t.Errorf("the daemon ended with %v", d.err)
	}
}

// ctx bounds one call of the daemon.
func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return c
}

// add puts a filter over a disk. The test's end removes it, by force if need be.
func (d *daemon) add(path string, change ...func(*control.AddRequest)) control.Device {
	d.t.Helper()
	r := control.AddRequest{Path: path}
	for _, f := range change {
		f(&r)
	}
	dev, err := d.AddDevice(ctx(d.t), r)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		err := d.RemoveDevice(ctx(d.t), control.RemoveRequest{Device: dev.Name, Force: true})
		if err != nil && control.CodeOf(err) != control.NotFound && control.CodeOf(err) != control.Unavailable {
			d.t.Errorf("clean up: %v", err)
		}
	})
	return dev
}

func (d *daemon) remove(dev control.Device) {
	d.t.Helper()
	if err := d.RemoveDevice(ctx(d.t), control.RemoveRequest{Device: dev.Name}); err != nil {
		d.t.Fatal(err)
	}
}

// with sets queues and depth.
func with(queues, depth int) func(*control.AddRequest) {
	return func(r *control.AddRequest) { r.Queues, r.Depth = queues, depth }
}

// create makes a snapshot that is not taken yet. The test's end destroys it.
func (d *daemon) create(r control.CreateRequest) control.Snapshot {
	d.t.Helper()
	s, err := d.CreateSnapshot(ctx(d.t), r)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		err := d.DestroySnapshot(ctx(d.t), s.ID)
		if err != nil && control.CodeOf(err) != control.NotFound && control.CodeOf(err) != control.Unavailable {
			d.t.Errorf("clean up: %v", err)
		}
	})
	return s
}

// take takes a snapshot of devices with chunks of the given size in bytes, 0
// for the default, and storage in memory.
func (d *daemon) take(chunk int64, devs ...control.Device) control.Snapshot {
	d.t.Helper()
	s := d.create(control.CreateRequest{Devices: names(devs), ChunkSize: chunk, Storage: []control.Storage{{Path: "/dev/shm"}}})
	return d.taken(s.ID)
}

func (d *daemon) taken(id string) control.Snapshot {
	d.t.Helper()
	s, err := d.TakeSnapshot(ctx(d.t), control.TakeRequest{ID: id})
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func (d *daemon) destroy(id string) {
	d.t.Helper()
	if err := d.DestroySnapshot(ctx(d.t), id); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) snapshot(id string) control.Snapshot {
	d.t.Helper()
	s, err := d.Snapshot(ctx(d.t), id)
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func names(devs []control.Device) []string {
	var out []string
	for _, d := range devs {
		out = append(out, d.Name)
	}
	return out
}

// answer is what a call of the program came to.
type answer struct {
	status      int
	out, errout string
}

// call runs the program on this daemon's run directory. as is the name it is
// called by.
func (d *daemon) call(as string, args ...string) answer {
	d.t.Helper()
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(c, program(d.t), append([]string{"--run-dir", string(d.dir)}, args...)...)
	cmd.Args[0] = as
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	return answer{status(d.t, cmd.Run()), out.String(), errout.String()}
}

// held is what a process and the driver hold.
type held struct{ fds, threads, mappings, devices, loops int }

func (d *daemon) held() held {
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", d.pid))
	loops, _ := filepath.Glob("/sys/block/loop*/loop")
	return held{
		fds:      entries(fmt.Sprintf("/proc/%d/fd", d.pid)),
		threads:  entries(fmt.Sprintf("/proc/%d/task", d.pid)),
		mappings: bytes.Count(maps, []byte("\n")),
		devices:  len(ublkDevices()),
		loops:    len(loops),
	}
}

// settled waits until the daemon holds no more than before. The Go runtime keeps
// threads once it has needed them, and mappings for them: slack many.
func (d *daemon) settled(before held, slack int) {
	d.t.Helper()
	var now held
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		now = d.held()
		if now.fds <= before.fds && now.devices <= before.devices && now.loops <= before.loops &&
			now.threads <= before.threads+slack && now.mappings <= before.mappings+4*slack+4 {
			return
		}
	}
	d.t.Errorf("left behind: now %+v, before %+v", now, before)
}

// leakTest makes the daemons of a test keep hardly any garbage, so that what
// grows is what is held.
func leakTest(t *testing.T) { t.Setenv("GOGC", "10") }

// memory is the daemon's resident memory in bytes.
func (d *daemon) memory() int64 {
	d.t.Helper()
	// Counted page by page: what status says may be off by pages for each
	// processor.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", d.pid))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	d.t.Fatal("no Rss")
	return 0
}

func entries(dir string) int {
	list, _ := os.ReadDir(dir)
	return len(list)
}

// ublkDevices are the names of all ublk devices and disks.
func ublkDevices() []string {
	chars, _ := filepath.Glob("/sys/class/ublk-char/*")
	disks, _ := filepath.Glob("/sys/block/ublkb*")
	var out []string
	for _, p := range append(chars, disks...) {
		out = append(out, filepath.Base(p))
	}
	return out
}

// want fails the test unless err has the code, and says all of the words.
func want(t testing.TB, err error, code control.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %q with %q", code, words)
		return
	}
	if got := control.CodeOf(err); got != code {
		t.Errorf("error %q (%v), want %q", got, err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
