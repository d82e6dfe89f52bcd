package ublk

import (
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Op is what the kernel asks of a device.
type Op uint8

// The operations of the block layer that ublk passes on.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpDiscard
	OpWriteZeroes
)

func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case OpWriteZeroes:
		return "write-zeroes"
	}
	return "unknown"
}

// Request is one request of the kernel to a queue. There is one for each tag, used
// again and again. It belongs to the handler from Handle until Complete.
type Request struct {
	Op      Op
	FUA     bool  // OpWrite: durable when completed
	NoUnmap bool  // OpWriteZeroes: keep the space allocated
	Off     int64 // bytes from the start of the device; 0 for OpFlush
	Len     int64 // bytes; 0 for OpFlush
	// Buf is the payload. The handler fills it for OpRead and stores it for OpWrite.
	Buf blockdev.Buf
	// Tag is the request's number within its queue, below the queue depth. A handler
	// may keep state of its own for each tag.
	Tag int

	completer Completer
}

// Completer takes the result of a request: a ublk queue, or a test that plays
// the kernel.
type Completer interface {
	// Completed is called once for each request, on the queue's thread. errno 0 means
	// that the whole request was done.
	Completed(r *Request, errno unix.Errno)
}

// NewRequest makes the request of one tag. The queue fills it in again and again.
func NewRequest(tag int, to Completer) *Request {
	return &Request{Tag: tag, completer: to}
}

// Complete gives the request back with its result: 0, or the errno that the issuer
// shall see. It is called exactly once for each Handle, on the queue's thread.
func (r *Request) Complete(errno unix.Errno) { r.completer.Completed(r, errno) }

// Handler serves the requests of one queue.
type Handler interface {
	// Handle starts a request. It is called on the queue's thread, must not
	// block, and sees to it that r.Complete is called once, from inside Handle
	// or later.
	Handle(r *Request)
}
