package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Add makes a device and starts to serve it. If it returns without error, the disk
// is there. With an error nothing is left, unless the driver hangs. The driver hangs,
// for example, while it waits for a read of the disk.
//
// If the driver hangs after it has made the device, Add returns the device with the
// error. Then the caller deletes the device when the driver goes on. Until then the
// device's handlers may be called. If the driver hangs before that, Add returns the
// error alone, and a device that the driver makes after all is deleted at once.
func Add(ctx context.Context, ctl *Control, cfg Config) (*Device, error) {
	zeroCopy, err := cfg.check(ctl)
	if err != nil {
		return nil, fmt.Errorf("add ublk device: %w", err)
	}
	params, err := cfg.Geometry.params(cfg.MaxIO, zeroCopy)
	if err != nil {
		return nil, err
	}
	ask, need := cfg.flags(ctl, zeroCopy)
	info := uapi.UblksrvCtrlDevInfo{
		NrHwQueues:    uint16(cfg.Queues),
		QueueDepth:    uint16(cfg.Depth),
		MaxIOBufBytes: uint32(cfg.MaxIO),
		DevID:         uint32(cfg.ID),
		UblksrvPid:    int32(os.Getpid()),
		Flags:         ask,
		UblksrvFlags:  cfg.Tag,
	}
	err = ctl.add(ctx, &info)
	if err != nil {
		return nil, err
	}
	d := newDevice(ctl, &cfg, infoOf(&info))
	if err := d.setUp(ctx, &cfg, &params, need); err != nil {
		return d.undo(err)
	}
	return d, nil
}

// add has the driver make a device.
func (c *Control) add(ctx context.Context, info *uapi.UblksrvCtrlDevInfo) error {
	cmd := uapi.UblksrvCtrlCmd{DevID: info.DevID, QueueID: noQueue}
	return c.doOrUndo(ctx, uapi.UBLK_U_CMD_ADD_DEV, cmd, bytesOf(info), func(answer []byte) {
		var late uapi.UblksrvCtrlDevInfo // with its number, if the driver was to choose one
		copy(bytesOf(&late), answer)
		ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
		defer cancel()
		_ = c.deleteDevice(ctx, int(late.DevID))
	})
}

// setUp is the rest of Add, on a device that exists.
func (d *Device) setUp(ctx context.Context, cfg *Config, params *uapi.UblkParams, need uint64) error {
	for bit := uint64(1); bit <= need; bit <<= 1 {
		if need&bit != 0 && d.Flags&bit == 0 {
			return unsupported(bit)
		}
	}
	if d.Queues != cfg.Queues || d.Depth != cfg.Depth || d.MaxIO != cfg.MaxIO {
		return fmt.Errorf("add ublk device: the driver made %d queues × %d × %d bytes of %d × %d × %d",
			d.Queues, d.Depth, d.MaxIO, cfg.Queues, cfg.Depth, cfg.MaxIO)
	}
	cmd := uapi.UblksrvCtrlCmd{DevID: uint32(d.ID), QueueID: noQueue}
	if err := d.ctl.do(ctx, uapi.UBLK_U_CMD_SET_PARAMS, cmd, bytesOf(params)); err != nil {
		return err
	}
	set, err := d.ctl.params(ctx, d.ID)
	if err != nil {
		return err
	}
	if err := sameParams(params, &set); err != nil {
		return err
	}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	return d.begin(ctx, uapi.UBLK_U_CMD_START_DEV)
}

// sameParams compares what was asked for with what the driver kept.
func sameParams(want, got *uapi.UblkParams) error {
	if lost := want.Types &^ got.Types; lost != 0 {
		return fmt.Errorf("ublk parameters: the driver ignored types %#x", lost)
	}
	if got.Basic != want.Basic ||
		want.Types&uapi.UBLK_PARAM_TYPE_DISCARD != 0 && got.Discard != want.Discard ||
		want.Types&uapi.UBLK_PARAM_TYPE_DMA_ALIGN != 0 && got.DMA != want.DMA {
		return fmt.Errorf("ublk parameters: the driver kept %+v of %+v", *got, *want)
	}
	return nil
}

// undo deletes what a failed Add has made, and returns the device if it could not be
// deleted. err is why Add failed.
func (d *Device) undo(err error) (*Device, error) {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if e := d.Delete(ctx); e != nil {
		return d, errors.Join(err, e)
	}
	return nil, err
}
