package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// MinKernel is the oldest kernel whose ublk driver this package can use.
const MinKernel = "6.5"

// Reasons why no device can be had. The message of the error says what to do.
var (
	// ErrNoDriver: the kernel has no ublk driver, or it could not be loaded.
	ErrNoDriver = errors.New("no ublk driver")
	// ErrTooOld: the driver lacks what this package needs.
	ErrTooOld = errors.New("ublk driver too old")
	// ErrPermission: not root.
	ErrPermission = errors.New("not permitted")
	// ErrClosed: the Control has been closed.
	ErrClosed = errors.New("ublk control closed")
)

const controlPath = "/dev/ublk-control"

// Control is the way to the driver: one ring on one thread that lives as long
// as the Control does, for the kernel runs the commands on worker threads that
// belong to it. Commands go one at a time, from any goroutine.
//
// A command whose context ends is cancelled in the kernel where the kernel can
// (it waits for queues or for openers), and given up otherwise: the next one
// starts while the kernel still works on it. The same command for the same device
// stays in the queue until then: one that hangs takes one of the kernel's workers,
// not all.
type Control struct {
	dev      int // /dev/ublk-control
	wake     int // eventfd
	features uint64
	mem      []byte // commandSlots buffers that the kernel reads and writes
	prep     func(sqe *uring.SQE, dev int, w *command)
	ended    chan struct{}

	mu     sync.Mutex // guards the fields below
	queue  []*command
	hung   map[hungKey]*command // given up, and still in the kernel's hands
	closed bool
}

type hungKey struct{ op, dev uint32 }

// command is one control command. All but done belong to the control thread
// until done is closed, which happens under Control.mu.
type command struct {
	op   uint32
	cmd  uapi.UblksrvCtrlCmd
	buf  []byte // copied to the kernel and back
	res  int32
	done chan struct{}
	late func(buf []byte) // called if it succeeds after it was given up; may be nil
}

func (w *command) key() hungKey { return hungKey{w.op, w.cmd.DevID} }

const (
	commandSlots = 16 // one is running, the others are given up
	slotSize     = 256

	wakeTag   = 1 << 32
	cancelTag = 2 << 32
)

// OpenControl opens the driver, loading it if need be. The errors are
// ErrNoDriver, ErrTooOld, ErrPermission, uring.ErrDisabled,
// uring.ErrNotSupported, or another errno.
func OpenControl() (*Control, error) {
	dev, err := openControlDevice()
	if err != nil {
		return nil, err
	}
	c, err := newControl(dev, prepCommand)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.readFeatures(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// newControl starts the thread for dev, which is the Control's from then on.
func newControl(dev int, prep func(*uring.SQE, int, *command)) (*Control, error) {
	c := &Control{dev: dev, prep: prep, wake: -1, ended: make(chan struct{}), hung: map[hungKey]*command{}}
	started := make(chan error)
	go c.thread(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start ublk control: %w", err)
	}
	return c, nil
}

func openControlDevice() (int, error) {
	open := func() (int, error) { return unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0) }
	absent := func(err error) bool {
		return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
	}
	fd, err := open()
	if absent(err) {
		why := loadDriver()
		// devtmpfs makes the node with the module; udev may be a little late.
		for end := time.Now().Add(nodeWait); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if fd, err = open(); err == nil || why != nil {
				break
			}
		}
		if err != nil && why != nil {
			return -1, why
		}
	}
	switch {
	case err == nil:
		return fd, nil
	case absent(err):
		return -1, fmt.Errorf("%w: ublk_drv is loaded but %s did not appear: is devtmpfs mounted on /dev?", ErrNoDriver, controlPath)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("open %s: %w: run as root", controlPath, ErrPermission)
	}
	return -1, fmt.Errorf("open %s: %w", controlPath, err)
}

// loadDriver loads ublk_drv; the error says why there is none.
func loadDriver() error {
	release := kernelRelease()
	name, err := exec.LookPath("modprobe")
	if err != nil {
		name = "/sbin/modprobe"
	}
	out, err := exec.Command(name, "ublk_drv").CombinedOutput()
	if err == nil {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("load ublk_drv: %w: run as root", ErrPermission)
	}
	return noDriver(release, moduleExists("/lib/modules", release), bytes.TrimSpace(out), err)
}

// noDriver says what keeps ublk_drv from being loaded.
func noDriver(release string, exists bool, out []byte, err error) error {
	switch {
	case exists && len(out) > 0:
		return fmt.Errorf("%w: modprobe ublk_drv: %s", ErrNoDriver, out)
	case exists:
		return fmt.Errorf("%w: modprobe ublk_drv: %w", ErrNoDriver, err)
	case olderThan(release, MinKernel):
		return fmt.Errorf("%w: kernel %s is too old: Linux %s or newer is needed", ErrNoDriver, release, MinKernel)
	}
	return fmt.Errorf("%w: kernel %s has no module ublk_drv: install a kernel built with CONFIG_BLK_DEV_UBLK (Linux %s or newer), or the package with its extra modules", ErrNoDriver, release, MinKernel)
}

