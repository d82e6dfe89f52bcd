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
	return &cobra.Command{
		Use:     "status NAME|DEV",
		Short:   "Tell all about a filter and what it has done",
		Example: "  ublk-blksnap status data",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			name, err := devicePath(args[0])
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
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
					if r := info.Reloaded; r != nil {
						what := "from " + r.From + " to " + r.To
						if r.Error != "" {
							what = "in vain: " + r.Error
						}
						fmt.Fprintf(w, "%-16s %s, %s, I/O waited for %v\n", "reloaded:", r.At.Format(time.RFC3339), what, r.Pause.Round(time.Millisecond))
					} else if r := info.Recovered; r != nil {
						fmt.Fprintf(w, "%-16s %s, %d devices, I/O waited for %v from the start of the daemon\n", "taken over:", r.At.Format(time.RFC3339), r.Devices, r.Pause.Round(time.Millisecond))
					}
					if info.LogLinesLost > 0 {
						fmt.Fprintf(w, "%-16s %d lines, because nobody took them\n", "log lost:", info.LogLinesLost)
					}
				})
			})
		},
	}
}

func writeStatus(w io.Writer, s control.DeviceStatus) {
	line := func(key string, v any) { fmt.Fprintf(w, "%-16s %v\n", key+":", v) }
	line("name", s.Name)
	line("original", s.Original+" ("+s.OriginalNumber+")")
	line("device", s.Path+" ("+s.Number+")")
	line("link", s.Link)
	line("state", s.State)
	line("size", fmt.Sprintf("%d bytes (%s)", s.Size, control.HumanSize(s.Size)))
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
}
