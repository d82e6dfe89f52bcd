// Package blockdev is asynchronous block I/O as the engine sees it: start an
// operation, be called back with its completion.
//
//	engine ── Submit(op) ──> Queue ──> disk, file
//	       <── op.Done(op) ──
//
// A Queue belongs to one thread. Submit is called on that thread and every
// Done runs on it, so a handler needs no lock for what only its own queue
// touches. Post is the one way in from other threads.
//
// RingQueue is the implementation: an io_uring on a pinned thread. Tests have
// others, in package blockdevtest.
//
// # Durability
//
// An operation that completed without error is seen by every operation
// submitted afterwards, on any queue. It survives the death of the process. It
// survives a power failure only if it was a Write with FUA, or if a Flush of
// the same file was submitted after it completed and has completed without
// error. Operations in flight at the same time on overlapping bytes take
// effect in any order; in flight at a power failure, any subset of their
// sectors may have taken effect, each sector wholly or not at all.
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
	// Discard says that the range is no longer needed; what it then reads as is
	// undefined.
	Discard
	// WriteZeroes makes the range read as zeroes. With NoUnmap the space stays
	// allocated.
	WriteZeroes
	// Allocate reserves space for the range of a regular file, growing it; it
	// reads as zeroes where nothing was written. ENOSPC when there is none.
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

// Buf is memory an operation reads into or writes from. The engine passes
// payloads on without looking into them: they may be pages of the kernel that
// this process cannot see at all.
type Buf struct {
	// Mem is process memory off the Go heap that stays mapped until Done; nil
	// when the bytes are kernel pages registered under Index.
	Mem unsafe.Pointer
	// Off is where the operation starts, in bytes from Mem or from the first
	// byte of the registered pages.
	Off int64
	// Index is the buffer's place in the ring's table, or NoIndex. It means
	// something only on the queue that the buffer came from.
	Index int32
}

// MemBuf is unregistered process memory; mem lies off the Go heap and stays
// mapped until Done.
func MemBuf(mem []byte) Buf {
	return Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: NoIndex}
}

// At is the same memory n bytes further on.
func (b Buf) At(n int64) Buf {
	b.Off += n
	return b
}

// Bytes is the n bytes at b, for doubles and tests; b must be process memory. The
// engine does not look into payloads.
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
// both alone from Submit until Done runs; then it may be used again, from
// inside Done too.
type Op struct {
	Kind    Kind
	FUA     bool // Write: durable when it completes
	NoUnmap bool // WriteZeroes: keep the space allocated
	// ForceAsync has a kernel worker start a Read or Write (IOSQE_ASYNC), because
	// to start a long one would hold up the thread.
	ForceAsync bool
	File       File
	Off        int64 // bytes
	Len        int64 // bytes
	Buf        Buf   // Read, Write

	// Reach, if it is not 0, is up to where a regular file is known to reach, in
	// bytes. A Write or Allocate of one that does not any more, because somebody has
	// cut it off, fails with EIO: making it grow again would turn what was lost into
	// zeroes. The kernel has no such write, so a RingQueue looks before and after: one
	// that comes between fails too, but it has grown the file by then.
	Reach int64

	// Err is the result, 0 on success. There are no short transfers: the whole
	// range was done, or Err is set and any part of it may have been.
	Err unix.Errno

	// Done is called once, on the queue's thread, never from inside Submit.
	Done func(*Op)

	next  *Op   // in a list of the Queue
	moved int64 // bytes done by earlier partial transfers
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

// Pinner is a Queue to which the kernel can hold memory ready: operations on
// it by its index are spared the look-up of its pages, one by one. All on the
// queue's thread.
type Pinner interface {
	// Pin makes mem known under index (see Buf.Index). Operations may use any
	// part of it by a Buf with this index, Mem at its beginning, and Off. mem lies
	// off the Go heap and stays mapped as long as there are any. An error costs no
	// more than speed: NoIndex does as well.
	Pin(mem []byte) (index int32, err error)
	// Unpin gives the place back. Operations submitted before go on as without it.
	Unpin(index int32)
}
