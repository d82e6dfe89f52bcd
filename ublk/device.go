package ublk

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Mode is how payloads travel between the kernel and the handler.
type Mode int

const (
	// ModeAuto is ModeZeroCopy where the driver and the disk can do it, else
	// ModeCopy.
	ModeAuto Mode = iota
	// ModeCopy: the kernel copies payloads to and from buffers of this
	// process, which are registered with the queue's ring.
	ModeCopy
	// ModeZeroCopy: the kernel registers the request's own pages with the
	// queue's ring. The process cannot see them; operations can use them.
	ModeZeroCopy
)

func (m Mode) String() string {
	switch m {
	case ModeAuto:
		return "auto"
	case ModeCopy:
		return "copy"
	case ModeZeroCopy:
		return "zero copy"
	}
	return "unknown"
}

// What a device is made with unless something is known to be better.
const (
	DefaultQueues = 1
	DefaultDepth  = 128
	DefaultMaxIO  = 512 << 10
)

// AnyID is the Config.ID of a device that takes the first free number.
const AnyID = -1

// MaxDepth is the largest queue depth.
const MaxDepth = uapi.UBLK_MAX_QUEUE_DEPTH

// MaxQueues is the largest number of queues: one for each CPU that the machine
// may have, and no more than 64.
func MaxQueues() int { return min(64, possibleCPUs("/sys")) }

func possibleCPUs(sys string) int {
	b, err := os.ReadFile(filepath.Join(sys, "devices/system/cpu/possible"))
	if err == nil {
		// "0-7": the kernel never leaves gaps in it.
		s := strings.TrimSpace(string(b))
		if n, err := strconv.Atoi(s[strings.LastIndexAny(s, "-,")+1:]); err == nil {
			return n + 1
		}
	}
	return runtime.NumCPU()
}

// ErrBusy: the device is in use.
var ErrBusy = errors.New("device is in use")

// Config describes a device.
type Config struct {
	Name   string // for people: part of the names of its threads
	Tag    uint64 // kept by the driver and told by Info; see Tag
	ID     int    // its number N in /dev/ublkbN, or AnyID
	Queues int    // 1 to MaxQueues
	Depth  int    // requests in flight per queue, 1 to MaxDepth
	// MaxIO is the largest payload in bytes: a multiple of the page size, at
	// most 32 MiB. ModeCopy takes Depth times as much memory for each queue,
	// all of it at once.
	MaxIO    int
	Mode     Mode
	Geometry Geometry
	// Recovery: requests wait for a new server (Recover) when this one dies,
	// and those in its hands are repeated. Otherwise they fail, and the disk
	// goes with its server.
	Recovery bool
	// NoPartScan: the kernel shall not look for partitions. Before Linux 7.0
	// it does all the same.
	NoPartScan bool
	// Files are registered with the ring of every queue, for the handler. They
	// stay the caller's, and open until the device is deleted.
	Files []*blockdev.OSFile
	// Slots is how many operations a queue's handler has in flight at most
	// before they wait; 0: twice Depth.
	Slots int
	// NewHandler makes the handler of queue q, whose thread is that of bq. It
	// is called before the queue's first request, on another thread.
	NewHandler func(q int, bq blockdev.Queue) Handler
}

func (cfg *Config) check(ctl *Control) (zeroCopy bool, err error) {
	switch {
	case cfg.ID < AnyID || cfg.ID >= 1<<20:
		return false, fmt.Errorf("device number %d: want 0 to %d", cfg.ID, 1<<20-1)
	case cfg.Queues < 1 || cfg.Queues > MaxQueues():
		return false, fmt.Errorf("%d queues: want 1 to %d", cfg.Queues, MaxQueues())
	case cfg.Depth < 1 || cfg.Depth > MaxDepth:
		return false, fmt.Errorf("queue depth of %d: want 1 to %d", cfg.Depth, MaxDepth)
	case cfg.NewHandler == nil:
		return false, errors.New("no handler")
	}
	const zeroCopyFlags = uapi.UBLK_F_SUPPORT_ZERO_COPY | uapi.UBLK_F_AUTO_BUF_REG
	switch cfg.Mode {
	case ModeAuto:
		return ctl.Has(zeroCopyFlags) && !cfg.Geometry.StableWrites, nil
	case ModeCopy:
		return false, nil
	case ModeZeroCopy:
		if !ctl.Has(zeroCopyFlags) {
			return false, missing(uapi.UBLK_F_AUTO_BUF_REG)
		}
		if cfg.Geometry.StableWrites {
			return false, errors.New("zero copy: the disk makes checksums of what is written, which must not change meanwhile: use mode copy")
		}
		return true, nil
	}
	return false, fmt.Errorf("unknown payload mode %d", cfg.Mode)
}

