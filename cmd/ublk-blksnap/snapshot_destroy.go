package main

import (
	"context"
	"errors"
	"io"
	"slices"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotDestroy() *cobra.Command {
	return &cobra.Command{
		Use:   "destroy SNAPSHOT...",
		Short: "Destroy snapshots",
		Long: `Destroy snapshots: their images and the old data kept for them. Who still uses an
image gets I/O errors. One that cannot be destroyed keeps none of the others.
With --json the UUIDs of the destroyed ones are printed.`,
		Example: "  ublk-blksnap snapshot destroy nightly",
		Args:    args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				ids, errs := resolve(ctx, api, args)
				destroyed := []string{}
				for _, id := range ids {
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

// resolve finds the UUIDs of all snapshots before one of them changes: else "latest" would be
// another one each time.
func resolve(ctx context.Context, api control.API, refs []string) (ids []string, errs []error) {
	for _, ref := range refs {
		u, err := uuid.Parse(ref)
		id := u.String()
		if err != nil {
			var s control.Snapshot
			if s, err = api.Snapshot(ctx, snapshotRef(ref)); err != nil {
				errs = append(errs, err)
				continue
			}
			id = s.ID
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, errs
}
