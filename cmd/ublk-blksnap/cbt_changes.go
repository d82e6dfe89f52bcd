package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtChanges() *cobra.Command {
	var r control.ChangesRequest
	var since string
	c := &cobra.Command{
		Use:   "changes DEV --since GENERATION:N",
		Short: "List the ranges that changed between a take and the last one",
		Long: `List the ranges that changed between a take and the last one, as SECTOR:COUNT in
sectors of 512 bytes, merged and in order. The take is named by the token that
"snapshot take" printed for the device. Status 6 says that its generation has ended:
everything has to be copied.`,
		Args:              args(1, 1),
		ValidArgsFunction: p.deviceNames,
		RunE: func(c *cobra.Command, args []string) (err error) {
			if !c.Flags().Changed("since") {
				return usage("changes: since which take? give --since GENERATION:N")
			}
			if r.Since, err = control.ParseTake(since); err != nil {
				return fmt.Errorf("changes: --since: %w", err)
			}
			if r.Device, err = devicePath(args[0]); err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				ch, err := api.CBTChanges(ctx, r)
				if err != nil {
					return err
				}
				return p.print(ch, func(w io.Writer) {
					for _, x := range ch.Ranges {
						fmt.Fprintln(w, x)
					}
				})
			})
		},
	}
	c.Flags().StringVar(&since, "since", "", "token of a take, GENERATION:N")
	return c
}
