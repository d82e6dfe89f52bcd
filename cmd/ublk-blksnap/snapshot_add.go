package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotAdd() *cobra.Command {
	return &cobra.Command{
		Use:     "add SNAPSHOT DEV",
		Short:   "Add a filter to a snapshot that is not taken yet",
		Example: "  ublk-blksnap snapshot add nightly logs",
		Args:    args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			dev, err := devicePath(args[1])
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				_, err := api.AddToSnapshot(ctx, control.SnapshotDeviceRequest{ID: snapshotRef(args[0]), Device: dev})
				return err
			})
		},
	}
}
