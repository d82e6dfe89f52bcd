package blockdev

import (
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// This file has what becomes of an operation for which the kernel had no worker.
//
// Some operations need one of the kernel's workers: Flush and Allocate always, others if
// the file cannot do them without blocking, as on a tmpfs. Each thread has workers of its
// own. The kernel makes the first one when it needs it, and cannot if a signal is pending
// just then, or for want of memory or of processes. Then it cancels what waits for it.
// And signals are pending often, because the Go runtime sends them to its own threads.

// maxCancels bounds the repetitions after ECANCELED, to a minute with their pauses.
const maxCancels = 480

// pauses are the times before an operation is tried again for which the kernel had no
// worker: 1 ms, then twice as long each time. They lie off the heap, because the kernel
// reads them.
var pauses = func() (p [8]uring.Timespec) {
	for i := range p {
		p[i].Nsec = 1e6 << i
	}
	return p
}()

// pause has slot i's operation tried again in a while, because the kernel cancelled it. It
// returns false if the kernel has done that too often.
//
// Nobody here cancels an operation, so it has not begun, and what the file would say to it
// is not known. A block device never says ECANCELED by itself: the operation is tried for as
// long as it takes. But a file server may say so.
func (q *RingQueue) pause(i uint32) bool {
	sl := &q.slots[i]
	if sl.cancels >= maxCancels && !sl.op.File.(*OSFile).block {
		return false
	}
	s := q.sqe()
	s.PrepTimeout(&pauses[min(int(sl.cancels), len(pauses)-1)], 0, 0)
	s.UserData = kindPause | uint64(i)
	sl.cancels = min(sl.cancels, maxCancels-1) + 1
	sl.tries, sl.async = 0, false // perhaps it can be done without a worker
	return true
}
