package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) blksnapAttach() *cobra.Command {
	var device string
	c := &cobra.Command{
		Use:   "attach -d DEV",
		Short: "Attach a filter to a device (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			path, err := devicePath(device)
			if err != nil {
				return err
			}
			return p.start(c, func(ctx context.Context, api control.API) error {
				d, err := addDevice(ctx, api, control.AddRequest{Path: path, Attach: control.AttachPossible})
				text := "Attached successfully"
				if errno(err, unix.EALREADY) {
					text = "Already was attached"
					var s control.DeviceStatus
					s, err = api.DeviceStatus(ctx, path)
					d = s.Device
				}
				if err != nil {
					return err
				}
				return p.print(d, func(w io.Writer) { fmt.Fprintln(w, text) })
			})
		},
	}
	deviceOption(c, &device)
	return c
}

func (p *program) blksnapDetach() *cobra.Command {
	var device string
	c := &cobra.Command{
		Use:   "detach -d DEV",
		Short: "Detach the filter from a device (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			path, err := devicePath(device)
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				_, err := api.RemoveDevice(ctx, control.RemoveRequest{Device: path})
				return err
			})
		},
	}
	deviceOption(c, &device)
	return c
}