// flags are the UBLK_F flags to ask for, and among them those that must be
// granted.
func (cfg *Config) flags(ctl *Control, zeroCopy bool) (ask, need uint64) {
	need = uapi.UBLK_F_CMD_IOCTL_ENCODE
	if zeroCopy {
		need |= uapi.UBLK_F_SUPPORT_ZERO_COPY | uapi.UBLK_F_AUTO_BUF_REG
	}
	ask = need
	if cfg.Recovery {
		need |= uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_REISSUE
		ask |= need | uapi.UBLK_F_QUIESCE
	}
	if cfg.NoPartScan {
		ask |= uapi.UBLK_F_NO_AUTO_PART_SCAN
	}
	// What the driver does not know it would clear without a word.
	return ask & (ctl.features | need), need
}

// Device is a ublk device served by this process.
//
// Its methods may be called from any goroutine; Stop and Delete more than
// once. None may be called on a queue's thread.
type Device struct {
	ID     int
	Path   string // /dev/ublkbN
	CPath  string // /dev/ublkcN
	Num    disk.Num
	Mode   Mode // ModeCopy or ModeZeroCopy
	Queues int
	Depth  int
	MaxIO  int
	Flags  uint64 // UBLK_F, as granted

	ctl    *Control
	files  []*blockdev.OSFile
	name   string
	slots  int
	make   func(q int, bq blockdev.Queue) Handler
	cdev   *blockdev.OSFile // nil when closed
	queues []*queue
	procs  int // queues told to addProcs

	mu      sync.Mutex // serializes Stop, TryStop, Quiesce and Delete
	ending  bool       // the driver was told to take the disk away
	stopped bool       // the rings have ended
	deleted bool
	claims  chan struct{} // closed when no claim of ours is under way; see claim
}

const (
	nodeWait = 5 * time.Second  // for udev to be done with a node
	undoWait = 30 * time.Second // for the steps of a failed start
	goneWait = 2 * time.Second  // for the last users of a deleted device
	pause    = 5 * time.Millisecond
)

// Add makes a device and starts to serve it. When it returns without error the
// disk is there; with an error nothing is left, unless the driver hangs, as it
// does while it waits for a read of the disk: then the device is returned with
// the error, and is to be deleted when it goes on. Its handlers may be called
// until then. A driver that hangs before there is a device gives the error alone: a
// device that it makes after all is deleted at once.
func Add(ctx context.Context, ctl *Control, cfg Config) (*Device, error) {
	zeroCopy, err := cfg.check(ctl)
	if err != nil {
		return nil, fmt.Errorf("add ublk device: %w", err)
	}
	params, err := cfg.Geometry.params(cfg.MaxIO, zeroCopy)
	if err != nil {
		return nil, err
	}
	ask, need := cfg.flags(ctl, zeroCopy)
	info := uapi.UblksrvCtrlDevInfo{
		NrHwQueues:    uint16(cfg.Queues),
		QueueDepth:    uint16(cfg.Depth),
		MaxIOBufBytes: uint32(cfg.MaxIO),
		DevID:         uint32(cfg.ID),
		UblksrvPid:    int32(os.Getpid()),
		Flags:         ask,
		UblksrvFlags:  cfg.Tag,
	}
	err = ctl.add(ctx, &info)
	if err != nil {
		return nil, err
	}
	d := newDevice(ctl, &cfg, infoOf(&info))
	if err := d.setUp(ctx, &cfg, &params, need); err != nil {
		return d.undo(err)
	}
	return d, nil
}

