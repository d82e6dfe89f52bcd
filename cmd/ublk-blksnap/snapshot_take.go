package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotTake() *cobra.Command {
	r := control.TakeRequest{}
	c := &cobra.Command{
		Use:   "take SNAPSHOT",
		Short: "Take a snapshot: all its devices at one instant",
		Long: `Take a snapshot: all its devices at one instant, or none of them. Filesystems
mounted on them are frozen around that instant, for at most the configured
freeze_timeout; if one cannot be frozen, nothing is taken. With --no-freeze an
image is as after a power failure.

Prints the path of the image of each device, one a line. "snapshot info --field take"
prints the token that names this take for "cbt changes --since".`,
		Example: "  ublk-blksnap snapshot take nightly\n  ublk-blksnap snapshot take 6b1f --no-freeze",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			r.ID = snapshotRef(args[0])
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.TakeSnapshot(ctx, r)
				if err != nil {
					return err
				}
				return p.print(s, func(w io.Writer) { writeImages(w, s) })
			})
		},
	}
	c.Flags().BoolVar(&r.NoFreeze, "no-freeze", false, "leave mounted filesystems unfrozen")
	return c
}
