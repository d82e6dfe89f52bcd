package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtMark() *cobra.Command {
	return &cobra.Command{
		Use:     "mark DEV SECTOR:COUNT...",
		Short:   "Count ranges as changed: all of them, or none if one is wrong",
		Example: "  ublk-blksnap cbt mark data 0:8 2048:16",
		Args:    args(2, -1),
		RunE:    func(c *cobra.Command, args []string) error { return p.markRanges(c, args[0], args[1:]) },
	}
}

func (p *program) markRanges(c *cobra.Command, device string, ranges []string) error {
	dev, err := devicePath(device)
	if err != nil {
		return err
	}
	r := control.MarkRequest{Device: dev}
	for _, s := range ranges {
		marked, err := control.ParseRange(s)
		if err != nil {
			return usage("%s %s: %v", c.Name(), device, err)
		}
		r.Ranges = append(r.Ranges, marked)
	}
	return p.with(c, func(ctx context.Context, api control.API) error { return api.MarkDirty(ctx, r) })
}
