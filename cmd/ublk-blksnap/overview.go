package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// overview is what goes on on this machine.
type overview struct {
	Time      time.Time              `json:"time"`
	Daemon    control.Info           `json:"daemon"`
	Devices   []control.DeviceStatus `json:"devices"`
	Snapshots []control.Snapshot     `json:"snapshots"`
}

// look asks for an overview.
func look(ctx context.Context, api control.API) (o overview, err error) {
	o.Time, o.Devices = time.Now(), []control.DeviceStatus{}
	if o.Daemon, err = api.Info(ctx); err != nil {
		return o, err
	}
	devices, err := api.Devices(ctx)
	if err != nil {
		return o, err
	}
	for _, d := range devices {
		s, err := api.DeviceStatus(ctx, d.Name)
		switch control.CodeOf(err) {
		case control.NotFound: // it has gone meanwhile
			continue
		default:
			if err != nil {
				return o, err
			}
		}
		o.Devices = append(o.Devices, s)
	}
	o.Snapshots, err = api.Snapshots(ctx)
	return o, err
}

func writeOverview(w io.Writer, o overview, now time.Time) {
	info := o.Daemon
	fmt.Fprintf(w, "%-16s version %s, process %d, since %s (%s)\n", "daemon:", info.Version, info.PID,
		info.Started.Format(time.RFC3339), now.Sub(info.Started).Round(time.Second))
	if info.Activity != "" {
		fmt.Fprintf(w, "%-16s %s\n", "doing:", info.Activity)
	}
	writeBefore(w, info, time.Time{})
	for _, d := range o.Devices {
		if text := uncleanEnd(d.History); text != "" {
			fmt.Fprintf(w, "%-16s %s: %s\n", "before:", d.Name, text)
		}
	}
	writeAttention(w, o)
	for _, t := range []*table{filterTable(w, o.Devices), snapshotTable(w, o.Snapshots)} {
		if t.head == nil {
			fmt.Fprintln(w)
			_ = t.w.Flush()
		}
	}
}

// writeAttention tells what is not as it should be, and what waits.
func writeAttention(w io.Writer, o overview) {
	for _, d := range o.Devices {
		if d.Attention != "" {
			fmt.Fprintf(w, "%-16s %s: %s\n", "attention:", d.Name, d.Attention)
		}
	}
	for _, s := range o.Snapshots {
		if text := overdue(s); text != "" {
			fmt.Fprintf(w, "%-16s %s\n", "attention:", text)
		}
	}
	if o.Daemon.Lost != nil {
		fmt.Fprintf(w, "%-16s %s\n", "waits:", o.Daemon.Lost)
	}
	for _, u := range o.Daemon.Unfiltered {
		fmt.Fprintf(w, "%-16s %s\n", "waits:", unfiltered(u))
	}
}

// overdue says of a snapshot that somebody keeps it from its end; empty if nobody does.
func overdue(s control.Snapshot) string {
	if s.Overdue == "" {
		return ""
	}
	return fmt.Sprintf("snapshot %s: its time is over, and it is destroyed when nobody uses it: %s", cmp.Or(s.Name, s.ID), s.Overdue)
}

// unfiltered says of a disk that it shall have a filter and has none.
func unfiltered(u control.Unfiltered) string {
	return fmt.Sprintf("%s: %s has no filter yet: %s", u.Name, u.Path, u.Reason)
}

func filterTable(w io.Writer, devices []control.DeviceStatus) *table {
	t := newTable(w, "FILTER", "ORIGINAL", "STATE", "READS", "WRITES", "READ", "WRITTEN", "ERRORS", "IN FLIGHT", "SNAPSHOTS")
	for _, d := range devices {
		r, wr := d.Operations[control.OpRead], d.Operations[control.OpWrite]
		t.row(d.Name, d.Original, d.State, r.Requests, wr.Requests, control.HumanSize(int64(r.Bytes)), control.HumanSize(int64(wr.Bytes)),
			d.Errors, d.InFlight, len(d.Snapshots))
	}
	return t
}

