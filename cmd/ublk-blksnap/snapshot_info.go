package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotInfo() *cobra.Command {
	return &cobra.Command{
		Use:   "info UUID",
		Short: "Tell all about a snapshot",
		Args:  args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.Snapshot(ctx, args[0])
				if err != nil {
					return err
				}
				return p.print(s, func(w io.Writer) { writeSnapshot(w, s) })
			})
		},
	}
}

// errnoText is a negative errno in words.
func errnoText(n int) string {
	e := unix.Errno(-n)
	return fmt.Sprintf("%s (%s)", e.Error(), unix.ErrnoName(e))
}

func writeSnapshot(w io.Writer, s control.Snapshot) {
	line := func(key string, v any) { fmt.Fprintf(w, "%-10s %v\n", key+":", v) }
	line("uuid", s.ID)
	line("state", s.State)
	line("created", s.Created.Format(time.RFC3339))
	if s.Taken != nil {
		line("taken", s.Taken.Format(time.RFC3339))
		line("frozen", s.Frozen)
	}
	line("chunk", control.FormatSize(s.ChunkSize))
	if s.Encrypted {
		line("encrypted", "yes")
	}
	line("copied", fmt.Sprintf("%d bytes", s.Usage.Copied))
	line("stored", fmt.Sprintf("%d of %d bytes", s.Usage.Stored, s.Usage.Capacity))
	if s.Errno != 0 {
		line("error", errnoText(s.Errno))
	}
	for _, st := range s.Storage {
		limit := ""
		if st.Limit != 0 {
			limit = ", at most " + control.HumanSize(st.Limit)
		}
		line("storage", st.Path+limit)
		if st.Warning != "" {
			line("warning", st.Warning)
		}
	}
	for _, im := range s.Images {
		text := im.Device + " (" + im.Original + ")"
		if im.Link != "" {
			text += fmt.Sprintf(" at %s, take %s", im.Link, im.Take)
		}
		if im.Errno != 0 {
			text += ", error: " + errnoText(im.Errno)
		}
		line("image", text)
	}
}
