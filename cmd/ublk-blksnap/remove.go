package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

func (p *program) remove() *cobra.Command {
	var r control.RemoveRequest
	var boot bool
	c := &cobra.Command{
		Use:   "remove NAME|DEV",
		Short: "Sync and remove a filter",
		Long: `Write back what is cached, remove the filter and give the disk free. A filter
that is mounted, open or held by a snapshot is not removed, and the user is named.
One that "add" has put under a device-mapper device is removed whoever uses that, if
no snapshot holds it: the users go on without it.

With --force it is removed under its users: their I/O fails from then on, and what
they wrote but did not sync is lost. Users of a device-mapper device go on, and only
requests that do not end otherwise fail. Snapshots that hold the filter are destroyed.
What that breaks is named on standard error: these snapshots, who holds a device and
who has one open, as far as a second is enough to find out.

A disk that the configuration names gets its filter again at the next boot, and may
not be used without it, unless --boot is given. That works without a daemon too, and
holds for the next boot even if the filter cannot be removed now.`,
		Example: "  ublk-blksnap remove data\n  ublk-blksnap remove data --boot",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.Device, err = devicePath(args[0]); err != nil {
				return err
			}
			if boot {
				return p.removeBoot(c, r)
			}
			return p.removeNow(c, r)
		},
	}
	c.Flags().BoolVar(&boot, "boot", false, "at the next boot too")
	c.Flags().BoolVar(&r.Force, "force", false, "remove it under its users")
	return c
}

func (p *program) removeNow(c *cobra.Command, r control.RemoveRequest) error {
	return p.with(c, func(ctx context.Context, api control.API) error {
		cut, err := api.RemoveDevice(ctx, r)
		p.tellCutOff("remove "+r.Device, cut)
		return err
	})
}

// tellCutOff says what was broken by force.
func (p *program) tellCutOff(what string, c control.CutOff) {
	for _, who := range c.Users {
		p.tell(what + ": I/O fails from now on: " + who)
	}
	for _, s := range c.Snapshots {
		p.tell(what + ": snapshot " + s + " is destroyed")
	}
}

// removeBoot takes a disk out of the configuration, and its filter away if there is
// one.
func (p *program) removeBoot(c *cobra.Command, r control.RemoveRequest) error {
	b, ok, err := daemon.FindBootDevice(p.configFile(), r.Device)
	if err != nil {
		return err
	}
	if !ok {
		return &control.Error{Code: control.NotFound, Message: "remove " + r.Device + ": the configuration names no such disk", Fix: "leave --boot out"}
	}
	if err := daemon.RemoveBootDevice(p.configFile(), b); err != nil {
		return fmt.Errorf("remove %s: %w", r.Device, err)
	}
	r.Device = b.Name
	err = p.removeNow(c, r)
	if code := control.CodeOf(err); err != nil && code != control.NotFound && code != control.Unavailable {
		return fmt.Errorf("%s has no filter from the next boot on, but now: %w", b.Name, err)
	}
	return nil
}
