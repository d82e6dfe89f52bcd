package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotTake() *cobra.Command {
	r := control.TakeRequest{}
	c := &cobra.Command{
		Use:   "take SNAPSHOT",
		Short: "Take a snapshot: all its devices at one instant",
		Long: `Take a snapshot: all its devices at one instant, or none of them. Filesystems
mounted on them are frozen around that instant, for at most the configured
freeze_timeout; if one cannot be frozen, nothing is taken. With --no-freeze an
image is as after a power failure.

Prints the path of the image of each device, one a line. "snapshot info --field take"
prints the token that names this take for "cbt changes --since".

The programs in /etc/ublk-blksnap.hooks (hook_dir) are run around the take, for
databases and the like: in the order of their names with the argument "pre" before
anything is frozen, and backwards with "post" as soon as the cut is made. One that
fails, or takes longer than hook_timeout, before the take cancels it, unless
hooks_required = false or --no-hooks is given. "post" is run for each whose "pre" was
begun, whatever came of the take, and if the daemon dies in between the next one runs
it. They must belong to root, and nobody else may be able to write to them. They run
as root, and find in the environment:

  UBLK_BLKSNAP_PHASE      pre or post
  UBLK_BLKSNAP_SNAPSHOT   the UUID
  UBLK_BLKSNAP_NAME       the name of the snapshot, if it has one
  UBLK_BLKSNAP_DEVICES    the names of the filters, with blanks in between
  UBLK_BLKSNAP_DISKS      the paths of their disks, likewise
  UBLK_BLKSNAP_MOUNTS     where filesystems on them are mounted, one a line
  UBLK_BLKSNAP_RESULT     with post: taken or failed
  UBLK_BLKSNAP_ERROR      with post: why it failed

"taken" says that the cut was made. The images are made after the hooks: if they
cannot be, this command fails, and the snapshot is destroyed.

The daemon does nothing else meanwhile: a hook that has it change something waits for
itself, until its time is over. What a hook leaves running, as a session that holds a
lock, goes on until its post ends it; its output should go elsewhere.`,
		Example: "  ublk-blksnap snapshot take nightly\n  ublk-blksnap snapshot take 6b1f --no-freeze",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			r.ID = snapshotRef(args[0])
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.TakeSnapshot(ctx, r)
				if err != nil {
					return err
				}
				p.tellWarnings(s)
				return p.print(s, func(w io.Writer) { writeImages(w, s) })
			})
		},
	}
	c.Flags().BoolVar(&r.NoFreeze, "no-freeze", false, "leave mounted filesystems unfrozen")
	c.Flags().BoolVar(&r.NoHooks, "no-hooks", false, "run no programs around it")
	return c
}

// tellWarnings tells what went wrong around a take and did not keep it.
func (p *program) tellWarnings(s control.Snapshot) {
	for _, w := range s.Warnings {
		p.tell("warning: " + w)
	}
}
