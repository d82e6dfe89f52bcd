package ublk

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// The thread of a Control takes commands from the queue one at a time, hands them to
// the kernel on its ring, and tells those who wait when a command has ended.

// controlThread is what only the thread of a Control touches.
type controlThread struct {
	*Control
	ring     *uring.Ring
	running  [commandSlots]*command // by slot: in the kernel's hands
	current  int                    // slot of the one that is waited for, -1 if none
	inFlight int
	polling  bool // the eventfd is being watched
	reminded bool // the kernel is being reminded
}

func (c *Control) thread(started chan<- error) {
	// The thread is never unlocked, because the kernel's worker threads belong to it.
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
	// A command and the cancellation of another one may come together.
	t.ring, err = uring.New(uring.Config{Entries: 4 * commandSlots, SQE128: true})
	return err
}

// close gives everything back, except the memory if the kernel still works on
// commands: then it stays mapped for good.
func (t *controlThread) close(err error) {
	t.mu.Lock()
	t.closed = true
	for _, cmd := range t.queue {
		cmd.res = notRun
		close(cmd.done)
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
	for _, cmd := range t.running {
		if cmd != nil {
			cmd.res = notRun
			t.finish(cmd)
		}
	}
	close(t.ended)
}

func (t *controlThread) run() error {
	var cqes [8]uring.CQE
	for {
		if !t.polling {
			sqe := t.ring.SQE()
			sqe.PrepPollAdd(t.wake, unix.POLLIN)
			sqe.UserData = wakeTag
			t.polling = true
		}
		if t.startNext() {
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

// startNext gives up the current command if nobody waits for it. Then it starts the
// next command, skipping those whose like hangs. It says whether the thread shall
// end.
func (t *controlThread) startNext() (end bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current >= 0 && t.givenUp[t.running[t.current].key()] == t.running[t.current] {
		sqe := t.ring.SQE()
		sqe.PrepCancel(uint64(t.current))
		sqe.UserData = cancelTag
		t.current = -1
	}
	if t.overdue {
		t.overdue = false
		t.remind()
	}
	if t.closed {
		return t.current < 0
	}
	for t.current < 0 {
		i := slices.IndexFunc(t.queue, func(cmd *command) bool { return t.givenUp[cmd.key()] == nil })
		if i < 0 {
			break
		}
		cmd := t.queue[i]
		t.queue = slices.Delete(t.queue, i, i+1)
		t.start(cmd)
	}
	return false
}

func (t *controlThread) start(cmd *command) {
	slot := -1
	for i, r := range t.running {
		if r == nil {
			slot = i
			break
		}
	}
	if slot < 0 {
		// Every slot holds a command that the kernel has not ended.
		cmd.res = -int32(unix.EBUSY)
		close(cmd.done)
		return
	}
	mem := t.mem[slot*slotSize : slot*slotSize+len(cmd.buf)]
	copy(mem, cmd.buf)
	if len(mem) > 0 {
		cmd.arg.Addr = uint64(uintptr(unsafe.Pointer(&mem[0])))
		cmd.arg.Len = uint16(len(mem))
	}
	t.running[slot] = cmd
	t.current = slot
	t.inFlight++
	t.issue(slot)
}

// remind gives the kernel's workers something to do, so that one of them wakes, or is made,
// and finds what was forgotten.
func (t *controlThread) remind() {
	if t.inFlight == 0 || t.reminded {
		return
	}
	t.reminded = true
	sqe := t.ring.SQE()
	sqe.PrepNop()
	sqe.Flags |= uring.IOSQE_ASYNC
	sqe.UserData = remindTag
}

// issue makes the entry of the command in slot.
func (t *controlThread) issue(slot int) {
	sqe := t.ring.SQE()
	t.prep(sqe, t.dev, t.running[slot])
	sqe.UserData = uint64(slot)
}

// wanted says whether somebody still waits for the command in slot.
func (t *controlThread) wanted(slot int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	cmd := t.running[slot]
	return t.givenUp[cmd.key()] != cmd && !t.closed
}

func prepCommand(sqe *uring.SQE, dev int, cmd *command) {
	sqe.PrepCommand(dev, cmd.op)
	*(*uapi.UblksrvCtrlCmd)(unsafe.Pointer(sqe.Cmd80())) = cmd.arg
}

func (t *controlThread) complete(cqe uring.CQE) {
	switch {
	case cqe.UserData == wakeTag:
		var n [8]byte
		_, _ = unix.Read(t.wake, n[:]) // to zero; it was readable
		t.polling = false
	case cqe.UserData == remindTag:
		t.reminded = false
	case cqe.UserData&^(commandSlots-1) == pauseTag:
		slot := int(cqe.UserData & (commandSlots - 1))
		if t.wanted(slot) {
			t.issue(slot)
		} else {
			t.took(slot, -int32(unix.ECANCELED))
		}
	case cqe.UserData < commandSlots:
		slot := int(cqe.UserData)
		if cqe.Res == -int32(unix.ECANCELED) && t.wanted(slot) {
			// The kernel had no worker for the command, and could not make one just
			// then: see internal/blockdev/ring_pause.go. The command has not begun.
			sqe := t.ring.SQE()
			sqe.PrepTimeout(&retryPause, 0, 0)
			sqe.UserData = pauseTag | uint64(slot)
			return
		}
		t.took(slot, cqe.Res)
	}
}

// took takes the kernel's answer to the command in slot.
func (t *controlThread) took(slot int, res int32) {
	cmd := t.running[slot]
	t.running[slot] = nil
	t.inFlight--
	if t.current == slot {
		t.current = -1
	}
	cmd.res = res
	copy(cmd.buf, t.mem[slot*slotSize:])
	t.finish(cmd)
}

// finish ends a command. It tells the caller who waits for it, or undoes the command
// if it was given up.
func (t *controlThread) finish(cmd *command) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.givenUp[cmd.key()] == cmd {
		delete(t.givenUp, cmd.key())
		if cmd.undo != nil && cmd.res >= 0 {
			go cmd.undo(cmd.buf)
		}
	}
	close(cmd.done)
}
