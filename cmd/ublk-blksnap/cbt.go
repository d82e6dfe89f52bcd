package main

import (
	"github.com/spf13/cobra"
)

func (p *program) cbt() *cobra.Command {
	c := &cobra.Command{
		Use:   "cbt",
		Short: "Changed-block tracking",
		Long: `Changed-block tracking. Each block of a filter has one byte: the number of the
take since which it has changed. A number holds within one generation of the
map, so a take is named by one token, GENERATION:N. A backup keeps the token of the
take it has copied: "changes --since TOKEN" is its next increment, or fails with
status 6 once that generation has ended, and everything has to be copied.`,
		Args: noCommand,
		RunE: p.whichCommand,
	}
	c.AddCommand(p.cbtInfo(), p.cbtMap(), p.cbtChanges(), p.cbtMark())
	return c
}
