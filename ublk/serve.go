package ublk

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// A device is served in this order, after Add or Recover: its node is opened, each
// queue gets its ring and its handler, every tag is fetched, and then the driver
// is told to start.

// serve opens the device, starts its queues and then, with the command start,
// the disk.
func (d *Device) serve(ctx context.Context, start uint32) error {
	fd, err := openNode(ctx, d.CPath)
	if err != nil {
		return err
	}
	d.cdev = blockdev.NewOSFile(fd, d.CPath)
	// Before the rings: they look at it.
	addProcs(d.Queues)
	d.procs = d.Queues
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for q := range d.Queues {
		if err := d.startQueue(ctx, q, cancel); err != nil {
			return err
		}
	}
	for _, q := range d.queues {
		q.ring.Post(&q.fetchTask)
	}
	// From the control thread: it waits until every tag is fetched, and may
	// read the disk.
	if err := d.ctl.command(starting, start, d.ID, uint64(os.Getpid())); err != nil {
		if cause := context.Cause(starting); cause != nil && ctx.Err() == nil {
			return fmt.Errorf("start ublk device %d: %w", d.ID, cause)
		}
		return err
	}
	p, err := d.ctl.params(ctx, d.ID)
	if err != nil {
		return err
	}
	d.Num = blockdev.Num{Major: p.Devt.DiskMajor, Minor: p.Devt.DiskMinor}
	return waitNode(ctx, d.Path)
}

func (d *Device) startQueue(ctx context.Context, i int, failed func(error)) error {
	cpus, err := d.ctl.queueCPUs(ctx, d.ID, i)
	if err != nil {
		return err
	}
	desc, err := mapDescriptors(d.cdev.Fd(), i, d.Depth)
	if err != nil {
		return fmt.Errorf("start ublk device %d: %w", d.ID, err)
	}
	zeroCopy := d.Mode == ModeZeroCopy
	q, err := newQueue(i, desc, d.Depth, d.MaxIO, zeroCopy)
	if err != nil {
		_ = unix.Munmap(desc)
		return fmt.Errorf("start ublk device %d: %w", d.ID, err)
	}
	q.fetchFailed = failed
	cfg := blockdev.RingConfig{
		Name:      threadName(d.name, i),
		Depth:     d.slots,
		Commands:  d.Depth,
		Files:     append([]*blockdev.OSFile{d.cdev}, d.files...),
		CPUs:      allowedCPUs(cpus),
		Buffers:   q.buffers(),
		OnCommand: q.onCommand,
	}
	if zeroCopy {
		// Not with kernels that know no zero copy: before Linux 6.13 a command that
		// lies in the ring, as one for each idle tag does, keeps every buffer in
		// memory that leaves the ring's table meanwhile.
		cfg.Pins = maxPins
	}
	if q.ring, err = blockdev.NewRingQueue(cfg); err != nil {
		q.unmap()
		return fmt.Errorf("start ublk device %d: %w", d.ID, err)
	}
	d.queues = append(d.queues, q)
	q.handler = d.newHandler(i, q.ring)
	return nil
}

// maxPins is how many buffers a handler may pin with its queue: pools of as many
// snapshots.
const maxPins = 16

// threadName is at most 15 bytes, with the queue's number at the end.
func threadName(name string, q int) string {
	end := "/" + strconv.Itoa(q)
	return name[:min(len(name), 15-len(end))] + end
}

// allowedCPUs is set without the CPUs that this process may not use; nil if that
// says nothing.
func allowedCPUs(set *unix.CPUSet) *unix.CPUSet {
	var mine unix.CPUSet
	if unix.SchedGetaffinity(os.Getpid(), &mine) != nil {
		return nil
	}
	for i := range mine {
		set[i] &= mine[i]
	}
	if set.Count() == 0 {
		return nil
	}
	return set
}
