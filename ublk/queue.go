package ublk

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// queue serves one hardware queue of a device, on the thread of its ring.
//
//	kernel                 queue                      handler
//	  │ FETCH(tag) done ──> decode descriptor ──────> Handle(r)
//	  │                                                 │  now or later
//	  │ <── COMMIT_AND_FETCH(tag, result) <───────── r.Complete(errno)
//
// One entry commits a request and fetches the tag's next one. The entry leaves with
// the ring's next system call, together with all others of the same turn. Nothing
// here allocates or locks.
type queue struct {
	id       uint16
	ring     *blockdev.RingQueue
	handler  Handler
	desc     []uapi.UblksrvIODesc // by tag; shared with the kernel
	reqs     []Request            // by tag
	tags     []tagState           // by tag
	maxIO    int64
	zeroCopy bool
	payload  unsafe.Pointer // copy mode: the buffers, maxIO each, by tag

	descMem     []byte
	payloadMem  []byte
	fetchTask   blockdev.Task
	fetchFailed func(error) // called on the ring's thread if the kernel refuses a FETCH
	// untrusted: the driver shall take this queue's server for one that is not root's, and
	// so not look for partitions. See Config.NoPartScan.
	untrusted bool

	tries        []uint32      // by tag: registrations of the payload under way or done by command
	unregistered atomic.Uint64 // payloads that could not be registered
}

// tagState is where a tag is.
//
//	fetching ──request──> handling ──Complete──> committed ──┐
//	    │                    ^                       │       │
//	    └──────abort──> ended└────────request────────┘       │
//	                      ^                        abort     │
//	                      └──────────────────────────────────┘
//
// If the kernel could not register a request's payload with the fetch, the state
// registering comes before handling.
type tagState uint8

const (
	tagFetching    tagState = iota // its first FETCH is in the kernel
	tagRegistering                 // its payload is being registered
	tagHandling                    // the handler has its request
	tagCommitted                   // a COMMIT_AND_FETCH is in the kernel
	tagEnded                       // the kernel wants it no more
)

// cdevFile is the place of /dev/ublkcN among the files of a queue's ring.
const cdevFile = 0

func descBytes(depth int) int {
	page := os.Getpagesize()
	return (depth*int(unsafe.Sizeof(uapi.UblksrvIODesc{})) + page - 1) / page * page
}

// mapDescriptors maps the descriptors of queue q of the device behind fd.
func mapDescriptors(fd, q, depth int) ([]byte, error) {
	off := int64(uapi.UBLKSRV_CMD_BUF_OFFSET) + int64(q)*int64(descBytes(uapi.UBLK_MAX_QUEUE_DEPTH))
	mem, err := unix.Mmap(fd, off, descBytes(depth), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map descriptors of queue %d: %w", q, err)
	}
	return mem, nil
}

// newQueue maps the buffers that queue id needs. The device starts the queue's ring.
// The queue can serve after describe was called.
func newQueue(id, depth, maxIO int, zeroCopy bool) (*queue, error) {
	q := &queue{
		id:       uint16(id),
		reqs:     make([]Request, depth),
		tags:     make([]tagState, depth),
		maxIO:    int64(maxIO),
		zeroCopy: zeroCopy,
		tries:    make([]uint32, depth),
	}
	for tag := range q.reqs {
		q.reqs[tag] = *NewRequest(tag, q)
	}
	q.fetchTask.Run = q.fetchAll
	if zeroCopy {
		return q, nil
	}
	mem, err := unix.Mmap(-1, 0, depth*maxIO, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of buffers for queue %d: %w", depth*maxIO, id, err)
	}
	// The kernel pins pages one by one, so a few large ones are faster. If it gives
	// none, only speed is lost.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	_ = unix.Madvise(mem, unix.MADV_DONTFORK)
	q.payloadMem = mem
	q.payload = unsafe.Pointer(unsafe.SliceData(mem))
	return q, nil
}

// describe gives the queue its descriptors, which are its own from then on.
func (q *queue) describe(desc []byte) {
	q.descMem = desc
	q.desc = unsafe.Slice((*uapi.UblksrvIODesc)(unsafe.Pointer(unsafe.SliceData(desc))), len(q.reqs))
}

