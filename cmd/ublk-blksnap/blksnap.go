package main

import (
	"errors"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// blksnapCommands are blksnap's own commands with its options and output, for
// scripts that were written for it. An option that takes several values may be
// given several times, or once with the values behind it.
func (p *program) blksnapCommands() []*cobra.Command {
	cs := []*cobra.Command{
		p.blksnapAttach(), p.blksnapDetach(),
		p.blksnapCBTInfo(), p.blksnapReadCBTMap(), p.blksnapMarkDirtyBlock(),
		p.blksnapSnapshotCreate(), p.blksnapSnapshotAdd(), p.blksnapSnapshotAppendStorage(),
		p.blksnapSnapshotTake(), p.blksnapSnapshotDestroy(),
		p.blksnapSnapshotInfo(), p.blksnapSnapshotCollect(),
		p.blksnapSnapshotWaitEvent(), p.blksnapSnapshotWatcher(),
	}
	for _, c := range cs {
		c.Annotations = map[string]string{blksnapVerb: c.Name()}
		c.PreRunE = func(c *cobra.Command, _ []string) error {
			if err := c.ValidateRequiredFlags(); err != nil {
				return usage("%s: %v", c.Name(), err)
			}
			return nil
		}
	}
	return cs
}

// blksnapVerb marks blksnap's own commands.
const blksnapVerb = "blksnap"

// Options that several of blksnap's commands share.

func deviceOption(c *cobra.Command, v *string) {
	c.Flags().StringVarP(v, "device", "d", "", "block device")
	require(c, "device")
}

func idOption(c *cobra.Command, v *string) {
	c.Flags().StringVarP(v, "id", "i", "", "UUID of the snapshot")
	require(c, "id")
}

func require(c *cobra.Command, flag string) {
	if err := c.MarkFlagRequired(flag); err != nil {
		panic(err)
	}
}

// checkID refuses what is no UUID before the daemon is asked.
func checkID(c *cobra.Command, id string) error {
	if _, err := uuid.Parse(id); err != nil {
		return usage("%s: --id %s: not a UUID", c.Name(), id)
	}
	return nil
}

// twoWays adds to the refusal of a disk in use what blksnap's users need to
// know: here a filter cannot be slid under a mounted filesystem.
func twoWays(err error) error {
	var e *control.Error
	if errors.As(err, &e) && e.Code == control.Busy {
		c := *e
		c.Fix = "unmount it, attach it and mount the filter device in its place, or put the disk under device-mapper"
		return &c
	}
	return err
}
