package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtMap() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "map DEV",
		Short: "Write the change map of a filter: one byte per block",
		Long: `Write the change map of a filter, as it was at the last take: one byte per block,
to a file or to standard output. With --json the map is in base 64.`,
		Args:              args(1, 1),
		ValidArgsFunction: p.deviceNames,
		RunE:              func(c *cobra.Command, args []string) error { return p.writeCBTMap(c, args[0], file) },
	}
	c.Flags().StringVarP(&file, "output", "o", "", "file to write to (default: standard output)")
	return c
}

func (p *program) writeCBTMap(c *cobra.Command, device, file string) error {
	dev, err := devicePath(device)
	if err != nil {
		return err
	}
	if file == "" && !p.json && p.read(p.out) {
		return usage("map: bytes do not belong on a terminal: give --output FILE")
	}
	return p.with(c, func(ctx context.Context, api control.API) error {
		m, err := api.CBTMap(ctx, dev)
		if err != nil {
			return err
		}
		if file != "" {
			if err := os.WriteFile(file, m, 0o600); err != nil {
				return fmt.Errorf("%s %s: %w", c.Name(), device, err)
			}
			if !p.json {
				return nil
			}
			return p.print(map[string]any{"file": file, "blocks": len(m)}, nil)
		}
		return p.print(map[string][]byte{"map": m}, func(w io.Writer) {
			_, err = w.Write(m)
		})
	})
}
