package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
)

// blkid says what a device holds, because it knows every format that there is. A daemon
// that serves disks must not start blkid by itself. Between fork and exec the Go runtime
// waits for the new process and keeps its P. If the program file lay on a disk that does
// not answer, the collection of garbage would stop, and every queue with it. So a Prober
// starts blkid, and whatever other process is needed: see errand.go. It is a process of
// its own, started before there is any disk to serve.

// ErrNoTool: there is no blkid on this machine.
var ErrNoTool = errors.New("blkid is not installed")

// ErrGone: the Prober's process has ended, or its end is near.
var ErrGone = errors.New("the process that asks blkid is gone, and comes back with: ublk-blksnap daemon reload")

// Prober is a running process that asks blkid.
type Prober struct {
	socket *os.File
	ended  chan struct{} // closed when the process has ended
	pid    int
}

// question is what a Prober is asked, in one message. With it come the files that
// it is about, and after them a pipe for the answer.
type question struct {
	Probe bool     `json:"probe,omitempty"` // what the file, a device, holds
	Run   *Command `json:"run,omitempty"`
	Keep  []string `json:"keep,omitempty"` // the arguments of a process, the file is its lock
	// LetGo: nothing is kept any more.
	LetGo bool `json:"let_go,omitempty"`
	// Freeze: the filesystem of the file, until nobody has the other end of the pipe that
	// comes with it. There are two answers: it is frozen, and it is thawed.
	Freeze bool `json:"freeze,omitempty"`
	Thaw   bool `json:"thaw,omitempty"` // the filesystem of the file, whoever froze it
	// Claim: the disk at this path, until nobody has the other end of the pipe that comes
	// with it. The answers are as with Freeze.
	Claim string `json:"claim,omitempty"`
	// FindHooks is a directory; see FindHooks. Hook is run until nobody has the other end of
	// the pipe that comes with it.
	FindHooks string `json:"find_hooks,omitempty"`
	Hook      *Hook  `json:"hook,omitempty"`
	// Partition: the disk at this path gets the partitions of Table, if it has this Sequence.
	Partition string      `json:"partition,omitempty"`
	Sequence  uint64      `json:"sequence,omitempty"`
	Table     []Partition `json:"table,omitempty"`
	DM        *dm.Order   `json:"dm,omitempty"`
	// Walk is answered by a message with files, Read by the text: see walk.go.
	Walk *way `json:"walk,omitempty"`
	Read *way `json:"read,omitempty"`
}

// maxQuestion is how large a question is at most, in bytes.
const maxQuestion = 64 << 10

// answer is what a Prober writes to the pipe that came with a question.
type answer struct {
	Holds  string   `json:"holds,omitempty"`
	Error  string   `json:"error,omitempty"`
	NoTool bool     `json:"no_tool,omitempty"`
	Ran    *Ran     `json:"ran,omitempty"`
	Hooks  []string `json:"hooks,omitempty"`
	// Overdue: the time of the hook was over.
	Overdue bool `json:"overdue,omitempty"`

	Errno    unix.Errno `json:"errno,omitempty"`    // of Freeze, Thaw and Claim
	Unsynced bool       `json:"unsynced,omitempty"` // the disk of Claim was opened, and its sync has failed

	DM   *dm.Info `json:"dm,omitempty"`
	Late bool     `json:"late,omitempty"` // the time for the DM order was over

	Text string `json:"text,omitempty"` // of Read
}

// StartProber starts this program with args, to call ServeProbes with the file
// descriptor 3. It ends with the Prober's process, or by Close.
func StartProber(args ...string) (*Prober, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start the prober: %w", err)
	}
	p := &Prober{socket: os.NewFile(uintptr(pair[0]), "prober"), ended: make(chan struct{})}
	theirs := os.NewFile(uintptr(pair[1]), "questions")
	defer theirs.Close()
	child, err := startSelf(theirs, args)
	if err != nil {
		p.socket.Close()
		return nil, fmt.Errorf("start the prober: %w", err)
	}
	p.pid = child.Pid
	go func() {
		_, _ = child.Wait()
		close(p.ended)
	}()
	return p, nil
}

