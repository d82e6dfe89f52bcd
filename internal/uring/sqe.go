package uring

import "unsafe"

// SQE is one entry of the submission queue, struct io_uring_sqe. It lies in
// memory shared with the kernel: fill it right after Ring.SQE returned it and
// keep no pointer to it over the next submit.
//
// The Prep methods set what their opcode needs and leave UserData alone, so
// that it may be set before or after. They expect the zeroed entry that
// Ring.SQE hands out.
type SQE struct {
	Opcode      uint8
	Flags       uint8 // IOSQE_*
	Ioprio      uint16
	Fd          int32
	Off         uint64 // addr2; cmd_op in the low half
	Addr        uint64
	Len         uint32
	OpFlags     uint32 // rw_flags, fsync_flags, timeout_flags, …
	UserData    uint64
	BufIndex    uint16
	Personality uint16
	FileIndex   int32
	Addr3       uint64 // cmd[] starts here
	pad         uint64
}

// cmdOffset is where the command area of a URING_CMD entry starts.
const cmdOffset = 48

func (s *SQE) prep(op uint8, fd int, addr uint64, length uint32, off uint64) {
	s.Opcode = op
	s.Fd = int32(fd)
	s.Off = off
	s.Addr = addr
	s.Len = length
}

// PrepRead reads length bytes at file offset off into memory at addr. The
// memory stays in place until the completion. flags are RWF_*.
func (s *SQE) PrepRead(fd int, addr uint64, length uint32, off uint64, flags uint32) {
	s.prep(IORING_OP_READ, fd, addr, length, off)
	s.OpFlags = flags
}

// PrepWrite writes length bytes of memory at addr to file offset off. flags
// are RWF_*; RWF_DSYNC makes the data durable before it completes.
func (s *SQE) PrepWrite(fd int, addr uint64, length uint32, off uint64, flags uint32) {
	s.prep(IORING_OP_WRITE, fd, addr, length, off)
	s.OpFlags = flags
}

// PrepReadFixed is PrepRead into registered buffer buf. addr is an address
// inside the buffer, or for a buffer of kernel pages the offset from its start.
func (s *SQE) PrepReadFixed(fd int, addr uint64, length uint32, off uint64, flags uint32, buf int) {
	s.prep(IORING_OP_READ_FIXED, fd, addr, length, off)
	s.OpFlags = flags
	s.BufIndex = uint16(buf)
}

// PrepWriteFixed is PrepWrite from registered buffer buf; see PrepReadFixed.
func (s *SQE) PrepWriteFixed(fd int, addr uint64, length uint32, off uint64, flags uint32, buf int) {
	s.prep(IORING_OP_WRITE_FIXED, fd, addr, length, off)
	s.OpFlags = flags
	s.BufIndex = uint16(buf)
}

// PrepFsync makes the file durable; flags is 0 or IORING_FSYNC_DATASYNC.
func (s *SQE) PrepFsync(fd int, flags uint32) {
	s.prep(IORING_OP_FSYNC, fd, 0, 0, 0)
	s.OpFlags = flags
}

// PrepFallocate is fallocate(2) with FALLOC_FL_* mode on length bytes at off.
func (s *SQE) PrepFallocate(fd int, mode uint32, off, length uint64) {
	s.prep(IORING_OP_FALLOCATE, fd, length, mode, off)
}

// PrepNop does nothing. With IOSQE_ASYNC a kernel worker does it.
func (s *SQE) PrepNop() { s.prep(IORING_OP_NOP, -1, 0, 0, 0) }

// PrepCommand passes driver command op to the file behind fd. Its argument
// goes into Cmd or, on a ring with 128-byte entries, Cmd80.
func (s *SQE) PrepCommand(fd int, op uint32) {
	s.prep(IORING_OP_URING_CMD, fd, 0, 0, uint64(op))
}

// PrepPollAdd completes once when one of events (POLL*) is pending on fd, with
// the events as result.
func (s *SQE) PrepPollAdd(fd int, events uint32) {
	s.prep(IORING_OP_POLL_ADD, fd, 0, 0, 0)
	s.OpFlags = events
}

// PrepTimeout completes with -ETIME when the time in ts, counted from now, is
// over, or with 0 once count other entries completed. ts lies off the Go heap
// and stays in place until the entry is submitted.
func (s *SQE) PrepTimeout(ts *Timespec, count uint32, flags uint32) {
	s.prep(IORING_OP_TIMEOUT, -1, uint64(uintptr(unsafe.Pointer(ts))), 1, uint64(count))
	s.OpFlags = flags
}

// PrepCancel cancels the entry that was submitted with userData. It completes
// with 0, -ENOENT when there is none, -EALREADY when it runs already.
func (s *SQE) PrepCancel(userData uint64) {
	s.prep(IORING_OP_ASYNC_CANCEL, -1, userData, 0, 0)
}

// SetFixedFile makes the entry's fd an index of the registered files.
func (s *SQE) SetFixedFile() { s.Flags |= IOSQE_FIXED_FILE }

// Cmd is the argument of a command in a 64-byte entry.
func (s *SQE) Cmd() *[16]byte {
	return (*[16]byte)(unsafe.Add(unsafe.Pointer(s), cmdOffset))
}

// Cmd80 is the argument of a command in a 128-byte entry. It must not be used
// on a ring made without SQE128: the bytes belong to the next entry there.
func (s *SQE) Cmd80() *[80]byte {
	return (*[80]byte)(unsafe.Add(unsafe.Pointer(s), cmdOffset))
}

// Timespec is struct __kernel_timespec.
type Timespec struct {
	Sec  int64
	Nsec int64
}

// CQE is one completion, struct io_uring_cqe. Res is the result of the
// operation, a negated errno if it failed.
type CQE struct {
	UserData uint64
	Res      int32
	Flags    uint32
}