// buffers are the queue's buffers, by tag. With zero copy they are empty, and the
// kernel puts the pages of each request in their places.
func (q *queue) buffers() [][]byte {
	bufs := make([][]byte, len(q.reqs))
	for tag := range bufs {
		if q.zeroCopy {
			break
		}
		bufs[tag] = q.payloadMem[tag*int(q.maxIO) : (tag+1)*int(q.maxIO)]
	}
	return bufs
}

// unmap gives the memory back, once the ring has ended.
func (q *queue) unmap() {
	for _, mem := range [][]byte{q.descMem, q.payloadMem} {
		if mem != nil {
			_ = unix.Munmap(mem)
		}
	}
	q.descMem, q.payloadMem, q.desc = nil, nil, nil
}

// fetchAll asks for the first request of every tag.
func (q *queue) fetchAll() {
	if q.untrusted {
		if err := dropAdmin(); err != nil {
			q.fetchFailed(fmt.Errorf("queue %d: give CAP_SYS_ADMIN up: %w", q.id, err))
			return
		}
	}
	for tag := range q.reqs {
		q.issue(uapi.UBLK_U_IO_FETCH_REQ, uint32(tag), 0)
	}
}

// dropAdmin takes CAP_SYS_ADMIN from the calling thread alone, for good. Nothing that a
// queue's thread does needs it.
func dropAdmin() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData // low and high half
	if err := unix.Capget(&h, &caps[0]); err != nil {
		return err
	}
	caps[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
	return unix.Capset(&h, &caps[0])
}

// issue makes the entry of a command for tag.
func (q *queue) issue(op, tag uint32, result int32) {
	q.fill(q.ring.Command(tag), op, tag, result)
}

func (q *queue) fill(sqe *uring.SQE, op, tag uint32, result int32) {
	cmd := q.command(sqe, op, tag)
	cmd.Result = result
	if q.zeroCopy {
		// Where the pages of the tag's next request are to be registered.
		sqe.Addr = uapi.UblkAutoBufReg{Index: uint16(tag), Flags: uapi.UBLK_AUTO_BUF_REG_FALLBACK}.SqeAddr()
	} else {
		cmd.Addr = uint64(uintptr(q.payload)) + uint64(tag)*uint64(q.maxIO)
	}
}

// command makes sqe a command for tag and returns its own part.
func (q *queue) command(sqe *uring.SQE, op, tag uint32) *uapi.UblksrvIOCmd {
	sqe.PrepCommand(cdevFile, op)
	sqe.SetFixedFile()
	cmd := (*uapi.UblksrvIOCmd)(unsafe.Pointer(sqe.Cmd()))
	cmd.QID = q.id
	cmd.Tag = uint16(tag)
	return cmd
}

// onCommand gets the kernel's answer to the command of tag.
func (q *queue) onCommand(tag uint32, res int32) {
	switch {
	case tag&forRegister != 0:
		q.registered(tag&^forRegister, res)
		return
	case tag&forPause != 0:
		q.register(tag &^ forPause)
		return
	case tag&forUnregister != 0:
		return // if it failed: the kernel lets go of the pages with their last use
	}
	state := q.tags[tag]
	switch {
	case res == uapi.UBLK_IO_RES_OK && (state == tagFetching || state == tagCommitted):
		q.tags[tag] = tagHandling
		q.serve(tag)
	case res == uapi.UBLK_IO_RES_ABORT:
		q.tags[tag] = tagEnded
	case state == tagFetching:
		q.tags[tag] = tagEnded
		q.fetchFailed(fmt.Errorf("fetch tag %d of queue %d: %w", tag, q.id, unix.Errno(-res)))
	default:
		// The kernel refused the result of a request, which would now wait for ever.
		// When this process dies, the request gets an error or a new server.
		panic(fmt.Sprintf("ublk: queue %d tag %d state %d: kernel answered %d", q.id, tag, state, res))
	}
}

// serve hands the request of tag to the handler.
func (q *queue) serve(tag uint32) {
	r := &q.reqs[tag]
	d := &q.desc[tag]
	if errno := r.decode(d.OpFlags, d.NrSectors, d.StartSector, q.maxIO); errno != 0 {
		q.Completed(r, errno)
		return
	}
	if d.OpFlags&uapi.UBLK_IO_F_NEED_REG_BUF != 0 && r.Op <= OpWrite {
		q.tags[tag] = tagRegistering
		q.register(tag)
		return
	}
	q.handle(tag)
}

