//go:build giouring

package uring

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"sync/atomic"
	"unsafe"

	"github.com/pawelgaczynski/giouring"
	"golang.org/x/sys/unix"
)

// Build names the build of the package, for reports.
const Build = "giouring"

// ownSetup: it fills the array that NO_SQARRAY leaves out.
const ownSetup = 0

// queues is the pair of queues, as giouring keeps them. What it gets wrong or
// cannot do is done here instead:
//
//   - its entries are not zeroed: Ring.SQE does it
//   - the fields of Params are not exported: params has the same layout
//   - its RegisterFiles has the wrong stride, and the condition of its
//     UnregisterRingFd is inverted: register.go calls Register itself
//   - QueueExit leaves half of the mapping of 128-byte entries: close
//   - its only way to show entries to the kernel is its own system call, which
//     is never a raw one: flush
//   - PeekBatchCQE fills more than is ready: reap asks for no more than that
type queues struct {
	ring  *giouring.Ring
	batch [64]*giouring.CompletionQueueEvent

	// Fields of ring that have no accessor.
	sqTail  *uint32 // shared with the kernel
	sqFlags *uint32 // from the kernel
	sqNext  *uint32 // the tail including entries not yet shown to it
	enterFd *int
	sqes    unsafe.Pointer
}

// Both are struct io_uring_params; neither array is possible unless the sizes
// are equal.
var (
	_ [unsafe.Sizeof(params{}) - unsafe.Sizeof(giouring.Params{})]byte
	_ [unsafe.Sizeof(giouring.Params{}) - unsafe.Sizeof(params{})]byte
)

func (q *queues) setup(entries uint32, p *params) (int, unix.Errno) {
	q.ring = giouring.NewRing()
	if err := q.ring.QueueInitParams(entries, (*giouring.Params)(unsafe.Pointer(p))); err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) {
			return -1, errno
		}
		return -1, unix.ENOMEM
	}
	ring := reflect.ValueOf(q.ring).Elem()
	sq := ring.FieldByName("sqRing").Elem()
	q.sqTail = (*uint32)(sq.FieldByName("tail").UnsafePointer())
	q.sqFlags = (*uint32)(sq.FieldByName("flags").UnsafePointer())
	q.sqNext = (*uint32)(unsafe.Pointer(sq.FieldByName("sqeTail").UnsafeAddr()))
	q.sqes = sq.FieldByName("sqes").UnsafePointer()
	q.enterFd = (*int)(unsafe.Pointer(ring.FieldByName("enterRingFd").UnsafeAddr()))
	return int(ring.FieldByName("ringFd").Int()), 0
}

func (q *queues) close(_ int, flags uint32) error {
	var err error
	if flags&ioringSetupSQE128 != 0 {
		half := uintptr(q.ring.SQReady()+q.ring.SQSpaceLeft()) * unsafe.Sizeof(SQE{})
		// Below a page there is no second half to leave behind.
		if half >= uintptr(os.Getpagesize()) {
			if e := unix.MunmapPtr(unsafe.Add(q.sqes, half), half); e != nil {
				err = fmt.Errorf("close ring: %w", e)
			}
		}
	}
	q.ring.QueueExit()
	return err
}

func (q *queues) next() *SQE { return (*SQE)(unsafe.Pointer(q.ring.GetSQE())) }

func (q *queues) flush() uint32 {
	atomic.StoreUint32(q.sqTail, *q.sqNext)
	return q.ring.SQReady()
}

func (q *queues) ready() uint32 { return q.ring.CQReady() }

func (q *queues) reap(dst []CQE) int {
	got := 0
	for got < len(dst) {
		n := min(int(q.ring.CQReady()), len(dst)-got, len(q.batch))
		if n == 0 {
			break
		}
		q.ring.PeekBatchCQE(q.batch[:n])
		for i, c := range q.batch[:n] {
			dst[got+i] = CQE{UserData: c.UserData, Res: c.Res, Flags: c.Flags}
		}
		q.ring.CQAdvance(uint32(n))
		got += n
	}
	return got
}

func (q *queues) overflowed() bool { return q.ring.CQHasOverflow() }

// due says that the next enter moves completions into the queue.
func (q *queues) due() bool {
	return atomic.LoadUint32(q.sqFlags)&(ioringSQCQOverflow|ioringSQTaskrun) != 0
}

func (q *queues) enter(_ int, submit, min, flags uint32) unix.Errno {
	_, err := q.ring.Enter2(submit, min, flags, nil, 0)
	if err == nil {
		return 0
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return unix.EIO
	}
	return errno
}

// entersBy tells what enter will be given as fd from now on.
func (q *queues) entersBy(fd int) { *q.enterFd = fd }

func (q *queues) register(fd int, op uint32, arg unsafe.Pointer, n uint32) (int, unix.Errno) {
	r, errno := q.ring.Register(fd, op, arg, n)
	return int(r), errno
}
