package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotDestroy() *cobra.Command {
	return &cobra.Command{
		Use:   "destroy UUID...",
		Short: "Destroy snapshots",
		Long: `Destroy snapshots: their images and the old data kept for them. Who still uses an
image gets I/O errors. One that cannot be destroyed keeps none of the others.
With --json the UUIDs of the destroyed ones are printed.`,
		Args: args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				destroyed := []string{}
				var errs []error
				for _, id := range args {
					err := api.DestroySnapshot(ctx, id)
					if err == nil {
						destroyed = append(destroyed, id)
					}
					errs = append(errs, err)
				}
				return errors.Join(append(errs, p.print(destroyed, func(io.Writer) {}))...)
			})
		},
	}
}
