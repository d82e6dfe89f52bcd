package main

import (
	"context"
	"fmt"
	"io"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtChanges() *cobra.Command {
	var r control.ChangesRequest
	c := &cobra.Command{
		Use:   "changes DEV --since N",
		Short: "List the ranges that changed between a take and the last one",
		Long: `List the ranges that changed between take N and the last take, as SECTOR:COUNT in
sectors of 512 bytes, merged and in order. N belongs to a generation: with
--generation it is an error if that one has ended, and everything has to be copied.`,
		Args:              args(1, 1),
		ValidArgsFunction: p.deviceNames,
		RunE: func(c *cobra.Command, args []string) (err error) {
			if !c.Flags().Changed("since") {
				return usage("changes: since which take? give --since N")
			}
			if r.Generation != "" {
				if _, err := uuid.Parse(r.Generation); err != nil {
					return usage("changes: --generation %s: not a UUID", r.Generation)
				}
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
	c.Flags().Uint8Var(&r.Since, "since", 0, "number of a take")
	c.Flags().StringVar(&r.Generation, "generation", "", "UUID of the generation that N belongs to")
	return c
}
