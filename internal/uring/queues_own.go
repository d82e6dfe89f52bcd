//go:build !giouring

package uring

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Build names the build of the package, for reports.
const Build = "own"

// ownSetup: entry i is always at place i, so the kernel need not be told where
// (Linux 6.6).
const ownSetup = ioringSetupNoSQArray

// queues is the pair of queues. All counters run freely over 2^32 and are
// compared by their difference only.
type queues struct {
	sqHead    *uint32 // moved by the kernel
	sqTail    *uint32 // moved by us
	sqFlags   *uint32
	sqNext    uint32 // the tail including entries not yet shown to the kernel
	sqMask    uint32
	sqEntries uint32
	sqes      unsafe.Pointer
	sqeShift  uint8 // log2 of the size of an entry

	cqHead *uint32 // moved by us
	cqTail *uint32 // moved by the kernel
	cqMask uint32
	cqes   unsafe.Pointer

	ringMem []byte
	sqeMem  []byte
}

func (q *queues) setup(entries uint32, p *params) (int, unix.Errno) {
	r, _, errno := syscall.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
	if errno != 0 {
		return -1, errno
	}
	fd := int(r)
	if p.features&ioringFeatSingleMmap == 0 {
		// Older than 5.4: New refuses it by the features, without mappings.
		return fd, 0
	}
	ringLen := max(uintptr(p.sqOff.array)+uintptr(p.sqEntries)*4,
		uintptr(p.cqOff.cqes)+uintptr(p.cqEntries)*unsafe.Sizeof(CQE{}))
	q.sqeShift = 6
	if p.flags&ioringSetupSQE128 != 0 {
		q.sqeShift = 7
	}
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	q.ringMem, err = unix.Mmap(fd, ioringOffSQRing, int(ringLen), prot, flags)
	if err == nil {
		q.sqeMem, err = unix.Mmap(fd, ioringOffSQEs, int(p.sqEntries)<<q.sqeShift, prot, flags)
	}
	if err != nil {
		q.close(fd, p.flags)
		var e unix.Errno
		if errors.As(err, &e) {
			return -1, e
		}
		return -1, unix.ENOMEM
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&q.ringMem[off])) }
	q.sqHead, q.sqTail, q.sqFlags = at(p.sqOff.head), at(p.sqOff.tail), at(p.sqOff.flags)
	q.sqMask, q.sqEntries = *at(p.sqOff.ringMask), *at(p.sqOff.ringEntries)
	q.sqes = unsafe.Pointer(&q.sqeMem[0])
	q.sqNext = *q.sqTail
	q.cqHead, q.cqTail = at(p.cqOff.head), at(p.cqOff.tail)
	q.cqMask = *at(p.cqOff.ringMask)
	q.cqes = unsafe.Pointer(&q.ringMem[p.cqOff.cqes])
	if p.flags&ioringSetupNoSQArray == 0 {
		for i := range p.sqEntries {
			*at(p.sqOff.array + 4*i) = i
		}
	}
	return fd, 0
}

func (q *queues) close(fd int, _ uint32) error {
	var first error
	for _, mem := range [][]byte{q.sqeMem, q.ringMem} {
		if mem == nil {
			continue
		}
		if err := unix.Munmap(mem); err != nil && first == nil {
			first = err
		}
	}
	q.sqeMem, q.ringMem = nil, nil
	if err := unix.Close(fd); err != nil && first == nil {
		first = err
	}
	if first != nil {
		return fmt.Errorf("close ring: %w", first)
	}
	return nil
}

// next hands out a free entry, nil if there is none.
func (q *queues) next() *SQE {
	if q.sqNext-atomic.LoadUint32(q.sqHead) >= q.sqEntries {
		return nil
	}
	s := unsafe.Add(q.sqes, uintptr(q.sqNext&q.sqMask)<<q.sqeShift)
	q.sqNext++
	return (*SQE)(s)
}

// unsubmitted is how many entries the kernel has not taken.
func (q *queues) unsubmitted() uint32 { return q.sqNext - atomic.LoadUint32(q.sqHead) }

// flush shows the filled entries to the kernel and returns how many wait.
func (q *queues) flush() uint32 {
	atomic.StoreUint32(q.sqTail, q.sqNext)
	return q.unsubmitted()
}

func (q *queues) ready() uint32 { return atomic.LoadUint32(q.cqTail) - *q.cqHead }

func (q *queues) reap(dst []CQE) int {
	head := *q.cqHead
	n := min(atomic.LoadUint32(q.cqTail)-head, uint32(len(dst)))
	if n == 0 {
		return 0
	}
	for i := range n {
		dst[i] = *(*CQE)(unsafe.Add(q.cqes, uintptr((head+i)&q.cqMask)*unsafe.Sizeof(CQE{})))
	}
	atomic.StoreUint32(q.cqHead, head+n)
	return int(n)
}

func (q *queues) overflowed() bool {
	return atomic.LoadUint32(q.sqFlags)&ioringSQCQOverflow != 0
}

// due says that the next enter moves completions into the queue.
func (q *queues) due() bool {
	return atomic.LoadUint32(q.sqFlags)&(ioringSQCQOverflow|ioringSQTaskrun) != 0
}

func (q *queues) enter(fd int, submit, min, flags uint32) unix.Errno {
	_, _, errno := syscall.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(fd),
		uintptr(submit), uintptr(min), uintptr(flags), 0, 0)
	return errno
}

// entersBy tells what enter will be given as fd from now on.
func (q *queues) entersBy(int) {}

func (q *queues) register(fd int, op uint32, arg unsafe.Pointer, n uint32) (int, unix.Errno) {
	r, _, errno := syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), uintptr(op), uintptr(arg), uintptr(n), 0, 0)
	return int(r), errno
}
