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
	var r control.WatchRequest
	c := &cobra.Command{
		Use:   "watch [SNAPSHOT]",
		Short: "Print the events of a snapshot, or of all, as they come",
		Long: `Print a line per event: of one snapshot from its first event until it is
destroyed; or of everything, first what the daemon told while it started, and
then what happens from now on. When the daemon dies, or another version of the
program takes over, it goes on with the next one. Of a snapshot that has ended
it prints the events that are kept: the latest 1024 of everything are, until
the machine is restarted.`,
		Example: "  ublk-blksnap snapshot watch\n  ublk-blksnap snapshot watch nightly --json",
		Args:    args(0, 1),
		RunE: func(c *cobra.Command, args []string) error {
			api, err := p.reach(c.Context(), startNext)
			if err != nil {
				return err
			}
			r.ID = snapshotRef(strings.Join(args, ""))
			err = api.Watch(c.Context(), r, func(e control.Event) error {
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
	c.Flags().Uint64Var(&r.Since, "since", 0, "begin after the event of this number, which --json prints as \"seq\"")
	return c
}

func eventLine(e control.Event) string {
	snapshot := e.Snapshot
	if snapshot == "" {
		snapshot = "-"
	}
	s := fmt.Sprintf("%s %s %s", e.Time.Format(time.RFC3339Nano), snapshot, e.Kind)
	if e.Name != "" {
		s += " name=" + e.Name
	}
	if e.Sectors != 0 {
		s += fmt.Sprintf(" requested_sectors=%d", e.Sectors)
	}
	if e.Percent != 0 {
		s += fmt.Sprintf(" percent=%d bytes_per_second=%d", e.Percent, e.Rate)
	}
	if e.Left != 0 {
		s += " time_left=" + e.Left.String()
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