func (q *queue) handle(tag uint32) {
	r := &q.reqs[tag]
	r.Buf = blockdev.Buf{Index: int32(tag)}
	if !q.zeroCopy {
		r.Buf.Mem = unsafe.Add(q.payload, int64(tag)*q.maxIO)
	}
	q.handler.Handle(r)
}

// If the kernel has no memory to register a payload with the fetch, a command of its
// own registers the payload, and another one unregisters it. Both use the tag's place
// in the table. A bit in their user_data says which command it is.
const (
	forRegister   = 1 << 31
	forUnregister = 1 << 30
	forPause      = 1 << 29 // before it is tried again
	// maxTries is how often that is tried: for a minute or longer.
	maxTries = 1 << 16
)

// retryPause is a millisecond. It lies off the heap, because the kernel reads it.
var retryPause = uring.Timespec{Nsec: 1e6}

func (q *queue) register(tag uint32) {
	q.tries[tag]++
	q.command(q.ring.Command(tag|forRegister), uapi.UBLK_U_IO_REGISTER_IO_BUF, tag).Addr = uint64(tag)
}

// registered takes the kernel's answer to register.
func (q *queue) registered(tag uint32, res int32) {
	switch {
	case res == 0:
		q.tags[tag] = tagHandling
		q.handle(tag)
	case (res == -int32(unix.ENOMEM) || res == -int32(unix.EBUSY)) && q.tries[tag] < maxTries:
		q.ring.Command(tag|forPause).PrepTimeout(&retryPause, 0, 0)
	default:
		q.unregistered.Add(1)
		q.tries[tag] = 0
		q.tags[tag] = tagHandling
		q.Completed(&q.reqs[tag], unix.EIO)
	}
}

// decode fills the request from its descriptor, except Buf and Tag. If no handler can
// serve the request, it returns the errno to answer.
func (r *Request) decode(opFlags, sectors uint32, start uint64, maxIO int64) unix.Errno {
	r.FUA = false
	r.NoUnmap = false
	r.Off = int64(start) * sector.Size
	r.Len = int64(sectors) * sector.Size
	switch opFlags & 0xff {
	case uapi.UBLK_IO_OP_READ:
		r.Op = OpRead
	case uapi.UBLK_IO_OP_WRITE:
		r.Op = OpWrite
		r.FUA = opFlags&uapi.UBLK_IO_F_FUA != 0
	case uapi.UBLK_IO_OP_FLUSH:
		r.Op = OpFlush
		r.Off, r.Len = 0, 0
		return 0
	case uapi.UBLK_IO_OP_DISCARD:
		r.Op = OpDiscard
	case uapi.UBLK_IO_OP_WRITE_ZEROES:
		r.Op = OpWriteZeroes
		r.NoUnmap = opFlags&uapi.UBLK_IO_F_NOUNMAP != 0
	default:
		return unix.EOPNOTSUPP // WRITE_SAME, zones
	}
	if start > 1<<54 || sectors == 0 {
		return unix.EINVAL
	}
	if r.Op <= OpWrite {
		if r.Len > maxIO {
			return unix.EINVAL // longer than its buffer
		}
	}
	return 0
}

// Completed commits a request with its result. Implements Completer.
func (q *queue) Completed(r *Request, errno unix.Errno) {
	tag := r.Tag
	if q.tags[tag] != tagHandling {
		panic(fmt.Sprintf("ublk: queue %d tag %d: %s completed twice", q.id, tag, r.Op))
	}
	q.tags[tag] = tagCommitted
	if q.tries[tag] > 0 {
		q.tries[tag] = 0
		q.command(q.ring.Command(uint32(tag)|forUnregister), uapi.UBLK_U_IO_UNREGISTER_IO_BUF, uint32(tag)).Addr = uint64(tag)
	}
	q.issue(uapi.UBLK_U_IO_COMMIT_AND_FETCH_REQ, uint32(tag), r.result(errno))
}

// result is what the kernel is told: the number of bytes of the payload, 0 for a
// request without payload, or the negated errno.
func (r *Request) result(errno unix.Errno) int32 {
	if errno != 0 {
		return -int32(errno)
	}
	if r.Op == OpRead || r.Op == OpWrite {
		return int32(r.Len)
	}
	return 0
}
