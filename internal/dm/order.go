package dm

import (
	"context"
	"fmt"
	"time"

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
	StepCopy   Step = "copy"   // the table of From waits in Device
	StepLoad   Step = "load"   // a table that maps Device to To waits in it
	StepSwap   Step = "swap"   // the table that waits in Device becomes the live one
	StepClear  Step = "clear"  // no table waits in Device any more
	StepRemove Step = "remove" // Device goes
)

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
		err = c.Load(o.Device, t)
	case StepLoad:
		err = c.Load(o.Device, Linear(o.Size, o.To))
	case StepSwap:
		ctx, cancel := context.WithTimeout(context.Background(), o.Limit)
		defer cancel()
		err = c.Swap(ctx, o.Device)
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
