package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// cancelsFetches says whether the driver lets go of what a thread has fetched that ends. Before
// Linux 6.7 it does so only for a device that has been served since.
func cancelsFetches() bool { return !OlderThan(KernelRelease(), "6.7") }

// fetchRest makes a device fit for START_USER_RECOVERY, whose server may have died while he
// fetched its queues: it fetches those that are left, as a server that dies at once. EBUSY
// while the kernel has not seen the last of the old server.
//
// A server maps the device before he fetches. The driver lets nobody else map it until a
// recovery begins, or, from Linux 6.15 on, until he is dead. So if it can be mapped, nothing
// is to be done, unless begun says that this process itself may have fetched some.
//
// Whoever fetches a queue gives all its tags to the kernel with one system call, which a
// death does not cut short. So a queue is fetched, or it is not. Requests cannot come
// meanwhile: the kernel holds them back until a recovery ends.
func fetchRest(ctx context.Context, info Info, begun bool) error {
	path := fmt.Sprintf("/dev/ublkc%d", info.ID)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil && mayOpen(err) {
		err = fmt.Errorf("%w (%w)", unix.EBUSY, err) // whether it is there, the next look tells
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	cdev := blockdev.NewOSFile(fd, path)
	mem, err := mapDescriptors(fd, 0, info.Depth)
	if err == nil {
		_ = unix.Munmap(mem)
	}
	if err == nil && !begun || err != nil && !errors.Is(err, unix.EINVAL) {
		cdev.Close()
		return err
	}
	r := rest{depth: info.Depth}
	r.ring, err = blockdev.NewRingQueue(blockdev.RingConfig{
		Name: "fetch", Depth: 1, Commands: info.Depth, Files: []*blockdev.OSFile{cdev}, OnCommand: r.onCommand,
	})
	if err != nil {
		cdev.Close()
		return fmt.Errorf("fetch the queues of %s: %w", path, err)
	}
	some := false
	for id := 0; id < info.Queues && err == nil; id++ {
		var fetched bool
		fetched, err = r.fetch(ctx, id)
		some = some || fetched
	}
	ended := make(chan struct{})
	go func() { // a thread that hangs in the driver ends late, or never
		r.ring.Abandon()
		cdev.Close()
		close(ended)
	}()
	if err == nil {
		select {
		case <-ended:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err == nil && some {
		// The driver counts on that a server whose device is closed is dead; and what it
		// does at a server's death, it is to have done before there is the next one.
		err = sleep(ctx, settlePause)
	}
	if err != nil {
		return fmt.Errorf("fetch the queues of %s: %w", path, err)
	}
	return nil
}

// settlePause is much more than a thread takes to end, and the driver to have seen it.
const settlePause = 100 * time.Millisecond

// rest fetches queues on its thread.
type rest struct {
	ring   *blockdev.RingQueue
	depth  int
	served int        // tags of the queue at hand that are a dead server's
	failed unix.Errno // another answer, if there was one
}

func (r *rest) onCommand(_ uint32, res int32) {
	switch {
	case res == -int32(unix.EINVAL):
		r.served++
	case res < 0 && res != uapi.UBLK_IO_RES_ABORT:
		r.failed = unix.Errno(-res)
	}
}

// fetch fetches all tags of a queue, and says whether it did: not if a dead server has it.
func (r *rest) fetch(ctx context.Context, id int) (fetched bool, err error) {
	r.ring.Post(&blockdev.Task{Run: func() {
		r.served = 0
		q := queue{id: uint16(id), payload: unsafe.Pointer(unsafe.SliceData(blockdev.Zeroes())), ring: r.ring}
		for tag := range uint32(r.depth) {
			q.issue(uapi.UBLK_U_IO_FETCH_REQ, tag, 0)
		}
	}})
	// The thread has given them to the kernel before it answers for the second time.
	for range 2 {
		if err := r.ring.Answers(ctx); err != nil {
			return false, err
		}
	}
	switch {
	case r.failed != 0:
		return true, fmt.Errorf("queue %d: %w", id, r.failed)
	case r.served == 0:
		return true, nil
	case r.served == r.depth:
		return false, nil
	}
	return true, fmt.Errorf("queue %d: the driver refuses %d of %d tags", id, r.served, r.depth)
}
