package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotWatch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch [UUID]",
		Short: "Print the events of a snapshot, or of all, as they come",
		Long: `Print a line per event: of one snapshot from its first event until it is
destroyed, or of all snapshots from now on.`,
		Args: args(0, 1),
		RunE: func(c *cobra.Command, args []string) error {
			api, err := p.reach(c.Context(), startNext)
			if err != nil {
				return err
			}
			id := strings.Join(args, "")
			err = api.Watch(c.Context(), id, func(e control.Event) error {
				if p.json {
					// One line an event, for readers by the line.
					return json.NewEncoder(p.out).Encode(e)
				}
				_, err := fmt.Fprintln(p.out, eventLine(e))
				return err
			})
			return watched(c.Context(), err)
		},
	}
}

func eventLine(e control.Event) string {
	snapshot := e.Snapshot
	if snapshot == "" {
		snapshot = "-"
	}
	s := fmt.Sprintf("%s %s %s", e.Time.Format(time.RFC3339Nano), snapshot, e.Kind)
	if e.Sectors != 0 {
		s += fmt.Sprintf(" requested_sectors=%d", e.Sectors)
	}
	if e.Device != "" {
		s += " device=" + e.Device
	}
	if e.Errno != 0 {
		s += fmt.Sprintf(" error_code=%d", e.Errno)
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}
