package ublk

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// Control is the way to the driver: one ring on one thread. The thread lives as long
// as the Control does, because the kernel runs the commands on worker threads that
// belong to it. Any goroutine may give a command. They run one at a time.
//
// When the context of a command ends, the kernel cancels the command if it can, which
// is while the command waits for queues or for openers. Otherwise the command is
// given up: the next one starts while the kernel still works on it. While a command
// that was given up hangs, the same command for the same device waits in the queue. So
// a device that hangs takes one of the kernel's workers, not all.
//
// The kernel may also forget a command, rarely, or its own duty to wake the thread: the
// command has not begun and nothing begins it until something else comes along. So whoever
// waits for long has the thread woken, and the kernel reminded.
type Control struct {
	dev      int // /dev/ublk-control
	wake     int // eventfd
	features uint64
	mem      []byte // commandSlots buffers that the kernel reads and writes
	prep     func(sqe *uring.SQE, dev int, cmd *command)
	ended    chan struct{}

	mu      sync.Mutex // guards the fields below
	queue   []*command
	givenUp map[commandKey]*command // nobody waits for them, the kernel still has them
	overdue bool                    // the kernel is to be reminded of the command that runs
	begun   map[int]bool            // devices that this process took over as far as to fetch some queues, perhaps
	closed  bool
}

type commandKey struct{ op, dev uint32 }

// command is one control command. Its fields, except done, belong to the control
// thread until done is closed. That happens under Control.mu.
type command struct {
	op   uint32
	arg  uapi.UblksrvCtrlCmd
	buf  []byte // copied to the kernel and back
	res  int32
	done chan struct{}
	undo func(buf []byte) // called if it succeeds after it was given up; may be nil
}

func (cmd *command) key() commandKey { return commandKey{cmd.op, cmd.arg.DevID} }

const (
	commandSlots = 16 // one is running, the others are given up
	slotSize     = 256

	wakeTag   = 1 << 32
	cancelTag = 2 << 32
	pauseTag  = 3 << 32 // and the slot
	remindTag = 4 << 32
)

// remindAfter is how long somebody waits for a command before the kernel is reminded of it,
// again and again. Few commands take so long, and to those it does no harm.
const remindAfter = time.Second

// OpenControl opens the driver, and loads it if need be. The errors are
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
	c := &Control{dev: dev, prep: prep, wake: -1, ended: make(chan struct{}), givenUp: map[commandKey]*command{}, begun: map[int]bool{}}
	started := make(chan error)
	go c.thread(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start ublk control: %w", err)
	}
	return c, nil
}

// Close ends the thread once no command is running. Commands that have not started
// fail with ErrClosed. A second Close waits as well.
func (c *Control) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.notify()
	<-c.ended
}

func (c *Control) setBegun(id int, begun bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if begun {
		c.begun[id] = true
	} else {
		delete(c.begun, id)
	}
}

func (c *Control) hasBegun(id int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.begun[id]
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
func (c *Control) do(ctx context.Context, op uint32, arg uapi.UblksrvCtrlCmd, buf []byte) error {
	return c.doOrUndo(ctx, op, arg, buf, nil)
}

// doOrUndo is do for a command that leaves something behind. If the command was given
// up and succeeds after all, undo takes that away, on a goroutine of its own.
func (c *Control) doOrUndo(ctx context.Context, op uint32, arg uapi.UblksrvCtrlCmd, buf []byte, undo func(buf []byte)) error {
	if len(buf) > slotSize {
		panic("ublk: control buffer too large")
	}
	cmd := &command{op: op, arg: arg, buf: append([]byte(nil), buf...), done: make(chan struct{}), undo: undo}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return commandError(op, arg.DevID, ErrClosed)
	}
	c.queue = append(c.queue, cmd)
	c.mu.Unlock()
	c.notify()
	if err := c.wait(ctx, cmd); err != nil {
		return commandError(op, arg.DevID, err)
	}
	if err := cmd.err(); err != nil {
		return commandError(op, arg.DevID, err)
	}
	copy(buf, cmd.buf)
	return nil
}

// wait returns when cmd has ended, or with the error of ctx when it was given up.
func (c *Control) wait(ctx context.Context, cmd *command) error {
	remind := time.NewTicker(remindAfter)
	defer remind.Stop()
	for {
		select {
		case <-cmd.done:
			return nil
		case <-remind.C:
			c.mu.Lock()
			c.overdue = true
			c.mu.Unlock()
			c.notify()
		case <-ctx.Done():
			if c.giveUp(cmd) {
				return ctx.Err()
			}
			return nil
		}
	}
}

// giveUp marks a command that nobody waits for any more. It returns false if the
// command has just ended.
func (c *Control) giveUp(cmd *command) bool {
	c.mu.Lock()
	if i := slices.Index(c.queue, cmd); i >= 0 {
		c.queue = slices.Delete(c.queue, i, i+1)
	} else {
		select {
		case <-cmd.done:
			c.mu.Unlock()
			return false
		default:
			c.givenUp[cmd.key()] = cmd
		}
	}
	c.mu.Unlock()
	c.notify()
	return true
}

// err is what the kernel answered, or ErrClosed.
func (cmd *command) err() error {
	switch {
	case cmd.res == notRun:
		return ErrClosed
	case cmd.res == -enotsupp:
		return unix.EOPNOTSUPP
	case cmd.res < 0:
		return unix.Errno(-cmd.res)
	}
	return nil
}

// enotsupp is the kernel's own ENOTSUPP, for which user space has no name. Drivers
// before Linux 6.8 answer it to a command that they do not know.
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
