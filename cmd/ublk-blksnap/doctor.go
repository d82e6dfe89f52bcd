package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

func (p *program) doctor() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Tell whether this machine can run it, and what to do if not",
		Long: `Tell whether this machine can run ublk-blksnap: each line is ok, a note on what is
not there but not needed, or what is missing and what to do. Volumes that were
attached while in use have a line each, which says whether their requests come to
the filter. Nothing is changed, but that the ublk driver is loaded if it can be.
Status 1 if something that is needed is missing.`,
		Example: "  ublk-blksnap doctor",
		Args:    args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			cfg, err := readConfig(p.configFile())
			if err != nil {
				return err
			}
			checks := daemon.Examine(cfg)
			well := true
			for _, c := range checks {
				well = well && c.Result != daemon.Missing
			}
			err = p.print(map[string]any{"ok": well, "checks": checks}, func(w io.Writer) {
				for _, c := range checks {
					fmt.Fprintf(w, "%-7s %-24s %s\n", c.Result, c.Name, c.Text)
					if c.Fix != "" {
						fmt.Fprintf(w, "%-7s %-24s → %s\n", "", "", c.Fix)
					}
				}
			})
			if err == nil && !well {
				err = silentError(statusFailed)
			}
			return err
		},
	}
}