// startSelf starts this program, in a session of its own, with a file as its descriptor 3
// and no other.
func startSelf(file *os.File, args []string) (*os.Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	return os.StartProcess("/proc/self/exe", args, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"TZ=UTC"}, // or it would read /etc/localtime, which may have to wait for the daemon
		Files: []*os.File{null, null, null, file},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// Ended is closed when the process has ended.
func (p *Prober) Ended() <-chan struct{} { return p.ended }

// PID is the number of the process.
func (p *Prober) PID() int { return p.pid }

// Close ends the process. It waits for that only for a moment: a process that
// hangs in a device ends when the device answers.
func (p *Prober) Close() {
	p.socket.Close()
	select {
	case <-p.ended:
	case <-time.After(time.Second):
	}
}

// Probe says what the device, which may be opened as a place only (O_PATH),
// holds; empty if nothing is found. See Blkid.
func (p *Prober) Probe(ctx context.Context, dev *os.File) (string, error) {
	a, err := p.ask(ctx, question{Probe: true}, dev)
	switch {
	case err != nil:
		return "", err
	case a.NoTool:
		return "", ErrNoTool
	case a.Error != "":
		return "", errors.New(a.Error)
	}
	return a.Holds, nil
}

// ask puts a question and waits for the answer.
func (p *Prober) ask(ctx context.Context, q question, files ...*os.File) (answer, error) {
	r, err := p.put(q, files...)
	if err != nil {
		return answer{}, err
	}
	defer r.Close()
	return hear(ctx, r)
}

// put puts a question, and returns the pipe for the answer.
func (p *Prober) put(q question, files ...*os.File) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	err = p.send(q, append(files, w)...)
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// send puts a question with its files, the last of which is for the answer.
func (p *Prober) send(q question, files ...*os.File) error {
	text, err := json.Marshal(q)
	if err != nil || len(text) > maxQuestion {
		return errors.Join(errors.New("a question that cannot be put"), err)
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	// Not by Fd: Close may come meanwhile, and the number may be another file's then.
	socket, err := p.socket.SyscallConn()
	if err == nil {
		var sendErr error
		err = socket.Control(func(fd uintptr) {
			sendErr = unix.Sendmsg(int(fd), text, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		})
		err = errors.Join(err, sendErr)
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("the process that asks blkid is asked too much: %w", err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return nil
}

// hear waits for an answer. If ctx ends before, what comes can be heard later.
func hear(ctx context.Context, r *os.File) (a answer, err error) {
	late := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = r.SetReadDeadline(time.Unix(1, 0))
		close(late)
	})
	err = json.NewDecoder(r).Decode(&a)
	if !stop() {
		<-late
		_ = r.SetReadDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return a, fmt.Errorf("wait for the prober: %w", ctx.Err())
	case err != nil: // it has ended without an answer
		return a, fmt.Errorf("%w: %w", ErrGone, err)
	}
	return a, nil
}

// ServeProbes is the life of a Prober's process, which looks for blkid below root. It
// ends when the process that asks has gone.
func ServeProbes(fd int, root string) error {
	// The terminal's signals are for the daemon, which may refuse to end.
	// They are not ignored, because a hook would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	_ = os.WriteFile("/proc/self/comm", []byte("ublk-probe"), 0)
	// It changes the tables of volumes, which may hold swap in a file: nothing of it may be
	// there meanwhile.
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE)
	// It is small, and starts anew what must not be missing.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	e := errands{root: root, leaving: make(chan struct{})}
	var ending sync.WaitGroup
	text := make([]byte, maxQuestion)
	for {
		oob := make([]byte, unix.CmsgSpace(3*4))
		n, oobn, _, _, err := unix.Recvmsg(fd, text, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			e.end()
			ending.Wait() // so that all is thawed, and no hook runs any more
			return err
		}
		files := received(oob[:oobn], "asked about")
		var q question
		if err := json.Unmarshal(text[:n], &q); err != nil || len(files) == 0 || q.Freeze && len(files) != 3 || (q.Claim != "" || q.Hook != nil) && len(files) != 2 {
			return errors.Join(errors.New("what came is no question, or came without its files"), err)
		}
		if q.Freeze || q.Hook != nil {
			ending.Add(1)
		}
		go func() {
			last := len(files) - 1
			defer closeAll(files)
			answers := json.NewEncoder(files[last])
			switch {
			case q.Freeze:
				defer ending.Done()
				freeze(answers, files[0], files[1])
			case q.Claim != "":
				claim(answers, q.Claim, files[0])
			case q.Hook != nil:
				defer ending.Done()
				_ = answers.Encode(runHook(e.root, *q.Hook, files[0]))
			case q.Walk != nil:
				answerWalk(*q.Walk, files[last])
			default:
				a := e.do(q, files[:last])
				closeAll(files[:last]) // whoever hears the answer finds nothing open
				_ = answers.Encode(a)
			}
		}()
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// CanProbe says whether there is a blkid to ask.
func (h *Host) CanProbe() bool {
	_, err := findBlkid(h.Root)
	return err == nil
}

// findBlkid is the path of blkid below root.
func findBlkid(root string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"} {
		if st, err := os.Stat(filepath.Join(root, dir, "blkid")); err == nil && st.Mode().IsRegular() {
			return filepath.Join(dir, "blkid"), nil
		}
	}
	return "", ErrNoTool
}

// blkidLimit is how long blkid may run.
const blkidLimit = time.Minute

// Blkid says what the device or file f holds, according to the blkid below root: a
// filesystem, a part of a larger device, or a partition table. It is empty if blkid
// finds nothing. It is an error if several formats claim the content, or if blkid
// cannot tell for any other reason.
func Blkid(root string, f *os.File) (string, error) {
	program, err := findBlkid(root)
	if err != nil {
		return "", err
	}
	// blkid takes a device that it cannot open for an empty one.
	dev, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return "", fmt.Errorf("open for blkid: %w", err)
	}
	defer dev.Close()
	ctx, cancel := context.WithTimeout(context.Background(), blkidLimit)
	defer cancel()
	c := exec.CommandContext(ctx, program, "-p", "-o", "export", "/proc/self/fd/3")
	c.Dir = "/"
	c.Env = []string{"LC_ALL=C"}
	c.ExtraFiles = []*os.File{dev}
	if root != "/" {
		c.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	}
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	if err = c.Start(); err == nil {
		// Nothing depends on it, and a disk decides how much memory it takes.
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", c.Process.Pid), []byte("0"), 0)
		err = c.Wait()
	}
	status := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		status = exit.ExitCode()
	case err != nil:
		return "", fmt.Errorf("run blkid: %w", err)
	}
	return parseBlkid(status, &out, strings.TrimSpace(said.String()))
}

// parseBlkid is what a device holds by the output of blkid -p -o export.
func parseBlkid(status int, out io.Reader, stderr string) (string, error) {
	text, _ := io.ReadAll(out)
	switch {
	case status == 2 && len(text) == 0 && stderr == "":
		return "", nil
	case status == 8:
		return "", errors.New("blkid finds several formats at once (wipefs lists them)")
	case status != 0 || stderr != "":
		return "", fmt.Errorf("blkid ended with status %d: %s", status, stderr)
	}
	found := map[string]string{}
	other := ""
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		key, value, _ := strings.Cut(line, "=")
		found[key] = value
		// A partition is told from where the table of its disk has it.
		if key != "DEVNAME" && !strings.HasPrefix(key, "PART_ENTRY_") {
			other = line
		}
	}
	switch {
	case found["DEVNAME"] == "":
		return "", fmt.Errorf("blkid's answer says nothing of the device: %q", text)
	case found["TYPE"] != "":
		return found["TYPE"], nil
	case found["PTTYPE"] != "":
		return "a partition table (" + found["PTTYPE"] + ")", nil
	}
	return other, nil
}
