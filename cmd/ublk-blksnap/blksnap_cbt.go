package main

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

func (p *program) blksnapCBTInfo() *cobra.Command {
	var device string
	c := &cobra.Command{
		Use:   "cbtinfo -d DEV",
		Short: "Describe the change map of a device (blksnap)",
		Args:  args(0, 0),
		RunE:  func(c *cobra.Command, _ []string) error { return p.showCBTInfo(c, device, false) },
	}
	deviceOption(c, &device)
	return c
}

func (p *program) blksnapReadCBTMap() *cobra.Command {
	var device, file string
	c := &cobra.Command{
		Use:   "readcbtmap -d DEV -f FILE",
		Short: "Write the change map of a device to a file (blksnap)",
		Args:  args(0, 0),
		RunE:  func(c *cobra.Command, _ []string) error { return p.writeCBTMap(c, device, file) },
	}
	deviceOption(c, &device)
	c.Flags().StringVarP(&file, "file", "f", "", "file to write to")
	require(c, "file")
	return c
}

func (p *program) blksnapMarkDirtyBlock() *cobra.Command {
	var device, file string
	var ranges []string
	c := &cobra.Command{
		Use:   "markdirtyblock {-d DEV -r SECTOR:COUNT... | -f FILE}",
		Short: "Count ranges, or the blocks of a file, as changed (blksnap)",
		RunE: func(c *cobra.Command, args []string) error {
			ranges = append(ranges, args...)
			switch {
			case file != "" && len(ranges) > 0:
				return usage("markdirtyblock: give --ranges or --file, not both")
			case file != "":
				return p.markFile(c, device, file)
			case device == "" || len(ranges) == 0:
				return usage("markdirtyblock: give --device and --ranges, or --file")
			}
			return p.markRanges(c, device, ranges)
		},
	}
	f := c.Flags()
	f.StringVarP(&device, "device", "d", "", "block device")
	f.StringArrayVarP(&ranges, "ranges", "r", nil, "ranges in sectors of 512 bytes")
	f.StringVarP(&file, "file", "f", "", "file whose blocks are marked")
	return c
}

// markFile counts the blocks that a file occupies on its device as changed.
func (p *program) markFile(c *cobra.Command, device, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("markdirtyblock: %w", err)
	}
	defer f.Close()
	// What is not yet written has no place yet.
	if err := f.Sync(); err != nil {
		return fmt.Errorf("markdirtyblock: sync %s: %w", path, err)
	}
	d, extents, err := disk.Machine().Extents(f)
	if err != nil {
		return fmt.Errorf("markdirtyblock: %w", err)
	}
	if device == "" {
		device = d.DisplayPath()
	}
	var ranges []string
	for _, ext := range extents {
		ranges = append(ranges, control.Range{Sector: uint64(ext.Offset) / sector.Size, Count: uint64(ext.Length) / sector.Size}.String())
	}
	// The daemon takes no more of one request.
	for some := range slices.Chunk(ranges, 32<<10) {
		if err := p.markRanges(c, device, some); err != nil {
			return err
		}
	}
	return p.print(map[string]any{"device": device, "ranges": ranges}, func(w io.Writer) {
		fmt.Fprintln(w, "device="+device)
		for _, r := range ranges {
			fmt.Fprintln(w, "range="+r)
		}
	})
}
