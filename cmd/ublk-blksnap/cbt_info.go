package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtInfo() *cobra.Command {
	return &cobra.Command{
		Use:   "info DEV",
		Short: "Describe the change map of a filter",
		Long: `Describe the change map of a filter. What "take" says names the last take for
"cbt changes --since". "history" says whether the map goes on where the filter before
this one ended, and if it does not, or a take has begun a new generation, why.
"power_failure" says whether the map would go on after one; all of the "logged_zones"
would count as changed then.`,
		Example: "  ublk-blksnap cbt info data",
		Args:    args(1, 1),
		RunE:    func(c *cobra.Command, args []string) error { return p.showCBTInfo(c, args[0], true) },
	}
}

func historyLines(h control.History) string {
	switch {
	case h.Continued:
		return "history=continued\n"
	case h.Reason == "":
		return ""
	}
	return fmt.Sprintf("history=new\nhistory_reason=%s\nhistory_text=%s\n", h.Reason, h.Text)
}

func powerFailureLines(f control.PowerFailure) string {
	if !f.Covered {
		if f.Reason == "" {
			return ""
		}
		return fmt.Sprintf("power_failure=uncovered\npower_failure_text=%s\n", f.Reason)
	}
	return fmt.Sprintf("power_failure=covered\nzone_size=%d\nzone_count=%d\nlogged_zones=%d\n", f.ZoneSize, f.ZoneCount, f.Logged)
}

func (p *program) showCBTInfo(c *cobra.Command, device string, token bool) error {
	dev, err := devicePath(device)
	if err != nil {
		return err
	}
	return p.with(c, func(ctx context.Context, api control.API) error {
		i, err := api.CBTInfo(ctx, dev)
		if err != nil {
			return err
		}
		return p.print(i, func(w io.Writer) {
			fmt.Fprintf(w, "block_size=%d\ndevice_capacity=%d\nblock_count=%d\ngeneration_id=%s\nchanges_number=%d\n",
				i.BlockSize, i.DeviceCapacity, i.BlockCount, i.GenerationID, i.ChangesNumber)
			if token {
				fmt.Fprintf(w, "take=%s\n%s%s", i.Take, historyLines(i.History), powerFailureLines(i.PowerFailure))
			}
		})
	})
}
