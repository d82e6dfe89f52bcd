package main

import (
	"context"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the snapshots and their image devices",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				ss, err := api.Snapshots(ctx)
				if err != nil {
					return err
				}
				p.tellLost(ctx, api)
				return p.print(ss, func(w io.Writer) {
					t := newTable(w, "UUID", "STATE", "CREATED", "CHUNK", "COPIED", "DEVICES", "IMAGES")
					for _, s := range ss {
						var names, images []string
						for _, im := range s.Images {
							names, images = append(names, im.Device), append(images, im.Link)
						}
						t.row(s.ID, s.State, s.Created.Format("2006-01-02 15:04:05"), control.FormatSize(s.ChunkSize),
							control.HumanSize(s.Usage.Copied), strings.Join(names, " "), strings.TrimSpace(strings.Join(images, " ")))
					}
					p.flush(t, "no snapshots")
				})
			})
		},
	}
}
