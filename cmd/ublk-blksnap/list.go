package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) list() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the filters",
		Example: "  ublk-blksnap list\n  ublk-blksnap list --json",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				ds, err := api.Devices(ctx)
				if err != nil {
					return err
				}
				p.tellLost(ctx, api)
				p.tellUnfiltered(ctx, api)
				for _, d := range ds {
					if text := uncleanEnd(d.History); text != "" {
						p.tell(d.Name + ": " + text)
					}
					if d.Attention != "" {
						p.tell(d.Name + ": " + d.Attention)
					}
				}
				return p.print(ds, func(w io.Writer) {
					t := newTable(w, "NAME", "ORIGINAL", "DEVICE", "SIZE", "MODE", "QUEUES", "SNAPSHOTS")
					for _, d := range ds {
						t.row(d.Name, d.Original, d.Path, control.HumanSize(d.Size), d.Mode,
							fmt.Sprintf("%dx%d", d.Queues, d.Depth), len(d.Snapshots))
					}
					p.flush(t, "no filters")
				})
			})
		},
	}
}

// table writes columns; nothing at all without rows, but to a person.
type table struct {
	w    *tabwriter.Writer
	head []any
}

func newTable(w io.Writer, head ...any) *table {
	return &table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0), head}
}

func (t *table) row(cells ...any) {
	if t.head != nil {
		head := t.head
		t.head = nil
		t.row(head...)
	}
	for i, c := range cells {
		end := "\t"
		if i == len(cells)-1 {
			end = "\n"
		}
		fmt.Fprint(t.w, c, end)
	}
}

// flush ends a table. Who reads an empty one on a terminal is told so.
func (p *program) flush(t *table, empty string) {
	if t.head != nil && p.read(p.out) {
		fmt.Fprintln(p.out, empty)
	}
	_ = t.w.Flush()
}
