package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) remove() *cobra.Command {
	var r control.RemoveRequest
	c := &cobra.Command{
		Use:   "remove NAME|DEV",
		Short: "Sync and remove a filter",
		Long: `Write back what is cached, remove the filter and give the disk free. A filter
that is mounted, open or held by a snapshot is not removed, and the user is named.

With --force it is removed under its users: their I/O fails from then on, and what
they wrote but did not sync is lost. Snapshots that hold it are destroyed.`,
		Args:              args(1, 1),
		ValidArgsFunction: p.deviceNames,
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.Device, err = devicePath(args[0]); err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				return api.RemoveDevice(ctx, r)
			})
		},
	}
	c.Flags().BoolVar(&r.Force, "force", false, "remove it under its users")
	return c
}
