package ublk

import (
	"context"
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// UpdateSize changes the size of the disk, in bytes, while it is in use.
func (d *Device) UpdateSize(ctx context.Context, size int64) error {
	if !d.ctl.Has(uapi.UBLK_F_UPDATE_SIZE) {
		return fmt.Errorf("update size of device %d: %w", d.ID, unsupported(uapi.UBLK_F_UPDATE_SIZE))
	}
	if size < sector.Size || size%sector.Size != 0 {
		return fmt.Errorf("update size of device %d: %d bytes: want a multiple of %d", d.ID, size, sector.Size)
	}
	return d.ctl.command(ctx, uapi.UBLK_U_CMD_UPDATE_SIZE, d.ID, uint64(size/sector.Size))
}
