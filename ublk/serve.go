package ublk

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// A device is served in two steps. prepare does all that can fail or take time: it
// opens the device's node, and gives each queue its ring and its handler. begin does
// the rest as fast as it can: it maps the queues' descriptors, fetches every tag of
// every queue, and tells the driver to start.

// prepare opens the device and makes its queues. The kernel does not know of them yet.
func (d *Device) prepare(ctx context.Context) error {
	fd, err := openNode(ctx, d.CPath)
	if err != nil {
		return err
	}
	d.cdev = blockdev.NewOSFile(fd, d.CPath)
	// This comes before the rings, because they look at GOMAXPROCS.
	addProcs(d.Queues)
	d.procs = d.Queues
	for q := range d.Queues {
		if err := d.startQueue(ctx, q); err != nil {
			return err
		}
	}
	return nil
}

// begin lets requests come and then, with the command start, the disk.
func (d *Device) begin(ctx context.Context, start uint32) error {
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for i, q := range d.queues {
		desc, err := mapDescriptors(d.cdev.Fd(), i, d.Depth)
		if err != nil {
			return fmt.Errorf("start ublk device %d: %w", d.ID, err)
		}
		q.describe(desc)
		q.fetchFailed = cancel
	}
	for _, q := range d.queues {
		q.ring.Post(&q.fetchTask)
	}
	// The control thread gives this command. The command waits until every tag is
	// fetched, and may read the disk.
	if err := d.ctl.command(starting, start, d.ID, uint64(os.Getpid())); err != nil {
		if cause := context.Cause(starting); cause != nil && ctx.Err() == nil {
			return fmt.Errorf("start ublk device %d: %w", d.ID, cause)
		}
		return err
	}
	if err := d.readNumber(ctx); err != nil {
		return err
	}
	return waitNode(ctx, d.Path)
}

// readNumber asks for the number of the disk, which exists.
func (d *Device) readNumber(ctx context.Context) error {
	p, err := d.ctl.params(ctx, d.ID)
	if err != nil {
		return err
	}
	d.Num = blockdev.Num{Major: p.Devt.DiskMajor, Minor: p.Devt.DiskMinor}
	return nil
}

func (d *Device) startQueue(ctx context.Context, i int) error {
	cpus, err := d.ctl.queueCPUs(ctx, d.ID, i)
	if err != nil {
		return err
	}
	zeroCopy := d.Mode == ModeZeroCopy
	q, err := newQueue(i, d.Depth, d.MaxIO, zeroCopy)
	if err != nil {
		return fmt.Errorf("start ublk device %d: %w", d.ID, err)
	}
	q.untrusted = d.noPartScan && d.ctl.ScansInStart()
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
		// A kernel that knows no zero copy gets no pins. Before Linux 6.13 a command that
		// lies in the ring keeps every buffer in memory that leaves the ring's table
		// meanwhile, and a command lies there for each idle tag.
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

// maxPins is how many buffers a handler may pin with its queue. A filter pins the
// pools of that many snapshots.
const maxPins = 16

// threadName is at most 15 bytes, with the queue's number at the end.
func threadName(name string, q int) string {
	end := "/" + strconv.Itoa(q)
	return name[:min(len(name), 15-len(end))] + end
}

// allowedCPUs is set without the CPUs that this process may not use. It is nil if
// none is left or the process's CPUs are not known.
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
