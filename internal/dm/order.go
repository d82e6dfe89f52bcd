package dm

import (
	"bytes"
	"context"
	"errors"
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
	// From has the table that Device had, or shall have, on its own.
	From Device `json:"from"`
	// To is what all of Device is mapped to in the place of that.
	To blockdev.Num `json:"to"`
	// Limit is how long StepSwap may wait.
	Limit time.Duration `json:"limit,omitempty"`
}

// Step is what an Order does.
type Step string

// The steps.
const (
	StepMake   Step = "make"   // a device with the name and UUID of Device, with the table of From, which udev leaves alone
	StepLoad   Step = "load"   // a table that maps Device to To waits in it, and its live one is that of From; see ErrChanging
	StepCopy   Step = "copy"   // the table of From waits in Device, and its live one maps it to To; see ErrChanging
	StepSwap   Step = "swap"   // the one of these two that waits in Device becomes the live one, if the other is; see ErrChanging
	StepResume Step = "resume" // Device goes on where a StepSwap has died, and left it suspended; see ErrChanging
	StepClear  Step = "clear"  // neither of these two waits in Device any more; see ErrChanging
	StepRemove Step = "remove" // Device goes
)

// ErrChanging: another program has given the device another table, has one wait in it, or has
// suspended it, and goes on from there. Whoever put a table of his own in that place would undo
// what it does, and bring the users of the device to where their data is no more.
var ErrChanging = fmt.Errorf("another program is changing its table: %w", unix.EBUSY)

// replace is Load of a table that shall come in the place of live, if nobody else is changing the
// table. That it waits already does no harm.
func (c *Control) replace(d Device, live, t Table) error {
	i, err := c.Info(d)
	if err != nil {
		return err
	}
	waits, err := c.Inactive(d)
	defer waits.Wipe()
	if err == nil && (i.Suspended || len(waits) > 0 && !waits.Is(t)) {
		err = ErrChanging
	}
	if err == nil {
		err = c.stillLive(d, live)
	}
	if err == nil {
		err = c.Load(d, t)
	}
	if err == nil { // once more: somebody may have come between
		if err = c.stillLive(d, live); err != nil {
			err = errors.Join(err, c.Clear(d))
		}
	}
	if err != nil {
		return fmt.Errorf("load a table into %s: %w", d, err)
	}
	return nil
}

// swapOwn is swapAlike, if all is as replace has left it: one of these two tables waits, and the
// other is the live one. LVM may have come between. It suspends a device, with the filesystem on
// it frozen, for as long as it has more to change, and a Swap would be the resume of that. The
// kernel cannot look and swap in one step. So somebody may still come between these two calls,
// but has not the time any more in which one process asks another.
func (c *Control) swapOwn(ctx context.Context, d Device, own, mapped Table) error {
	now, err := c.Live(d)
	defer now.Wipe()
	var waits Table
	if err == nil {
		waits, err = c.Inactive(d)
		defer waits.Wipe()
	}
	var i Info
	if err == nil {
		i, err = c.Info(d) // last, because LVM's suspend is what must not be missed
	}
	ready := now.Is(own) && waits.Is(mapped) || now.Is(mapped) && waits.Is(own)
	if err == nil && (i.Suspended || !i.Inactive || !ready) {
		err = ErrChanging
	}
	if err != nil {
		return fmt.Errorf("give %s its other table: %w", d, err)
	}
	return c.swapAlike(ctx, d)
}

// resumeOwn is Resume of a device in which no table waits: whoever has one wait resumes it.
func (c *Control) resumeOwn(d Device) error {
	i, err := c.Info(d)
	switch {
	case err != nil || !i.Suspended:
		return err
	case i.Inactive:
		return fmt.Errorf("resume %s: %w", d, ErrChanging)
	}
	return c.Resume(d)
}

// stillLive is ErrChanging if the live table of a device is another one.
func (c *Control) stillLive(d Device, live Table) error {
	now, err := c.Live(d)
	defer now.Wipe()
	if err == nil && !now.Is(live) {
		err = ErrChanging
	}
	return err
}

// clearOwn is Clear, if what waits is own, or maps all of the device to another one.
func (c *Control) clearOwn(d Device, own Table, to blockdev.Num) error {
	waits, err := c.Inactive(d)
	defer waits.Wipe()
	switch {
	case err != nil || len(waits) == 0:
		return err
	case !waits.Is(own) && !waits.Is(Linear(waits.Size(), to)):
		return fmt.Errorf("clear the table that waits in %s: %w", d, ErrChanging)
	}
	return c.Clear(d)
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
	case StepMake, StepLoad, StepCopy, StepSwap:
		var own Table
		if own, err = c.Live(o.From); err != nil {
			return Info{}, err
		}
		defer own.Wipe()
		mapped := Linear(own.Size(), o.To)
		switch o.Step {
		case StepMake:
			return c.Make(o.Device.Name, o.Device.UUID, own, Unseen)
		case StepLoad:
			err = c.replace(o.Device, own, mapped)
		case StepCopy:
			err = c.replace(o.Device, mapped, own)
		default:
			ctx, cancel := context.WithTimeout(context.Background(), o.Limit)
			defer cancel()
			err = c.swapOwn(ctx, o.Device, own, mapped)
		}
	case StepResume:
		err = c.resumeOwn(o.Device)
	case StepClear:
		var own Table
		if own, err = c.Live(o.From); err == nil || errors.Is(err, unix.ENXIO) { // it may have gone
			err = c.clearOwn(o.Device, own, o.To)
			own.Wipe()
		}
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
