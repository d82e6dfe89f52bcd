package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			return p.print(map[string]string{"version": control.Version}, func(w io.Writer) {
				if p.name == "blksnap" {
					// blksnap's versions have four parts.
					fmt.Fprintf(w, "%s.0\n", control.Version)
					return
				}
				fmt.Fprintf(w, "%s %s\n", p.name, control.Version)
			})
		},
	}
}
