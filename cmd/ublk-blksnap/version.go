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
			if p.name == "blksnap" {
				// That of the driver, which is ours: it says that blksnap can work here.
				// Of four numbers, and with --json too, as blksnap has it.
				if err := p.driver(); err != nil {
					return err
				}
				fmt.Fprintf(p.out, "%s.0\n", control.Version)
				return nil
			}
			return p.print(map[string]string{"version": control.Version}, func(w io.Writer) {
				fmt.Fprintf(w, "%s %s\n", p.name, control.Version)
			})
		},
	}
}