func moduleExists(dir, release string) bool {
	found, _ := filepath.Glob(filepath.Join(dir, release, "kernel/drivers/block/ublk_drv.ko*"))
	return len(found) > 0
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// olderThan compares the first two numbers of kernel releases.
func olderThan(release, min string) bool {
	var a, b, x, y int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	if n, _ := fmt.Sscanf(min, "%d.%d", &x, &y); n != 2 {
		return false
	}
	return a < x || a == x && b < y
}

// Close ends the thread once no command is running; those not yet started
// fail with ErrClosed. A second Close waits as well.
func (c *Control) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.notify()
	<-c.ended
}

// notify wakes the thread.
func (c *Control) notify() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wake < 0 {
		return
	}
	one := [8]byte{1}
	for {
		// An eventfd takes 2^64 such writes before one would block.
		if _, err := unix.Write(c.wake, one[:]); err != unix.EINTR {
			return
		}
	}
}

// do runs one command: buf goes to the kernel and comes back. It returns the
// kernel's errno, wrapped, or that of ctx.
func (c *Control) do(ctx context.Context, op uint32, cmd uapi.UblksrvCtrlCmd, buf []byte) error {
	return c.doOrUndo(ctx, op, cmd, buf, nil)
}

// doOrUndo is do for a command that leaves something behind: late, on a goroutine
// of its own, takes that away if the command was given up and succeeds after all.
func (c *Control) doOrUndo(ctx context.Context, op uint32, cmd uapi.UblksrvCtrlCmd, buf []byte, late func(buf []byte)) error {
	if len(buf) > slotSize {
		panic("ublk: control buffer too large")
	}
	w := &command{op: op, cmd: cmd, buf: append([]byte(nil), buf...), done: make(chan struct{}), late: late}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return commandError(op, cmd.DevID, ErrClosed)
	}
	c.queue = append(c.queue, w)
	c.mu.Unlock()
	c.notify()
	select {
	case <-w.done:
	case <-ctx.Done():
		if c.giveUp(w) {
			return commandError(op, cmd.DevID, ctx.Err())
		}
	}
	if err := w.err(); err != nil {
		return commandError(op, cmd.DevID, err)
	}
	copy(buf, w.buf)
	return nil
}

// giveUp is for a command that nobody waits for any more. It is false if the
// command has just ended.
func (c *Control) giveUp(w *command) bool {
	c.mu.Lock()
	if i := slices.Index(c.queue, w); i >= 0 {
		c.queue = slices.Delete(c.queue, i, i+1)
	} else {
		select {
		case <-w.done:
			c.mu.Unlock()
			return false
		default:
			c.hung[w.key()] = w
		}
	}
	c.mu.Unlock()
	c.notify()
	return true
}

// err is what the kernel answered, or ErrClosed.
func (w *command) err() error {
	switch {
	case w.res == notRun:
		return ErrClosed
	case w.res == -enotsupp:
		return unix.EOPNOTSUPP
	case w.res < 0:
		return unix.Errno(-w.res)
	}
	return nil
}

// enotsupp is the kernel's own ENOTSUPP, which user space has no name for: the
// answer of drivers before Linux 6.8 to a command that they do not know.
const enotsupp = 524

// notRun is the result of a command that never reached the kernel.
const notRun = -1 << 31

var commandNames = map[uint32]string{
	uapi.UBLK_U_CMD_GET_QUEUE_AFFINITY:  "get queue affinity",
	uapi.UBLK_U_CMD_GET_DEV_INFO:        "get info",
	uapi.UBLK_U_CMD_ADD_DEV:             "add",
	uapi.UBLK_U_CMD_DEL_DEV:             "delete",
	uapi.UBLK_U_CMD_START_DEV:           "start",
	uapi.UBLK_U_CMD_STOP_DEV:            "stop",
	uapi.UBLK_U_CMD_SET_PARAMS:          "set parameters",
	uapi.UBLK_U_CMD_GET_PARAMS:          "get parameters",
	uapi.UBLK_U_CMD_START_USER_RECOVERY: "start recovery",
	uapi.UBLK_U_CMD_END_USER_RECOVERY:   "end recovery",
	uapi.UBLK_U_CMD_GET_FEATURES:        "get features",
	uapi.UBLK_U_CMD_DEL_DEV_ASYNC:       "delete",
	uapi.UBLK_U_CMD_UPDATE_SIZE:         "update size",
	uapi.UBLK_U_CMD_QUIESCE_DEV:         "quiesce",
	uapi.UBLK_U_CMD_TRY_STOP_DEV:        "try stop",
}

func commandError(op, id uint32, err error) error {
	if id == anyID {
		return fmt.Errorf("ublk: %s: %w", commandNames[op], err)
	}
	return fmt.Errorf("ublk: %s device %d: %w", commandNames[op], id, err)
}

// controlThread is what only the thread of a Control touches.
type controlThread struct {
	*Control
	ring     *uring.Ring
	running  [commandSlots]*command // by slot: in the kernel's hands
	current  int                    // slot of the one that is waited for, -1 if none
	inFlight int
	poll     bool // the eventfd is being watched
}