// add has the driver make a device.
func (c *Control) add(ctx context.Context, info *uapi.UblksrvCtrlDevInfo) error {
	cmd := uapi.UblksrvCtrlCmd{DevID: info.DevID, QueueID: noQueue}
	return c.doOrUndo(ctx, uapi.UBLK_U_CMD_ADD_DEV, cmd, bytesOf(info), func(answer []byte) {
		var late uapi.UblksrvCtrlDevInfo // with its number, if the driver was to choose one
		copy(bytesOf(&late), answer)
		ctx, cancel := context.WithTimeout(context.Background(), undoWait)
		defer cancel()
		_ = c.deleteDevice(ctx, int(late.DevID))
	})
}

func newDevice(ctl *Control, cfg *Config, info Info) *Device {
	d := &Device{
		ID:     info.ID,
		Path:   fmt.Sprintf("/dev/ublkb%d", info.ID),
		CPath:  fmt.Sprintf("/dev/ublkc%d", info.ID),
		Mode:   ModeCopy,
		Queues: info.Queues,
		Depth:  info.Depth,
		MaxIO:  info.MaxIO,
		Flags:  info.Flags,
		ctl:    ctl,
		files:  cfg.Files,
		name:   cfg.Name,
		slots:  cfg.Slots,
		make:   cfg.NewHandler,
		claims: make(chan struct{}),
	}
	close(d.claims)
	if info.Flags&uapi.UBLK_F_AUTO_BUF_REG != 0 {
		d.Mode = ModeZeroCopy
	}
	if d.slots == 0 {
		d.slots = 2 * d.Depth
	}
	return d
}

// setUp is the rest of Add, on a device that exists.
func (d *Device) setUp(ctx context.Context, cfg *Config, params *uapi.UblkParams, need uint64) error {
	for bit := uint64(1); bit <= need; bit <<= 1 {
		if need&bit != 0 && d.Flags&bit == 0 {
			return missing(bit)
		}
	}
	if d.Queues != cfg.Queues || d.Depth != cfg.Depth || d.MaxIO != cfg.MaxIO {
		return fmt.Errorf("add ublk device: the driver made %d queues × %d × %d bytes of %d × %d × %d",
			d.Queues, d.Depth, d.MaxIO, cfg.Queues, cfg.Depth, cfg.MaxIO)
	}
	cmd := uapi.UblksrvCtrlCmd{DevID: uint32(d.ID), QueueID: noQueue}
	if err := d.ctl.do(ctx, uapi.UBLK_U_CMD_SET_PARAMS, cmd, bytesOf(params)); err != nil {
		return err
	}
	set, err := d.ctl.params(ctx, d.ID)
	if err != nil {
		return err
	}
	if err := sameParams(params, &set); err != nil {
		return err
	}
	return d.serve(ctx, uapi.UBLK_U_CMD_START_DEV)
}

// sameParams compares what was asked for with what the driver kept.
func sameParams(want, got *uapi.UblkParams) error {
	if lost := want.Types &^ got.Types; lost != 0 {
		return fmt.Errorf("ublk parameters: the driver ignored types %#x", lost)
	}
	if got.Basic != want.Basic ||
		want.Types&uapi.UBLK_PARAM_TYPE_DISCARD != 0 && got.Discard != want.Discard ||
		want.Types&uapi.UBLK_PARAM_TYPE_DMA_ALIGN != 0 && got.DMA != want.DMA {
		return fmt.Errorf("ublk parameters: the driver kept %+v of %+v", *got, *want)
	}
	return nil
}

// Recover takes over device id, whose server has died or quiesced it: the
// requests that wait are served next. The device keeps its number, shape and
// content; of cfg only Name, Files, Slots and NewHandler are used. It waits
// until the kernel has seen the last of the old server, or ctx ends. An error
// leaves the device to a further attempt.
//
// Before Linux 6.15 the driver does not clean up after a server that dies in
// the middle of this (some milliseconds): such a device can only be deleted.
// So once begun, it is not given up when ctx ends.
func Recover(ctx context.Context, ctl *Control, id int, cfg Config) (*Device, error) {
	if cfg.NewHandler == nil {
		return nil, errors.New("recover ublk device: no handler")
	}
	info, err := ctl.Info(ctx, id)
	if err != nil {
		return nil, err
	}
	if info.Flags&uapi.UBLK_F_USER_RECOVERY == 0 {
		return nil, fmt.Errorf("recover ublk device %d: made without recovery", id)
	}
	begun, err := ctl.beginRecovery(ctx, id)
	if err != nil {
		return nil, err
	}
	d := newDevice(ctl, &cfg, info)
	started, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoWait)
	defer cancel()
	if err := d.serve(started, uapi.UBLK_U_CMD_END_USER_RECOVERY); err != nil {
		d.abandon()
		if begun && errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: an earlier recovery was cut short, which this kernel cannot take up: delete the device", err)
		}
		return nil, err
	}
	return d, nil
}

