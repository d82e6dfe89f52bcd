package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// ErrBusy: the device is in use.
var ErrBusy = errors.New("device is in use")

// ErrUnsynced: what was written to the disk may not have got to the handlers, or these
// could not make it durable.
var ErrUnsynced = blockdev.ErrUnsynced

// Device is a ublk device served by this process.
//
// Its methods may be called from any goroutine, but not on a queue's thread. TryStop
// and Delete may be called more than once.
type Device struct {
	ID     int
	Path   string // /dev/ublkbN
	CPath  string // /dev/ublkcN
	Num    blockdev.Num
	Mode   Mode // ModeCopy or ModeZeroCopy
	Queues int
	Depth  int
	MaxIO  int
	Flags  uint64 // UBLK_F, as granted

	ctl        *Control
	files      []*blockdev.OSFile
	name       string
	slots      int
	noPartScan bool
	newHandler func(q int, bq blockdev.Queue) Handler
	openedBy   func(blockdev.Num) string           // see Config.OpenedBy
	claimDisk  func(path string) (Claimant, error) // see Config.Claim
	cdev       *blockdev.OSFile                    // nil when closed
	queues     []*queue
	procs      int // queues told to addProcs

	mu      sync.Mutex // serializes TryStop, Sync, Quiesce and Delete
	ending  bool       // the driver was told to take the disk away
	stopped bool       // the rings have ended
	deleted bool
	claims  chan struct{} // closed when no claim of ours is under way; see claim

	unsynced atomic.Pointer[error] // of the first sync that failed: see Sync
}

const (
	nodeTimeout      = 30 * time.Second // for udev to be done with a node
	undoTimeout      = 30 * time.Second // for the steps of a failed start
	resumeTimeout    = 10 * time.Minute // for the fetching, of which nothing waits for a disk
	lastCloseTimeout = 2 * time.Second  // for the last users of a deleted device
	pollInterval     = 5 * time.Millisecond
)

func newDevice(ctl *Control, cfg *Config, info Info) *Device {
	d := &Device{
		ID:         info.ID,
		Path:       fmt.Sprintf("/dev/ublkb%d", info.ID),
		CPath:      fmt.Sprintf("/dev/ublkc%d", info.ID),
		Mode:       ModeCopy,
		Queues:     info.Queues,
		Depth:      info.Depth,
		MaxIO:      info.MaxIO,
		Flags:      info.Flags,
		ctl:        ctl,
		files:      cfg.Files,
		name:       cfg.Name,
		slots:      cfg.Slots,
		noPartScan: cfg.NoPartScan,
		newHandler: cfg.NewHandler,
		openedBy:   cfg.OpenedBy,
		claimDisk:  cfg.Claim,
		claims:     make(chan struct{}),
	}
	if d.claimDisk == nil {
		d.claimDisk = ClaimDisk
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

// Info asks the driver for the device.
func (d *Device) Info(ctx context.Context) (Info, error) { return d.ctl.Info(ctx, d.ID) }

// Unregistered is how many requests failed because the kernel could not register
// their payload, although it was asked again and again.
func (d *Device) Unregistered() uint64 {
	var n uint64
	for _, q := range d.queues {
		n += q.unregistered.Load()
	}
	return n
}

// Answers waits until the thread of each queue has run a task, or has ended.
func (d *Device) Answers(ctx context.Context) error {
	for _, q := range d.queues {
		if err := q.ring.Answers(ctx); err != nil {
			return err
		}
	}
	return nil
}

// release gives back what the device took to be served. The rings have ended.
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
