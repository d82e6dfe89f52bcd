package ublk

import (
	"context"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// fetchRest fetches all tags of the queues that no server has fetched, as one that dies at
// once: on a thread that ends then. Requests cannot come meanwhile: the kernel holds them back
// until a recovery ends. EBUSY while the kernel has not seen the last of the old server.
//
// Whoever fetches a queue gives all its tags to the kernel with one system call, which a
// death does not cut short. So a queue is fetched, or it is not.
func fetchRest(ctx context.Context, info Info) (err error) {
	path := fmt.Sprintf("/dev/ublkc%d", info.ID)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	cdev := blockdev.NewOSFile(fd, path)
	defer cdev.Close()
	refused := 0 // tags of the queue at hand: a dead server has it
	ring, err := blockdev.NewRingQueue(blockdev.RingConfig{
		Name: "fetch", Depth: 1, Commands: info.Depth, Files: []*blockdev.OSFile{cdev},
		OnCommand: func(_ uint32, res int32) {
			if res < 0 && res != uapi.UBLK_IO_RES_ABORT {
				refused++
			}
		},
	})
	if err != nil {
		return fmt.Errorf("fetch the queues of %s: %w", path, err)
	}
	thread := 0
	for id := 0; id < info.Queues && err == nil; id++ {
		ring.Post(&blockdev.Task{Run: func() {
			thread, refused = unix.Gettid(), 0
			q := queue{id: uint16(id), payload: unsafe.Pointer(unsafe.SliceData(blockdev.Zeroes())), ring: ring}
			for tag := range uint32(info.Depth) {
				q.issue(uapi.UBLK_U_IO_FETCH_REQ, tag, 0)
			}
		}})
		// The thread has given them to the kernel before it answers for the second time.
		for range 2 {
			if err = ring.Answers(ctx); err != nil {
				break
			}
		}
		if err == nil && refused > 0 && refused < info.Depth {
			err = fmt.Errorf("the driver refuses %d of the %d tags of queue %d", refused, info.Depth, id)
		}
	}
	ring.Abandon()
	if err != nil {
		return fmt.Errorf("fetch the queues of %s: %w", path, err)
	}
	// The driver counts on that a server whose device is closed is dead.
	for task := fmt.Sprintf("/proc/self/task/%d", thread); unix.Access(task, unix.F_OK) == nil; {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}