// beginRecovery makes the driver ready for a new server. begun says that an
// earlier recovery had come this far.
func (c *Control) beginRecovery(ctx context.Context, id int) (begun bool, err error) {
	for {
		err := c.command(ctx, uapi.UBLK_U_CMD_START_USER_RECOVERY, id, 0)
		switch {
		case err == nil:
			return false, nil
		case errors.Is(err, unix.EINVAL) && !c.Has(uapi.UBLK_F_AUTO_BUF_REG):
			// An old driver has no queue to take from a dead server: it did
			// that before, and no queue was fetched since.
			return true, nil
		case !errors.Is(err, unix.EBUSY), sleep(ctx, pause) != nil:
			return false, err
		}
	}
}

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
	d.Num = disk.Num{Major: p.Devt.DiskMajor, Minor: p.Devt.DiskMinor}
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
	q.failed = failed
	cfg := blockdev.RingConfig{
		Name:      threadName(d.name, i),
		Depth:     d.slots,
		Commands:  d.Depth,
		Files:     append([]*blockdev.OSFile{d.cdev}, d.files...),
		CPUs:      usable(cpus),
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
	q.handler = d.make(i, q.ring)
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

// usable is set without the CPUs that this process may not use; nil if that
// says nothing.
func usable(set *unix.CPUSet) *unix.CPUSet {
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

// openNode opens a device's node for reading and writing. udev may be about to
// make it, change its owner, or look at it.
func openNode(ctx context.Context, path string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeWait)
	defer cancel()
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return fd, nil
		case unix.ENOENT, unix.EBUSY, unix.ENXIO, unix.ENODEV, unix.EINTR:
		default:
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		if sleep(ctx, pause) != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
	}
}

func waitNode(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeWait)
	defer cancel()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil {
			return nil
		}
		if sleep(ctx, pause) != nil {
			return fmt.Errorf("wait for %s: %w: is devtmpfs mounted on /dev?", path, err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// abandon gives the device up as it is: the kernel cancels what was fetched.
func (d *Device) abandon() {
	for _, q := range d.queues {
		q.ring.Abandon()
	}
	d.release()
	d.stopped, d.deleted = true, true
}

// undo deletes what a failed Add has made, and returns what is left. err is why
// it failed.
func (d *Device) undo(err error) (*Device, error) {
	ctx, cancel := context.WithTimeout(context.Background(), undoWait)
	defer cancel()
	if e := d.Delete(ctx); e != nil {
		return d, errors.Join(err, e)
	}
	return nil, err
}

// Info asks the driver for the device.
func (d *Device) Info(ctx context.Context) (Info, error) { return d.ctl.Info(ctx, d.ID) }

// Unregistered is how many requests failed because the kernel could not
// register their payload, however often it was asked.
func (d *Device) Unregistered() uint64 {
	var n uint64
	for _, q := range d.queues {
		n += q.unregistered.Load()
	}
	return n
}

// UpdateSize changes the size of the disk, in bytes, while it is in use.
func (d *Device) UpdateSize(ctx context.Context, size int64) error {
	if !d.ctl.Has(uapi.UBLK_F_UPDATE_SIZE) {
		return fmt.Errorf("update size of device %d: %w", d.ID, missing(uapi.UBLK_F_UPDATE_SIZE))
	}
	if size < sector.Size || size%sector.Size != 0 {
		return fmt.Errorf("update size of device %d: %d bytes: want a multiple of %d", d.ID, size, sector.Size)
	}
	return d.ctl.command(ctx, uapi.UBLK_U_CMD_UPDATE_SIZE, d.ID, uint64(size/sector.Size))
}

// Stop takes the disk away and ends the queues. The kernel first writes back
// what the disk's page cache holds, but on a device with recovery it fails
// those writes: sync before, and see that nobody writes, or use TryStop.
// Requests of those who still have it open fail.
//
// It waits for the requests in the handlers' hands. When ctx ends before that
// the device is neither alive nor stopped, and Stop may be called again.
func (d *Device) Stop(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stop(ctx)
}

func (d *Device) stop(ctx context.Context) error {
	if d.stopped {
		return nil
	}
	d.ending = true
	if err := d.ctl.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, d.ID, 0); err != nil {
		return err
	}
	return d.endQueues(ctx)
}

// endQueues waits for the end of the rings: the kernel has aborted all tags.
func (d *Device) endQueues(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		for _, q := range d.queues {
			q.ring.Stop()
		}
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		return fmt.Errorf("end the queues of ublk device %d: %w", d.ID, ctx.Err())
	}
	d.stopped = true
	return nil
}

