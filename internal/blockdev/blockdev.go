// Package blockdev is asynchronous block I/O as the engine sees it. The engine
// starts an operation, and the queue calls back when the operation is complete.
//
//	engine ── Submit(op) ──> Queue ──> disk, file
//	       <── op.Done(op) ──
//
// A Queue belongs to one thread. Submit is called on that thread, and every Done
// runs on it. So a handler needs no lock for what only its own queue touches. Other
// threads reach the queue through Post alone.
//
// RingQueue is the implementation: an io_uring on a pinned thread. Tests have
// others, in package blockdevtest.
//
// # Durability
//
// An operation that completed without error is seen by every operation submitted
// afterwards, on any queue. It survives the death of the process. It survives a
// power failure in two cases: it was a Write with FUA, or a Flush of the same file
// was submitted after it completed, and that Flush has completed without error.
//
// Operations in flight at the same time on overlapping bytes take effect in any
// order. If the power fails, any subset of the sectors of the operations in flight
// may have taken effect, each sector wholly or not at all.
package blockdev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kind says what an operation does.
type Kind uint8

const (
	// Read fills Buf from the file.
	Read Kind = iota
	// Write stores Buf in the file; with FUA it is durable when it completes.
	Write
	// Flush makes every completed write of the file durable. Off and Len are
	// ignored.
	Flush
	// Discard says that nobody needs the range any longer. What a read of it then
	// returns is undefined.
	Discard
	// WriteZeroes makes the range read as zeroes. With NoUnmap the space stays
	// allocated.
	WriteZeroes
	// Allocate reserves space for the range of a regular file, and makes the file
	// grow if need be. The range reads as zeroes where nothing was written. It fails
	// with ENOSPC if there is no space.
	Allocate
)

func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Flush:
		return "flush"
	case Discard:
		return "discard"
	case WriteZeroes:
		return "write-zeroes"
	case Allocate:
		return "allocate"
	}
	return "unknown"
}

// NoIndex is the Index of a Buf that is not registered with the ring.
const NoIndex = -1

// Buf is the memory that an operation reads into or writes from. The engine passes
// payloads on without looking into them, because they may be pages of the kernel
// that this process cannot see at all.
type Buf struct {
	// Mem is process memory off the Go heap that stays mapped until Done. It is nil
	// if the bytes are pages of the kernel, registered under Index.
	Mem unsafe.Pointer
	// Off is where the operation starts, in bytes from Mem or from the first
	// byte of the registered pages.
	Off int64
	// Index is the buffer's place in the ring's table, or NoIndex. It means
	// something only on the queue that the buffer came from.
	Index int32
}

// MemBuf is the Buf of memory that is not registered. mem lies off the Go heap and
// stays mapped until Done.
func MemBuf(mem []byte) Buf {
	return Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: NoIndex}
}

// At is the same memory n bytes further on.
func (b Buf) At(n int64) Buf {
	b.Off += n
	return b
}

// Bytes is the n bytes at b, which must be process memory. Besides doubles and tests
// only encryption may call it (diffarea.Seal), because the engine does not look into
// payloads.
func (b Buf) Bytes(n int64) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(b.Mem, b.Off)), n)
}

// File is something a Queue can operate on. Each Queue implementation has its
// own.
type File interface {
	// Name says what the file is to a person: a path, or a name in a test.
	Name() string
}

// Op is one operation. The caller owns it and the memory behind it, and leaves
// both alone from Submit until Done runs. After that the caller may use the Op
// again, from inside Done too.
type Op struct {
	Kind    Kind
	FUA     bool // Write: durable when it completes
	NoUnmap bool // WriteZeroes: keep the space allocated
	// ForceAsync has a kernel worker start a Read or Write (IOSQE_ASYNC). It is for
	// a long one: starting it takes time, and would hold up the queue's thread.
	ForceAsync bool
	File       File
	Off        int64 // bytes
	Len        int64 // bytes
	Buf        Buf   // Read, Write

	// MinSize, if it is not 0, is the size that a regular file is known to have at
	// least, in bytes. If somebody has truncated it since, a Write or Allocate fails
	// with EIO, because it would make the file grow again and turn what was lost into
	// zeroes. The kernel has no operation that does this, so a RingQueue looks at the
	// size before and after. If the file is truncated in between, the operation fails
	// too, but it has made the file grow by then.
	MinSize int64

	// Err is the result, 0 on success. There are no short transfers: either the
	// whole range was done, or Err is set and any part of the range may have been
	// done.
	Err unix.Errno

	// Done is called once, on the queue's thread, never from inside Submit.
	Done func(*Op)

	next        *Op   // in a list of the Queue
	transferred int64 // bytes done by earlier partial transfers
}

// Task is a piece of work for another thread. The poster owns it and may post
// it again once Run has begun.
type Task struct {
	Run  func()
	next *Task
}

// Queue starts operations and delivers their completions on one thread.
type Queue interface {
	// Submit starts op; called on the queue's thread only. It never blocks and
	// never fails: errors arrive in op.Err.
	Submit(op *Op)
	// Post runs t.Run on the queue's thread, soon, in the order of posting;
	// called from any thread. A task must not be posted twice at a time.
	Post(t *Task)
}

// Pinner is a Queue that can keep memory registered with the kernel. An operation
// that names such memory by its index spares the kernel the look-up of each page.
// Its methods are called on the queue's thread.
type Pinner interface {
	// Pin registers mem and returns its index (see Buf.Index). Operations may use
	// any part of mem, by a Buf with this index, Mem at the beginning of mem, and
	// Off. mem lies off the Go heap and stays mapped as long as such operations are
	// under way. If Pin fails, only speed is lost: a Buf with NoIndex works as well.
	Pin(mem []byte) (index int32, err error)
	// Unpin gives the index back. Operations that were submitted before are not
	// disturbed.
	Unpin(index int32)
}
