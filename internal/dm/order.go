package dm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Order is a change of a device that may have to wait for a disk, in a form in which another
// process can be asked for it. No table is in it.
type Order struct {
	Step   Step   `json:"step"`
	Device Device `json:"device"` // that is changed
	// From is whose live table StepMake and StepCopy take.
	From Device `json:"from"`
	// To is what StepLoad maps the device to, all of its Size in bytes.
	To   blockdev.Num `json:"to"`
	Size int64        `json:"size,omitempty"`
	// Limit is how long StepSwap may wait.
	Limit time.Duration `json:"limit,omitempty"`
}

// Step is what an Order does.
type Step string

// The steps.
const (
	StepMake   Step = "make"   // a device with the name and UUID of Device, with the table of From, which udev leaves alone
	StepCopy   Step = "copy"   // the table of From waits in Device; see ErrChanging
	StepLoad   Step = "load"   // a table that maps Device to To waits in it; see ErrChanging
	StepSwap   Step = "swap"   // the table that waits in Device becomes the live one
	StepClear  Step = "clear"  // no table waits in Device any more
	StepRemove Step = "remove" // Device goes
)

// ErrChanging: another program has a table wait in the device, or has suspended it, and goes on
// from there. Whoever put another table in that place would undo what it does, and resume what
// it has suspended.
var ErrChanging = fmt.Errorf("another program is changing its table: %w", unix.EBUSY)

// loadAlone is Load if nobody else is changing the table. That it waits already does no harm.
func (c *Control) loadAlone(d Device, t Table) error {
	i, err := c.Info(d)
	if err != nil {
		return err
	}
	waits, err := c.Inactive(d)
	defer waits.Wipe()
	if err == nil && (i.Suspended || len(waits) > 0 && !waits.Is(t)) {
		err = fmt.Errorf("load a table into %s: %w", d, ErrChanging)
	}
	if err != nil {
		return err
	}
	return c.Load(d, t)
}

// swapAlike is Swap, after which the device reads ahead as far as before: with another table the
// kernel forgets what somebody has set, who does not know of that table.
func (c *Control) swapAlike(ctx context.Context, d Device) error {
	file := fmt.Sprintf("/sys/dev/block/%s/queue/read_ahead_kb", d.Num)
	before, unknown := os.ReadFile(file)
	err := c.Swap(ctx, d)
	if now, e := os.ReadFile(file); unknown == nil && e == nil && !bytes.Equal(now, before) {
		_ = os.WriteFile(file, before, 0) // if not, it is but slower
	}
	return err
}

// Do does it. What it returns says what the device is then, unless it has gone.
func (o Order) Do() (i Info, err error) {
	c, err := Open()
	if err != nil {
		return Info{}, err
	}
	defer c.Close()
	switch o.Step {
	case StepMake, StepCopy:
		var t Table
		if t, err = c.Live(o.From); err != nil {
			return Info{}, err
		}
		defer t.Wipe()
		if o.Step == StepMake {
			return c.Make(o.Device.Name, o.Device.UUID, t, Unseen)
		}
		err = c.loadAlone(o.Device, t)
	case StepLoad:
		err = c.loadAlone(o.Device, Linear(o.Size, o.To))
	case StepSwap:
		ctx, cancel := context.WithTimeout(context.Background(), o.Limit)
		defer cancel()
		err = c.swapAlike(ctx, o.Device)
	case StepClear:
		err = c.Clear(o.Device)
	case StepRemove:
		return Info{}, c.Remove(o.Device)
	default:
		err = fmt.Errorf("device-mapper: no such step: %q", o.Step)
	}
	if err != nil {
		return Info{}, err
	}
	return c.Info(o.Device)
}
