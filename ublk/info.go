package ublk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

const (
	anyID   = 1<<32 - 1 // dev_id of a command for no device, or for a new one
	noQueue = 1<<16 - 1
)

// State is what a device is doing.
//
//	        Add              TryStop
//	Dead ─────────> Live ──────────────> Dead ──Delete──> gone
//	                │  ^
//	 server's death │  │ Resume
//	                v  │
//	              Quiesced (with recovery; without: Dead)
type State uint16

const (
	Dead     State = uapi.UBLK_S_DEV_DEAD     // no disk: not started, or stopped
	Live     State = uapi.UBLK_S_DEV_LIVE     // served
	Quiesced State = uapi.UBLK_S_DEV_QUIESCED // requests wait for a new server
	FailIO   State = uapi.UBLK_S_DEV_FAIL_IO  // requests fail until there is a new server
)

func (s State) String() string {
	switch s {
	case Dead:
		return "dead"
	case Live:
		return "live"
	case Quiesced:
		return "quiesced"
	case FailIO:
		return "failing"
	}
	return "state " + strconv.Itoa(int(s))
}

// Info is what the driver knows of a device.
type Info struct {
	ID     int
	State  State
	Queues int
	Depth  int
	MaxIO  int    // bytes of the largest request
	PID    int    // of the server, as the driver saw it; -1 if there is none
	Flags  uint64 // UBLK_F
	Tag    uint64 // Config.Tag
}

func infoOf(d *uapi.UblksrvCtrlDevInfo) Info {
	return Info{
		ID:     int(d.DevID),
		State:  State(d.State),
		Queues: int(d.NrHwQueues),
		Depth:  int(d.QueueDepth),
		MaxIO:  int(d.MaxIOBufBytes),
		PID:    int(d.UblksrvPid),
		Flags:  d.Flags,
		Tag:    d.UblksrvFlags,
	}
}

// bytesOf is the memory of *p, for a command's buffer.
func bytesOf[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

// command runs a command without a buffer on device id.
func (c *Control) command(ctx context.Context, op uint32, id int, data uint64) error {
	return c.do(ctx, op, uapi.UblksrvCtrlCmd{DevID: uint32(id), QueueID: noQueue, Data: [1]uint64{data}}, nil)
}

// Info asks for device id. The error is ENODEV if there is no such device.
//
// Two of the driver's commands answer the same. Info uses the older one. The newer
// one looks the device's node up by its path first, which only unprivileged servers
// need.
func (c *Control) Info(ctx context.Context, id int) (Info, error) {
	var d uapi.UblksrvCtrlDevInfo
	err := c.do(ctx, uapi.UBLK_U_CMD_GET_DEV_INFO, uapi.UblksrvCtrlCmd{DevID: uint32(id), QueueID: noQueue}, bytesOf(&d))
	if err != nil {
		return Info{}, err
	}
	return infoOf(&d), nil
}

// Served says whether there is a process that serves the device. The driver notices
// the end of a server only after a while; see SettledInfo.
func (i Info) Served() bool {
	if i.State != Live {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", i.PID))
	if err != nil {
		return false
	}
	// The state follows the name, which is in parentheses and may hold any.
	_, state, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// noticeTimeout is how long the driver may take to notice the end of a server. Before
// Linux 6.9 it looks every 5 s, and it syncs the disk first.
const noticeTimeout = 15 * time.Second

// SettledInfo is Info. If the server of device id has died, SettledInfo waits until
// the driver has noticed that. If the driver does not notice it in time, the device is
// still Live in what SettledInfo returns.
func (c *Control) SettledInfo(ctx context.Context, id int) (Info, error) {
	limited, cancel := context.WithTimeout(ctx, noticeTimeout)
	defer cancel()
	for {
		i, err := c.Info(ctx, id)
		if err != nil || i.State != Live || i.Served() || sleep(limited, pollInterval) != nil {
			return i, err
		}
	}
}

func (c *Control) params(ctx context.Context, id int) (uapi.UblkParams, error) {
	p := uapi.UblkParams{Len: uint32(unsafe.Sizeof(uapi.UblkParams{}))}
	err := c.do(ctx, uapi.UBLK_U_CMD_GET_PARAMS, uapi.UblksrvCtrlCmd{DevID: uint32(id), QueueID: noQueue}, bytesOf(&p))
	return p, err
}

// queueCPUs are the CPUs that the requests of queue q come from.
func (c *Control) queueCPUs(ctx context.Context, id, q int) (*unix.CPUSet, error) {
	var set unix.CPUSet
	cmd := uapi.UblksrvCtrlCmd{DevID: uint32(id), QueueID: uint16(q), Data: [1]uint64{uint64(q)}}
	if err := c.do(ctx, uapi.UBLK_U_CMD_GET_QUEUE_AFFINITY, cmd, bytesOf(&set)); err != nil {
		return nil, err
	}
	return &set, nil
}

// A tag marks a device as this program's, and tells it from every other device. The
// device's number cannot do that, because it is used again as soon as it is free.
//
//	bits  63..32   31..8    7..0
//	      tagMagic nonce    kind, the caller's
const tagMagic = uint64(0x626c6b73) // "blks"

// NewTag is the mark of a new device that belongs to this program: kind tells what
// it is for, and is the caller's.
func NewTag(kind byte) uint64 {
	return tagMagic<<32 | uint64(rand.Uint32())<<8&0xffffff00 | uint64(kind)
}

// IsOurs says whether tag was made by NewTag, and with which kind.
func IsOurs(tag uint64) (kind byte, ok bool) {
	return byte(tag), tag>>32 == tagMagic
}

// List returns the machine's ublk devices of every server, by number.
func (c *Control) List(ctx context.Context) ([]Info, error) { return c.list(ctx, "/sys") }

func (c *Control) list(ctx context.Context, sys string) ([]Info, error) {
	ids, err := deviceIDs(sys)
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, id := range ids {
		i, err := c.Info(ctx, id)
		if errors.Is(err, unix.ENODEV) {
			continue // gone since
		}
		if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	return out, nil
}

func deviceIDs(sys string) ([]int, error) {
	entries, err := os.ReadDir(sys + "/class/ublk-char")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ublk devices: %w", err)
	}
	var ids []int
	for _, e := range entries {
		if n, ok := strings.CutPrefix(e.Name(), "ublkc"); ok {
			if id, err := strconv.Atoi(n); err == nil {
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return ids, nil
}
