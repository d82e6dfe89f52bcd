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
	var force bool
	c := &cobra.Command{
		Use:   "destroy SNAPSHOT...",
		Short: "Destroy snapshots",
		Long: `Destroy snapshots: their images and the old data kept for them. One whose image is
mounted or open is not destroyed, and the user is named (status 5). One that cannot
be destroyed keeps none of the others. With --json the UUIDs of the destroyed ones
are printed.

With --force they are destroyed under their users. From then on each read of an image
and each write to it fails: a backup that reads one breaks off, and a filesystem that
is mounted from one gives errors until it is unmounted. What was written to an image
is lost in any case. The users are named on standard error, as far as a second is
enough to find them. The disks themselves, and their filters, do not notice.`,
		Example: "  ublk-blksnap snapshot destroy nightly\n  ublk-blksnap snapshot destroy --force latest 6b1f",
		Args:    args(1, -1),
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				ids, errs := resolve(ctx, api, args)
				destroyed := []string{}
				for _, id := range ids {
					cut, err := api.DestroySnapshot(ctx, control.DestroyRequest{ID: id, Force: force})
					p.tellCutOff("destroy snapshot "+id, cut)
					if err == nil {
						destroyed = append(destroyed, id)
					}
					errs = append(errs, err)
				}
				return errors.Join(append(errs, p.print(destroyed, func(io.Writer) {}))...)
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "destroy them under the users of their images, whose I/O fails")
	return c
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
