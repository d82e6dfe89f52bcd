package main

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotSet() *cobra.Command {
	var ttl string
	c := &cobra.Command{
		Use:   "set SNAPSHOT --ttl TIME|none",
		Short: "Change when a snapshot ends",
		Long: `Change when a snapshot ends: after a time that counts from now on, or only when it is
destroyed ("none").`,
		Example: "  ublk-blksnap snapshot set nightly --ttl 2d\n  ublk-blksnap snapshot set latest --ttl none",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			r := control.SetRequest{ID: snapshotRef(args[0])}
			switch ttl {
			case "":
				return usage("set: nothing to change: give --ttl")
			case "none":
			default:
				var t ttlFlag
				if err := t.Set(ttl); err != nil {
					return usage("set: --ttl: %v", err)
				}
				r.TTL = time.Duration(t)
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				_, err := api.SetSnapshot(ctx, r)
				return err
			})
		},
	}
	c.Flags().StringVar(&ttl, "ttl", "", "destroy it after this time: 45m, 12h, 7d; or none")
	return c
}

// snapshotRef makes what a person calls a snapshot fit for the daemon, whose working
// directory is another: paths of images become absolute.
func snapshotRef(s string) string {
	if strings.Contains(s, "/") {
		if path, err := filepath.Abs(s); err == nil {
			return path
		}
	}
	return s
}
