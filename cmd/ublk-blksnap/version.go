package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) version() *cobra.Command {
	short := "Print the version, and the commit it was built from"
	if p.name == "blksnap" {
		short = "Print the version as four numbers, as blksnap's driver has it, if the driver is there"
	}
	return &cobra.Command{
		Use:     "version",
		Short:   short,
		Example: "  ublk-blksnap version",
		Args:    args(0, 0),
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
			answer := map[string]string{"version": control.Version}
			if c := control.Commit(); c != "" {
				answer["commit"] = c
			}
			return p.print(answer, func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", p.name, longVersion()) })
		},
	}
}

// longVersion is the version, with the commit if that is known.
func longVersion() string {
	if c := control.Commit(); c != "" {
		return control.Version + " (" + c + ")"
	}
	return control.Version
}
