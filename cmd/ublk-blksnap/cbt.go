package main

import (
	"github.com/spf13/cobra"
)

func (p *program) cbt() *cobra.Command {
	c := &cobra.Command{
		Use:   "cbt",
		Short: "Changed-block tracking",
		Long: `Changed-block tracking. Each block of a filter has one byte: the number of the
take since which it has changed. A backup keeps generation and number of the take
it has copied; the blocks with a higher number are its next increment. If the
generation is another, everything has to be copied.`,
		Args: noCommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(p.cbtInfo(), p.cbtMap(), p.cbtChanges(), p.cbtMark())
	return c
}
