package ublk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
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

// DefaultMaxIO is the MaxIO for a device whose user knows nothing better.
const DefaultMaxIO = 512 << 10

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

// Claimant has a disk open, so that nobody else can claim it, until Release.
type Claimant struct {
	Release func()
	// Held says whether it has the disk still; nil: nothing but Release ends that.
	Held func() bool
}

// Config describes a device.
type Config struct {
	Name   string // for people: part of the names of its threads
	Tag    uint64 // the driver keeps it, and Info returns it; see NewTag
	ID     int    // its number N in /dev/ublkbN, or AnyID
	Queues int    // 1 to MaxQueues
	Depth  int    // requests in flight per queue, 1 to MaxDepth
	// MaxIO is the largest payload in bytes: a multiple of the page size, at
	// most 32 MiB. ModeCopy takes Depth times as much memory for each queue,
	// all of it at once.
	MaxIO    int
	Mode     Mode
	Geometry Geometry
	// Recovery: requests wait for a new server (Claim) when this one dies,
	// and those in its hands are repeated. Otherwise they fail, and the disk
	// goes with its server.
	Recovery bool
	// NoPartScan: the kernel shall not look for partitions. Before Linux 7.0 it would look for
	// them while it starts the disk (Control.ScansInStart), and a server that dies then never
	// ends: its command waits for the disk, and the driver gives that to no other server before
	// the command has ended.
	// It does not look for them either if a queue's server may not administer the system. Then
	// BLKRRPART is refused later too, but not BLKPG.
	NoPartScan bool
	// Files are registered with the ring of every queue, for the handler. They
	// stay the caller's, and open until the device is deleted.
	Files []*blockdev.OSFile
	// Slots is how many operations a queue's handler has in flight at most
	// before they wait; 0: twice Depth.
	Slots int
	// OpenedBy names a process that has the disk of this number, or one of its
	// partitions, open; empty if there is none. ErrBusy quotes it. Before Linux 7.0
	// the driver does not know the openers, and TryStop relies on OpenedBy. If it is
	// nil, nobody looks for openers.
	OpenedBy func(blockdev.Num) string
	// Claim opens the disk at a path, so that nobody else can claim it, and makes it durable,
	// before it is stopped; nil: this process does. Both may wait for the disk's own I/O, the
	// opening because somebody reads the partition table. If this process is killed then, it
	// does not end before the disk is served again, and the driver gives the disk to no other
	// while it has not ended. So who wants the disk to be taken over has another process do it.
	// Its error is that of open(2), or ErrUnsynced, as of ClaimDisk.
	Claim func(path string) (Claimant, error)
	// NewHandler makes the handler of queue q, whose thread is that of bq. It
	// is called before the queue's first request, on another thread.
	NewHandler func(q int, bq blockdev.Queue) Handler
}

// CheckConfig says whether a device can be made so, and in which mode it would be.
func CheckConfig(ctl *Control, cfg Config) (Mode, error) {
	zeroCopy, err := cfg.check(ctl)
	if zeroCopy {
		return ModeZeroCopy, err
	}
	return ModeCopy, err
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
			return false, unsupported(uapi.UBLK_F_AUTO_BUF_REG)
		}
		if cfg.Geometry.StableWrites {
			return false, errors.New("zero copy: the disk makes checksums of the data that is written, so the data must not change during the write: use mode copy")
		}
		return true, nil
	}
	return false, fmt.Errorf("unknown payload mode %d", cfg.Mode)
}

// flags are the UBLK_F flags to ask for, and those of them that the driver must
// grant.
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
	// The driver would silently clear the flags that it does not know.
	return ask & (ctl.features | need), need
}
