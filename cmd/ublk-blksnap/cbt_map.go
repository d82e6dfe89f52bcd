package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
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
		Example: "  ublk-blksnap cbt map data >map",
		Args:    args(1, 1),
		RunE:    func(c *cobra.Command, args []string) error { return p.writeCBTMap(c, args[0], file) },
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
		return usage("map: the map is bytes, which do not belong on a terminal: give --output FILE")
	}
	return p.with(c, func(ctx context.Context, api control.API) error {
		switch {
		case file != "":
			i, err := mapToFile(ctx, api, dev, file)
			if err != nil || !p.json {
				return err
			}
			return p.printJSON(p.out, map[string]any{"file": file, "blocks": i.BlockCount, "take": i.Take})
		case p.json:
			return p.mapJSON(ctx, api, dev)
		}
		_, err := api.CBTMap(ctx, dev, p.out)
		return err
	})
}

// mapToFile writes the map to a file, which stays as it was if there is no map.
func mapToFile(ctx context.Context, api control.API, device, path string) (i control.CBTInfo, err error) {
	var f *os.File
	i, err = api.CBTMap(ctx, device, writerFunc(func(b []byte) (n int, err error) {
		if f == nil {
			if f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
				return 0, err
			}
		}
		return f.Write(b)
	}))
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	return i, err
}

// mapJSON prints the map as it comes, in base 64.
func (p *program) mapJSON(ctx context.Context, api control.API, device string) error {
	start := `{"map":"`
	text := base64.NewEncoder(base64.StdEncoding, writerFunc(func(b []byte) (int, error) {
		_, err := fmt.Fprintf(p.out, "%s%s", start, b)
		start = ""
		return len(b), err
	}))
	i, err := api.CBTMap(ctx, device, text)
	if err != nil {
		return err
	}
	if err := text.Close(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.out, "%s\",\n\"take\":%q}\n", start, i.Take)
	return err
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
