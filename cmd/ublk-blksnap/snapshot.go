package main

import (
	"github.com/spf13/cobra"
)

func (p *program) snapshot() *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Create, take, watch and destroy snapshots",
		Args:  noCommand,
		RunE:  p.whichCommand,
	}
	c.AddCommand(p.snapshotCreate(), p.snapshotAdd(), p.snapshotAppend(), p.snapshotTake(),
		p.snapshotDestroy(), p.snapshotList(), p.snapshotInfo(), p.snapshotWatch())
	return c
}
