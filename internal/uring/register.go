package uring

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (r *Ring) register(op uint32, arg unsafe.Pointer, n uint32) (int, unix.Errno) {
	return r.q.register(r.fd, op, arg, n)
}

func registerError(what string, errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	if errno == unix.ENOMEM {
		return fmt.Errorf("register %s: %w: raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=)", what, ErrMemlock)
	}
	return fmt.Errorf("register %s: %w", what, errno)
}

// RegisterFiles makes a table of n empty places for files; UpdateFiles fills
// them. Entries use them by index with SetFixedFile.
func (r *Ring) RegisterFiles(n uint32) error {
	reg := rsrcRegister{nr: n, flags: ioringRsrcRegisterSparse}
	_, errno := r.register(ioringRegisterFiles2, unsafe.Pointer(&reg), uint32(unsafe.Sizeof(reg)))
	if errno == 0 {
		r.filesInUse = true
	}
	return registerError("files", errno)
}

// UpdateFiles puts fds into the table of files from place first on; -1
// empties a place. The ring holds its own reference: the fd may be closed.
func (r *Ring) UpdateFiles(first uint32, fds []int32) error {
	if len(fds) == 0 {
		return nil
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&fds[0])
	up := filesUpdate{offset: first, fds: uint64(uintptr(unsafe.Pointer(&fds[0])))}
	n, errno := r.register(ioringRegisterFilesUpdate, unsafe.Pointer(&up), uint32(len(fds)))
	if errno == 0 && n < len(fds) {
		return fmt.Errorf("register files: place %d was refused", int(first)+n)
	}
	return registerError("files", errno)
}

// RegisterBuffers makes a table of n empty places for buffers. UpdateBuffers
// fills them, or a driver such as ublk with pages of its requests.
func (r *Ring) RegisterBuffers(n uint32) error {
	reg := rsrcRegister{nr: n, flags: ioringRsrcRegisterSparse}
	_, errno := r.register(ioringRegisterBuffers2, unsafe.Pointer(&reg), uint32(unsafe.Sizeof(reg)))
	if errno == 0 {
		r.buffersUsed = true
	}
	return registerError("buffers", errno)
}

// UpdateBuffers puts bufs into the table of buffers from place first on; an
// empty one empties a place. The memory lies off the Go heap and stays until
// its place has other content, and no operation uses it any more.
func (r *Ring) UpdateBuffers(first uint32, bufs [][]byte) error {
	if len(bufs) == 0 {
		return nil
	}
	iov := make([]unix.Iovec, len(bufs))
	for i, b := range bufs {
		iov[i].Base = unsafe.SliceData(b)
		iov[i].SetLen(len(b))
		if len(b) == 0 {
			iov[i].Base = nil
		}
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&iov[0])
	up := rsrcUpdate2{offset: first, data: uint64(uintptr(unsafe.Pointer(&iov[0]))), nr: uint32(len(iov))}
	n, errno := r.register(ioringRegisterBuffersUpdate, unsafe.Pointer(&up), uint32(unsafe.Sizeof(up)))
	if errno == 0 && n > 0 && n < len(bufs) {
		// Asked for alone, the first that is refused tells why.
		return r.UpdateBuffers(first+uint32(n), bufs[n:])
	}
	return registerError("buffers", errno)
}

// RegisterRing registers the ring itself with the calling thread, which from
// then on is the only one that may use it and saves the look-up of the file
// descriptor. The thread calls Close before it ends.
func (r *Ring) RegisterRing() error {
	if r.registered {
		return nil
	}
	up := rsrcUpdate{offset: ^uint32(0), data: uint64(r.fd)}
	n, errno := r.register(ioringRegisterRingFds, unsafe.Pointer(&up), 1)
	if errno == 0 && n != 1 {
		errno = unix.EINVAL
	}
	if errno != 0 {
		return registerError("ring", errno)
	}
	r.registered = true
	r.enterFd = int(up.offset)
	r.enterFlags = ioringEnterRegisteredRing
	r.q.entersBy(r.enterFd)
	return nil
}

// unregisterRing undoes RegisterRing, on the same thread.
func (r *Ring) unregisterRing() error {
	if !r.registered {
		return nil
	}
	up := rsrcUpdate{offset: uint32(r.enterFd)}
	_, errno := r.register(ioringUnregisterRingFds, unsafe.Pointer(&up), 1)
	r.registered = false
	r.enterFd = r.fd
	r.enterFlags = 0
	r.q.entersBy(r.enterFd)
	return registerError("no ring", errno)
}
