package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotInfo() *cobra.Command {
	var field string
	c := &cobra.Command{
		Use:   "info SNAPSHOT",
		Short: "Tell all about a snapshot",
		Long: `Tell all about a snapshot, or, for scripts, one thing: with --field its uuid, name,
state (created, taken, corrupted, destroying) or expires (when its time is over, as
RFC 3339 has it), or of each device, one a line, its device (the filter's name),
image (a path) or take (the token for "cbt changes --since"). What there is not is
an empty line.`,
		Example: `  ublk-blksnap snapshot info nightly
  token=$(ublk-blksnap snapshot info nightly --field take)`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			if field != "" && snapshotFields[field] == nil {
				return usage("info: no field %q: use %s", field, strings.Join(slices.Sorted(maps.Keys(snapshotFields)), ", "))
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.Snapshot(ctx, snapshotRef(args[0]))
				if err != nil {
					return err
				}
				var v any = s
				write := func(w io.Writer) { writeSnapshot(w, s) }
				if field != "" {
					values := snapshotFields[field](s)
					v = map[string][]string{field: values}
					write = func(w io.Writer) { fmt.Fprintln(w, strings.Join(values, "\n")) }
				}
				return p.print(v, write)
			})
		},
	}
	c.Flags().StringVar(&field, "field", "", "print only this: "+strings.Join(slices.Sorted(maps.Keys(snapshotFields)), ", "))
	return c
}

// snapshotFields are what scripts ask for.
var snapshotFields = map[string]func(control.Snapshot) []string{
	"uuid":  func(s control.Snapshot) []string { return []string{s.ID} },
	"name":  func(s control.Snapshot) []string { return []string{s.Name} },
	"state": func(s control.Snapshot) []string { return []string{s.State} },
	"expires": func(s control.Snapshot) []string {
		if s.Expires == nil {
			return []string{""}
		}
		return []string{s.Expires.Format(time.RFC3339)}
	},
	"device": func(s control.Snapshot) []string {
		return ofImages(s, func(im control.SnapshotImage) string { return im.Device })
	},
	"image": func(s control.Snapshot) []string {
		return ofImages(s, func(im control.SnapshotImage) string { return im.Link })
	},
	"take": func(s control.Snapshot) []string {
		return ofImages(s, func(im control.SnapshotImage) string {
			if im.Take == nil {
				return ""
			}
			return im.Take.String()
		})
	},
}

func ofImages(s control.Snapshot, what func(control.SnapshotImage) string) (out []string) {
	for _, im := range s.Images {
		out = append(out, what(im))
	}
	return out
}

// errnoText is a negative errno in words.
func errnoText(n int) string {
	e := unix.Errno(-n)
	return fmt.Sprintf("%s (%s)", e.Error(), unix.ErrnoName(e))
}

// storageText names a storage, and says how far it can grow.
func storageText(st control.Storage) string {
	text := st.Path
	if st.Auto {
		text += ", appended by itself"
	}
	if most := cmp.Or(st.Most, st.Limit); most != 0 {
		text += ", at most " + control.HumanSize(most)
	}
	if st.Spare != 0 {
		text += ", leaves " + control.HumanSize(st.Spare) + " of its filesystem free"
	}
	return text
}

// usedOf is what a percentage of use is of: all the storage there can be, or what the
// snapshot can come to need, if that is enough.
func usedOf(u control.SnapshotUsage) (of int64, enough bool) {
	if u.Limit == 0 || u.Need <= u.Limit {
		return u.Need, true
	}
	return u.Limit, false
}

// usedText says how much is used of the storage that there can be, and how long it lasts.
func usedText(u control.SnapshotUsage) string {
	of, enough := usedOf(u)
	text := fmt.Sprintf("%s of %s (%d%%)", control.HumanSize(u.Copied), control.HumanSize(of), u.Percent)
	if u.Rate > 0 {
		text += ", " + control.HumanSize(u.Rate) + "/s"
	}
	switch {
	case u.Left > 0:
		text += ", full in " + u.Left.String()
	case enough && u.Limit != 0:
		text += ", enough for all of the disks"
	}
	return text
}

func writeSnapshot(w io.Writer, s control.Snapshot) {
	line := func(key string, v any) { fmt.Fprintf(w, "%-10s %v\n", key+":", v) }
	line("uuid", s.ID)
	if s.Name != "" {
		line("name", s.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		line("label", key+"="+s.Labels[key])
	}
	line("state", s.State)
	line("created", s.Created.Format(time.RFC3339))
	if s.Taken != nil {
		line("taken", s.Taken.Format(time.RFC3339))
		line("frozen", s.Frozen)
	}
	if s.Expires != nil {
		line("expires", s.Expires.Format(time.RFC3339))
	}
	if s.Overdue != "" {
		line("in use", s.Overdue+"; it is destroyed when nobody uses it")
	}
	line("chunk", control.FormatSize(s.ChunkSize))
	if s.Encrypted {
		line("encrypted", "yes")
	}
	line("copied", fmt.Sprintf("%d bytes", s.Usage.Copied))
	line("stored", fmt.Sprintf("%d of %d bytes", s.Usage.Stored, s.Usage.Capacity))
	line("used", usedText(s.Usage))
	if s.Errno != 0 {
		line("error", errnoText(s.Errno))
	}
	for _, st := range s.Storage {
		line("storage", storageText(st))
		if st.Warning != "" {
			line("warning", st.Warning)
		}
	}
	if a := s.AutoAppend; a != nil {
		line("more", fmt.Sprintf("storage in %s when it runs low, as long as %d%% of its filesystem stay free", a.Path, a.Reserve))
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
