package blockdev

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// This file has the way of an operation: it gets a slot, an entry for the kernel, and
// the kernel's answer. If a part is left, or has to be tried in another way, it gets a
// further entry.

const (
	// maxTransfer is the most that one ring entry reads or writes. The kernel
	// itself stops a page short of 2 GiB.
	maxTransfer = 1 << 30
	// maxTries bounds the repetitions after EAGAIN.
	maxTries = 16
)

// slot is an operation in the ring.
type slot struct {
	op      *Op
	method  method
	tries   uint8  // EAGAIN seen
	cancels uint16 // ECANCELED seen
	async   bool   // leave it to a kernel worker
}

// opList is a first-in first-out list through Op.next.
type opList struct{ head, tail *Op }

func (l *opList) push(op *Op) {
	op.next = nil
	if l.tail == nil {
		l.head = op
	} else {
		l.tail.next = op
	}
	l.tail = op
}

func (l *opList) pop() *Op {
	op := l.head
	if op == nil {
		return nil
	}
	l.head = op.next
	if l.head == nil {
		l.tail = nil
	}
	op.next = nil
	return op
}

// Submit starts op. Its File is an *OSFile.
func (q *RingQueue) Submit(op *Op) {
	op.Err = 0
	op.transferred = 0
	switch {
	case op.Kind != Flush && (op.Off < 0 || op.Len <= 0):
		op.Err = unix.EINVAL
		q.finished.push(op)
	case op.File.(*OSFile).truncated(op.MinSize):
		op.Err = unix.EIO
		q.finished.push(op)
	case len(q.free) == 0 || q.waiting.head != nil:
		q.waiting.push(op)
	default:
		q.start(op)
	}
}

// startWaiting gives free slots to the operations that have waited longest.
func (q *RingQueue) startWaiting() {
	for q.waiting.head != nil && len(q.free) > 0 {
		q.start(q.waiting.pop())
	}
}

// start gives op a slot and an entry.
func (q *RingQueue) start(op *Op) {
	n := len(q.free) - 1
	i := q.free[n]
	q.free = q.free[:n]
	q.slots[i] = slot{op: op, method: firstMethod(op), async: op.ForceAsync}
	q.inFlight++
	q.issue(i)
}

// issue makes the entry for the rest of a slot's operation.
func (q *RingQueue) issue(i uint32) {
	sl := &q.slots[i]
	op := sl.op
	file := op.File.(*OSFile)
	s := q.sqe()
	fd, fixed := q.fileRef(file)
	off, n := uint64(op.Off+op.transferred), uint64(op.Len-op.transferred)
	switch sl.method {
	case methodDiscard:
		s.PrepCommand(fd, blockDiscard)
		s.Addr = off
		s.Addr3 = n
	case methodPunch:
		s.PrepFallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	case methodZero:
		s.PrepFallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
	case methodWriteZeroes:
		addr := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(Zeroes()))))
		s.PrepWrite(fd, addr, uint32(min(n, zeroesLen)), off, 0)
	case methodPlain:
		q.preparePlain(s, op, fd, off, n)
	}
	if fixed {
		s.SetFixedFile()
	}
	if sl.async {
		s.Flags |= uring.IOSQE_ASYNC
	}
	s.UserData = kindOp | uint64(i)
}

func (q *RingQueue) preparePlain(s *uring.SQE, op *Op, fd int, off, n uint64) {
	length := uint32(min(n, q.maxTransfer))
	// For pages of the kernel Mem is nil, and the offset itself is the address.
	addr := uint64(uintptr(op.Buf.Mem)) + uint64(op.Buf.Off+op.transferred)
	index := q.bufIndex(op.Buf)
	switch op.Kind {
	case Read:
		if index == NoIndex {
			s.PrepRead(fd, addr, length, off, 0)
		} else {
			s.PrepReadFixed(fd, addr, length, off, 0, index)
		}
	case Write:
		var flags uint32
		if op.FUA {
			flags = unix.RWF_DSYNC
		}
		if index == NoIndex {
			s.PrepWrite(fd, addr, length, off, flags)
		} else {
			s.PrepWriteFixed(fd, addr, length, off, flags, index)
		}
	case Flush:
		s.PrepFsync(fd, uring.IORING_FSYNC_DATASYNC)
	case Allocate:
		s.PrepFallocate(fd, 0, off, n)
	default:
		panic("blockdev: unknown kind of operation")
	}
}

// fileRef is how an entry names file: by its place among the registered files, or else
// by its file descriptor. Only a few files are registered.
func (q *RingQueue) fileRef(file *OSFile) (fd int, fixed bool) {
	for i, f := range q.cfg.Files {
		if f == file {
			return i, true
		}
	}
	return file.fd, false
}

// completed goes on with slot i after the kernel's answer res.
func (q *RingQueue) completed(i uint32, res int32) {
	sl := &q.slots[i]
	op := sl.op
	transfer := op.Kind == Read || op.Kind == Write || sl.method == methodWriteZeroes
	var errno unix.Errno
	switch {
	case res < 0:
		errno = unix.Errno(-res)
		switch errno {
		case unix.EINTR:
			q.issue(i)
			return
		case unix.EAGAIN:
			if sl.tries < maxTries {
				sl.tries++
				sl.async = true // the kernel cannot do it without blocking
				q.issue(i)
				return
			}
		case unix.ECANCELED:
			if q.pause(i) {
				return
			}
		case unix.EOPNOTSUPP:
			if m, ok := nextMethod(op, sl.method); ok {
				sl.method = m
				q.issue(i)
				return
			}
		}
	case transfer && res == 0:
		// This is the end of the file or device, so nothing more will come.
		errno = unix.EIO
	case transfer:
		op.transferred += int64(res)
		if op.transferred < op.Len {
			sl.tries, sl.cancels, sl.async = 0, 0, op.ForceAsync
			q.issue(i)
			return
		}
	}
	if errno == 0 && op.File.(*OSFile).truncated(op.MinSize) {
		errno = unix.EIO
	}
	*sl = slot{}
	q.free = append(q.free, i)
	q.inFlight--
	op.Err = errno
	op.Done(op)
}
