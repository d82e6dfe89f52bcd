package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) status() *cobra.Command {
	var watch bool
	every := defaultInterval
	c := &cobra.Command{
		Use:   "status [NAME|DEV]",
		Short: "Tell what goes on, or all about one filter",
		Long: `Without a name: who the daemon is, what it has taken over and what waits for it; what
each filter has done; how full each snapshot is, how fast it fills, and how long its
storage lasts. With a name: all about that filter.

With --watch it tells that again and again, until it is interrupted.`,
		Example: "  ublk-blksnap status\n  ublk-blksnap status data\n  ublk-blksnap status --watch --interval 10s",
		Args:    args(0, 1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkInterval(c, every, watch); err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				if args[0] == "" {
					return usage("status: the name is empty; without one, all is told")
				}
				var err error
				if name, err = devicePath(args[0]); err != nil {
					return err
				}
			}
			if watch {
				return p.again(c, every, func(ctx context.Context, api control.API) error { return p.tellStatus(ctx, api, name) })
			}
			return p.with(c, func(ctx context.Context, api control.API) error { return p.tellStatus(ctx, api, name) })
		},
	}
	c.Flags().BoolVar(&watch, "watch", false, "tell it again and again")
	c.Flags().DurationVar(&every, "interval", every, "with --watch: how often")
	return c
}

// tellStatus prints the status of a filter, or of everything.
func (p *program) tellStatus(ctx context.Context, api control.API, name string) error {
	if name == "" {
		o, err := look(ctx, api)
		if err != nil {
			return err
		}
		return p.print(o, func(w io.Writer) { writeOverview(w, o, time.Now()) })
	}
	s, err := api.DeviceStatus(ctx, name)
	if err != nil {
		return err
	}
	info, err := api.Info(ctx)
	if err != nil {
		return err
	}
	return p.print(s, func(w io.Writer) {
		writeStatus(w, s)
		writeBefore(w, info, s.Added)
	})
}

// attachedText is what is said of a filter that came under a device.
const attachedText = "under the device, whose users keep their path"

func writeStatus(w io.Writer, s control.DeviceStatus) {
	line := func(key string, v any) { fmt.Fprintf(w, "%-16s %v\n", key+":", v) }
	line("name", s.Name)
	line("original", s.Original+" ("+s.OriginalNumber+")")
	line("device", s.Path+" ("+s.Number+")")
	if s.Attached {
		line("attached", attachedText)
	} else {
		line("link", s.Link)
	}
	line("state", s.State)
	line("size", fmt.Sprintf("%d bytes (%s)", s.Size, control.HumanSize(s.Size)))
	if s.OriginalSize != 0 {
		line("original size", fmt.Sprintf("%d bytes (%s)", s.OriginalSize, control.HumanSize(s.OriginalSize)))
	}
	if s.Attention != "" {
		line("attention", s.Attention)
	}
	line("block size", fmt.Sprintf("%d logical, %d physical", s.LogicalBlockSize, s.PhysicalBlockSize))
	line("queues", fmt.Sprintf("%d of depth %d", s.Queues, s.Depth))
	line("mode", s.Mode)
	line("added", s.Added.Format(time.RFC3339))
	snapshots := "none"
	if len(s.Snapshots) > 0 {
		snapshots = strings.Join(s.Snapshots, " ")
	}
	line("snapshots", snapshots)
	for _, kind := range []string{control.OpRead, control.OpWrite, control.OpFlush, control.OpDiscard, control.OpWriteZeroes} {
		o := s.Operations[kind]
		line(kind, fmt.Sprintf("%d requests, %d bytes", o.Requests, o.Bytes))
	}
	line("errors", s.Errors)
	line("in flight", s.InFlight)
	if s.Unregistered > 0 {
		line("unregistered", fmt.Sprintf("%d requests got an I/O error because the kernel did not register their payload", s.Unregistered))
	}
	if s.DiscardsSkipped > 0 {
		line("discards skipped", fmt.Sprintf("%d bytes that a snapshot needs", s.DiscardsSkipped))
	}
	if s.CBT != nil {
		line("change tracking", fmt.Sprintf("%d blocks of %s, take %s",
			s.CBT.BlockCount, control.FormatSize(s.CBT.BlockSize), s.CBT.Take))
	}
	if text := uncleanEnd(s.History); text != "" {
		line("before", text)
	}
}
