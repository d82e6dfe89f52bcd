package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotAppend() *cobra.Command {
	var limit sizeFlag
	var overwrite bool
	c := &cobra.Command{
		Use:   "append SNAPSHOT STORAGE",
		Short: "Give a snapshot more difference storage, taken or not",
		Long: `Give a snapshot more difference storage, taken or not: a file, which is made if it is
not there, a directory, or a block device.`,
		Example: "  ublk-blksnap snapshot append nightly /srv/more --limit 10G",
		Args:    args(2, 2),
		RunE: func(c *cobra.Command, args []string) error {
			st, err := storages(args[1:], control.Storage{Limit: int64(limit), Overwrite: overwrite})
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.AppendStorage(ctx, control.StorageRequest{ID: snapshotRef(args[0]), Storage: st[0]})
				if err != nil {
					return err
				}
				p.warn(s, st, p.tell)
				if n := len(s.Storage); n > 0 {
					p.say("storage " + storageText(s.Storage[n-1])) // the one that is new
				}
				return nil
			})
		},
	}
	c.Flags().Var(&limit, "limit", "the most that the storage may take (default: all but the last 5% of its filesystem, or the last 1G)")
	c.Flags().BoolVar(&overwrite, "overwrite", false, "use a file or block device whatever it holds, which is lost")
	return c
}