func snapshotTable(w io.Writer, snapshots []control.Snapshot) *table {
	t := newTable(w, "SNAPSHOT", "STATE", "DEVICES", "USED", "OF", "PERCENT", "RATE", "FULL IN")
	for _, s := range snapshots {
		var names []string
		for _, im := range s.Images {
			names = append(names, im.Device)
		}
		u := s.Usage
		of, _ := usedOf(u)
		left := "-"
		if u.Left > 0 {
			left = u.Left.String()
		}
		t.row(cmp.Or(s.Name, s.ID), s.State, strings.Join(names, " "), control.HumanSize(u.Copied), control.HumanSize(of),
			fmt.Sprintf("%d%%", u.Percent), control.HumanSize(u.Rate)+"/s", left)
	}
	return t
}

// writeBefore tells what was before the daemon that runs, to those who have been there since.
func writeBefore(w io.Writer, info control.Info, since time.Time) {
	line := func(key, format string, args ...any) {
		fmt.Fprintf(w, "%-16s %s\n", key+":", fmt.Sprintf(format, args...))
	}
	if r := info.Reloaded; r != nil && r.At.After(since) {
		what := "from " + r.From + " to " + r.To
		if r.Error != "" {
			what = "in vain: " + r.Error
		}
		line("reloaded", "%s, %s, I/O waited for %v", r.At.Format(time.RFC3339), what, r.Pause.Round(time.Millisecond))
	} else if r := info.Recovered; r != nil && r.At.After(since) {
		line("taken over", "%s, from a daemon that had died, %d devices, I/O waited for %v from the start of this one",
			r.At.Format(time.RFC3339), r.Devices, r.Pause.Round(time.Millisecond))
	}
	if info.LogLinesLost > 0 {
		line("log lost", "%d lines, because nobody took them", info.LogLinesLost)
	}
}

// uncleanEnd says of a filter that the last one over its disk had no clean end, and what
// became of the change tracking; empty if it had, or if nobody knows.
func uncleanEnd(h control.History) string {
	anew := "change tracking began anew: " + h.Text + ": that costs a full backup"
	switch {
	case h.AfterPowerFailure && h.Continued:
		return "change tracking " + h.Text
	case h.Reason == control.HistoryUnclean: // which the text says
		return anew
	case h.AfterPowerFailure:
		return "the last filter over the disk had no clean end, and " + anew
	}
	return ""
}

// defaultInterval is how often what is watched is looked at.
const defaultInterval = 2 * time.Second

func checkInterval(c *cobra.Command, every time.Duration, watch bool) error {
	switch {
	case every < 100*time.Millisecond:
		return usage("%s: --interval %s: must be 100ms at least", c.Name(), every)
	case !watch && c.Flags().Changed("interval"):
		return usage("%s: --interval is for --watch: give that too", c.Name())
	}
	return nil
}

// again tells something again and again until it is interrupted, with a line between. While
// there is no daemon it says so, and goes on with the next one.
func (p *program) again(c *cobra.Command, every time.Duration, tell func(ctx context.Context, api control.API) error) error {
	ctx := c.Context()
	api, err := p.reach(ctx, startNext)
	if err != nil {
		return err
	}
	p.compact = true
	tick := time.NewTicker(every)
	defer tick.Stop()
	for first := true; ; first = false {
		if !first && !p.json {
			fmt.Fprintln(p.out)
		}
		if !p.json {
			fmt.Fprintln(p.out, time.Now().Format(time.RFC3339))
		}
		switch err := tell(ctx, api); {
		case ctx.Err() != nil:
			return silentError(statusInterrupted)
		case err == nil:
		case first || control.CodeOf(err) != control.Unavailable:
			return err
		default:
			p.tell(err.Error())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return silentError(statusInterrupted)
		}
	}
}
