package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) add() *cobra.Command {
	var r control.AddRequest
	var mode string
	c := &cobra.Command{
		Use:   "add DEV [flags]",
		Short: "Put a filter over a disk",
		Long: `Put a filter over a disk and print the path of the filter device, which is to be
used in the disk's place from now on: format it, mount it, put volumes on it.

DEV is a whole disk, a partition or a device-mapper device that nobody uses: not
mounted, no swap space, not part of an array, volume group or loop device. It is
opened exclusively, so that nobody can mount it beside the filter.

The content stays where it is: after "remove" the disk is used directly again.`,
		Example: "  ublk-blksnap add /dev/vdb\n  ublk-blksnap add /dev/vg0/data --name data --queues 4",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.Path, err = devicePath(args[0]); err != nil {
				return err
			}
			if mode != "" {
				if r.Mode, err = control.ParseMode(mode); err != nil {
					return usage("add %s: %v", args[0], err)
				}
			}
			for flag, v := range map[string]int{"queues": r.Queues, "depth": r.Depth} {
				if c.Flags().Changed(flag) && v < 1 {
					return usage("add %s: --%s %d: must be at least 1", args[0], flag, v)
				}
			}
			return p.start(c, func(ctx context.Context, api control.API) error {
				d, err := api.AddDevice(ctx, r)
				if err != nil {
					return err
				}
				// A disk that cannot be known again begins anew each time: "cbt info" says so.
				if h := d.History; h.Reason != "" && h.Reason != control.HistoryNone && h.Reason != control.HistoryUnknown {
					p.tell(fmt.Sprintf("%s: change tracking begins anew, the next backup copies everything: %s", d.Name, h.Text))
				}
				return p.print(d, func(w io.Writer) { fmt.Fprintln(w, d.Link) })
			})
		},
	}
	f := c.Flags()
	f.StringVar(&r.Name, "name", "", "name of the filter (default: the disk's)")
	f.IntVar(&r.Queues, "queues", 0, "queues, each with a thread of its own (default: as configured)")
	f.IntVar(&r.Depth, "depth", 0, "requests in flight per queue, 1 to 4096 (default: as configured)")
	f.StringVar(&mode, "mode", "", "how payloads travel: auto, copy or zerocopy (default: as configured)")
	return c
}