// Ending: the driver was told to take the disk away, so that it may serve nobody
// any more. Not for use beside a method that stops it.
func (d *Device) Ending() bool { return d.ending }

// TryStop is Stop if nobody uses the disk, else ErrBusy. What was written to
// the disk is in the handler's hands, and synced, when it returns. When ctx ends
// during the sync nothing has changed.
//
// Before Linux 7.0 the driver cannot do that in one step. Then the disk is
// claimed first, so that nobody can mount it or put a device on it until it is
// gone; but a process that opens it between the look at the openers and the
// end (a few milliseconds) is not noticed and gets errors.
func (d *Device) TryStop(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil
	}
	if d.ctl.Has(uapi.UBLK_F_SAFE_STOP_DEV) {
		if err := d.claim(ctx, func() error { return nil }); err != nil {
			return err
		}
		d.ending = true
		err := d.ctl.command(ctx, uapi.UBLK_U_CMD_TRY_STOP_DEV, d.ID, 0)
		if errors.Is(err, unix.EBUSY) {
			d.ending = false
			return d.busy()
		}
		if err != nil {
			return err
		}
		return d.endQueues(ctx)
	}
	return d.claim(ctx, func() error {
		if err := d.opened(); err != nil {
			return err
		}
		return d.stop(ctx)
	})
}

// Sync brings what was written to the disk into the handler's hands, if nobody has
// claimed the disk, else it is ErrBusy. A TryStop that follows need not wait long.
func (d *Device) Sync(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil
	}
	return d.claim(ctx, func() error { return nil })
}

// claim syncs the disk and runs f while nobody else can claim it.
//
// The sync takes as long as the disk below. When ctx ends before that it goes
// on, holding the disk, and lets go of it in the end; the next claim waits for
// that.
func (d *Device) claim(ctx context.Context, f func() error) error {
	late := func() error { return fmt.Errorf("sync %s: %w", d.Path, ctx.Err()) }
	select {
	case <-d.claims:
	case <-ctx.Done():
		return late()
	}
	ended := make(chan struct{})
	d.claims = ended
	type claim struct {
		fd           int
		opened, sync error
	}
	c, err := disk.Within(ctx, func() (c claim) {
		if c.fd, c.opened = unix.Open(d.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0); c.opened == nil {
			c.sync = unix.Fsync(c.fd)
		}
		return c
	}, func(c claim) {
		if c.opened == nil {
			unix.Close(c.fd)
		}
		close(ended)
	})
	if err != nil {
		return late()
	}
	close(ended)
	switch {
	case errors.Is(c.opened, unix.EBUSY):
		return d.busy()
	case errors.Is(c.opened, unix.ENXIO), errors.Is(c.opened, unix.ENODEV), errors.Is(c.opened, unix.ENOENT):
		return f() // there is no disk any more
	case c.opened != nil:
		return fmt.Errorf("claim %s: %w", d.Path, c.opened)
	}
	defer unix.Close(c.fd)
	if c.sync != nil {
		return fmt.Errorf("sync %s: %w", d.Path, c.sync)
	}
	return f()
}

