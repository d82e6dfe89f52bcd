package main

import (
	"cmp"
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotList() *cobra.Command {
	var labels []string
	c := &cobra.Command{
		Use:   "list",
		Short: "List the snapshots and their image devices",
		Long: `List the snapshots and their image devices, the oldest first. With --label only those
that have each of these labels.`,
		Example: "  ublk-blksnap snapshot list\n  ublk-blksnap snapshot list --label job=backup --json",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			wanted, err := parseLabels("list", labels)
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				ss, err := api.Snapshots(ctx)
				if err != nil {
					return err
				}
				ss = slices.DeleteFunc(ss, func(s control.Snapshot) bool { return !hasLabels(s, wanted) })
				p.tellLost(ctx, api)
				for _, s := range ss {
					if text := overdue(s); text != "" {
						p.tell(text)
					}
				}
				return p.print(ss, func(w io.Writer) {
					t := newTable(w, "UUID", "NAME", "STATE", "CREATED", "EXPIRES", "CHUNK", "COPIED", "DEVICES", "IMAGES")
					for _, s := range ss {
						var names, images []string
						for _, im := range s.Images {
							names, images = append(names, im.Device), append(images, im.Link)
						}
						expires := "-"
						if s.Expires != nil {
							expires = s.Expires.Format(time.DateTime)
						}
						t.row(s.ID, cmp.Or(s.Name, "-"), s.State, s.Created.Format(time.DateTime), expires, control.FormatSize(s.ChunkSize),
							control.HumanSize(s.Usage.Copied), cmp.Or(strings.Join(names, " "), "-"), cmp.Or(strings.TrimSpace(strings.Join(images, " ")), "-"))
					}
					p.flush(t, "no snapshots")
				})
			})
		},
	}
	c.Flags().StringArrayVar(&labels, "label", nil, "KEY=VALUE: only those that have this label; may be given again")
	return c
}

func hasLabels(s control.Snapshot, wanted map[string]string) bool {
	for key, value := range wanted {
		if has, ok := s.Labels[key]; !ok || has != value {
			return false
		}
	}
	return true
}
