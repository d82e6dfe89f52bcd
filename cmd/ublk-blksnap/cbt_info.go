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
this one ended, and if it does not, why.`,
		Args:              args(1, 1),
		ValidArgsFunction: p.deviceNames,
		RunE:              func(c *cobra.Command, args []string) error { return p.showCBTInfo(c, args[0], true) },
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
				fmt.Fprintf(w, "take=%s\n%s", i.Take, historyLines(i.History))
			}
		})
	})
}