func (d *Device) busy() error {
	host := disk.Machine()
	if x, err := host.ByNumber(d.Num); err == nil {
		if err := host.CheckFree(x); err != nil {
			return fmt.Errorf("%w: %w", ErrBusy, err)
		}
	}
	if err := d.opened(); err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", d.Path, ErrBusy)
}

// opened is ErrBusy if a process has the disk or one of its partitions open.
func (d *Device) opened() error {
	if ps := disk.Machine().Openers(d.Num); len(ps) > 0 {
		return fmt.Errorf("%s: %w: opened by %s", d.Path, ErrBusy, ps[0])
	}
	return nil
}

// Quiesce gives the device up without taking the disk away: it waits until
// every request in the handlers' hands is done, ends the queues and closes the
// device. Requests wait until a server calls Recover. Only for a device with
// recovery, where the driver can do it. An error leaves the device served, as
// far as it is.
func (d *Device) Quiesce(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.Flags&uapi.UBLK_F_QUIESCE == 0 {
		return fmt.Errorf("quiesce device %d: %w", d.ID, missing(uapi.UBLK_F_QUIESCE))
	}
	if d.stopped {
		return fmt.Errorf("quiesce device %d: it is stopped", d.ID)
	}
	ms := uint64(math.MaxUint32)
	if end, ok := ctx.Deadline(); ok {
		ms = uint64(max(time.Until(end).Milliseconds(), 1))
	}
	ended := make(chan struct{})
	go func() {
		for _, q := range d.queues {
			q.ring.Stop()
		}
		close(ended)
	}()
	for {
		// It aborts the tags that wait for a request. Those in a handler's
		// hands wait for one after their commit: the next round aborts them.
		if err := d.ctl.command(ctx, uapi.UBLK_U_CMD_QUIESCE_DEV, d.ID, ms); err != nil {
			return err
		}
		select {
		case <-ended:
			d.stopped = true
			d.release()
			d.deleted = true // it is not ours any more
			return nil
		case <-ctx.Done():
			return fmt.Errorf("quiesce device %d: %w", d.ID, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// Delete stops the device if need be and removes it. Its number is free again
// when it returns, unless somebody still has the disk open: then as soon as
// they close it.
func (d *Device) Delete(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.deleted {
		return nil
	}
	// Even if nothing was started: it aborts what has been fetched.
	if err := d.stop(ctx); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	// Before the deletion, which waits for the last one who has it open.
	d.release()
	if err := d.ctl.deleteDevice(ctx, d.ID); err != nil {
		return err
	}
	d.deleted = true
	return nil
}

// release gives back what serving took. The rings have ended.
func (d *Device) release() {
	for _, q := range d.queues {
		q.unmap()
	}
	if d.cdev != nil {
		_ = d.cdev.Close()
		d.cdev = nil
	}
	addProcs(-d.procs)
	d.procs = 0
}

// DeleteDevice removes a device that this process does not serve: one whose
// server has died, say. Not one that is alive.
func (c *Control) DeleteDevice(ctx context.Context, id int) error {
	info, err := c.Settled(ctx, id)
	if err != nil {
		return err
	}
	if info.State == Live {
		return fmt.Errorf("delete ublk device %d: %w: served by process %d", id, ErrBusy, info.PID)
	}
	if err := c.command(ctx, uapi.UBLK_U_CMD_STOP_DEV, id, 0); err != nil {
		return err
	}
	return c.deleteDevice(ctx, id)
}

// deleteDevice deletes and waits until the number is free, within reason.
func (c *Control) deleteDevice(ctx context.Context, id int) error {
	err := c.command(ctx, uapi.UBLK_U_CMD_DEL_DEV_ASYNC, id, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		// Older than 6.9: this one waits by itself. Its end may have to be
		// waited for by somebody else, the device is gone in any case.
		bounded, cancel := context.WithTimeout(ctx, goneWait)
		defer cancel()
		err = c.command(bounded, uapi.UBLK_U_CMD_DEL_DEV, id, 0)
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = nil
		}
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, goneWait)
	defer cancel()
	for {
		if _, err := c.Info(bounded, id); errors.Is(err, unix.ENODEV) {
			return nil
		}
		if sleep(bounded, pause) != nil {
			return nil
		}
	}
}
