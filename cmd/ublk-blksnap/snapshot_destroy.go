package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotDestroy() *cobra.Command {
	return &cobra.Command{
		Use:   "destroy UUID...",
		Short: "Destroy snapshots",
		Long: `Destroy snapshots: their images and the old data kept for them. Who still uses an
image gets I/O errors.`,
		Args: args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				var errs []error
				for _, id := range args {
					errs = append(errs, api.DestroySnapshot(ctx, id))
				}
				return errors.Join(errs...)
			})
		},
	}
}
