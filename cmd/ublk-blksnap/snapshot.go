package main

import (
	"github.com/spf13/cobra"
)

func (p *program) snapshot() *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Create, take, watch and destroy snapshots",
		Long: `Create, take, watch and destroy snapshots.

A SNAPSHOT is named by its UUID, by a beginning of the UUID that no other one has, by
the name that it was created with (--name), by the path of one of its images, or by
"latest", the one that was created last. If several fit, the command fails and says
which.`,
		Args: noCommand,
		RunE: p.whichCommand,
	}
	c.AddCommand(p.snapshotCreate(), p.snapshotAdd(), p.snapshotAppend(), p.snapshotTake(),
		p.snapshotDestroy(), p.snapshotSet(), p.snapshotList(), p.snapshotInfo(), p.snapshotWatch())
	return c
}