func (c *Control) thread(started chan<- error) {
	// Never unlocked: the kernel's worker threads belong to this thread.
	runtime.LockOSThread()
	t := &controlThread{Control: c, current: -1}
	err := t.open()
	if err == nil {
		started <- nil
		err = t.run()
	} else {
		defer func() { started <- err }()
	}
	t.close(err)
}

func (t *controlThread) open() error {
	name := [16]byte{'u', 'b', 'l', 'k', '-', 'c', 'o', 'n', 't', 'r', 'o', 'l'}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
	var err error
	if t.mem, err = unix.Mmap(-1, 0, commandSlots*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return fmt.Errorf("map command buffers: %w", err)
	}
	if t.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("make eventfd: %w", err)
	}
	// Twice: a command and the cancellation of another.
	t.ring, err = uring.New(uring.Config{Entries: 4 * commandSlots, SQE128: true})
	return err
}

// close gives everything back. Commands still in the kernel's hands keep the
// memory: it is never unmapped then.
func (t *controlThread) close(err error) {
	t.mu.Lock()
	t.closed = true
	for _, w := range t.queue {
		w.res = notRun
		close(w.done)
	}
	t.queue = nil
	if t.wake >= 0 {
		unix.Close(t.wake)
		t.wake = -1
	}
	t.mu.Unlock()
	if t.ring != nil {
		t.ring.Close()
	}
	unix.Close(t.dev)
	if t.inFlight == 0 && t.mem != nil {
		unix.Munmap(t.mem)
	}
	for _, w := range t.running {
		if w != nil {
			w.res = notRun
			t.over(w)
		}
	}
	close(t.ended)
}

func (t *controlThread) run() error {
	var cqes [8]uring.CQE
	for {
		if !t.poll {
			sqe := t.ring.SQE()
			sqe.PrepPollAdd(t.wake, unix.POLLIN)
			sqe.UserData = wakeTag
			t.poll = true
		}
		if t.next() {
			return nil
		}
		if err := t.ring.SubmitAndWait(1, false); err != nil {
			return err
		}
		for n := t.ring.Reap(cqes[:]); n > 0; n = t.ring.Reap(cqes[:]) {
			for _, cqe := range cqes[:n] {
				t.complete(cqe)
			}
		}
	}
}

// next gives up the current command if nobody waits for it, and starts the next
// one that has none like it hanging. It says whether the thread shall end.
func (t *controlThread) next() (end bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current >= 0 && t.hung[t.running[t.current].key()] == t.running[t.current] {
		sqe := t.ring.SQE()
		sqe.PrepCancel(uint64(t.current))
		sqe.UserData = cancelTag
		t.current = -1
	}
	if t.closed {
		return t.current < 0
	}
	for t.current < 0 {
		i := slices.IndexFunc(t.queue, func(w *command) bool { return t.hung[w.key()] == nil })
		if i < 0 {
			break
		}
		w := t.queue[i]
		t.queue = slices.Delete(t.queue, i, i+1)
		t.start(w)
	}
	return false
}

func (t *controlThread) start(w *command) {
	slot := -1
	for i, r := range t.running {
		if r == nil {
			slot = i
			break
		}
	}
	if slot < 0 {
		// Each slot holds a command that the kernel does not let go.
		w.res = -int32(unix.EBUSY)
		close(w.done)
		return
	}
	mem := t.mem[slot*slotSize : slot*slotSize+len(w.buf)]
	copy(mem, w.buf)
	if len(mem) > 0 {
		w.cmd.Addr = uint64(uintptr(unsafe.Pointer(&mem[0])))
		w.cmd.Len = uint16(len(mem))
	}
	sqe := t.ring.SQE()
	t.prep(sqe, t.dev, w)
	sqe.UserData = uint64(slot)
	t.running[slot] = w
	t.current = slot
	t.inFlight++
}

// over is the end of a command.
func (t *controlThread) over(w *command) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.hung[w.key()] == w {
		delete(t.hung, w.key())
		if w.late != nil && w.res >= 0 {
			go w.late(w.buf)
		}
	}
	close(w.done)
}

func prepCommand(sqe *uring.SQE, dev int, w *command) {
	sqe.PrepCommand(dev, w.op)
	*(*uapi.UblksrvCtrlCmd)(unsafe.Pointer(sqe.Cmd80())) = w.cmd
}

func (t *controlThread) complete(cqe uring.CQE) {
	switch {
	case cqe.UserData == wakeTag:
		var n [8]byte
		_, _ = unix.Read(t.wake, n[:]) // to zero; it was readable
		t.poll = false
	case cqe.UserData < commandSlots:
		slot := int(cqe.UserData)
		w := t.running[slot]
		t.running[slot] = nil
		t.inFlight--
		if t.current == slot {
			t.current = -1
		}
		w.res = cqe.Res
		copy(w.buf, t.mem[slot*slotSize:])
		t.over(w)
	}
}
