package daemon

import (
	"context"
	"errors"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// plan makes the checks of open, and says what open would make of the disk. A disk that
// nobody uses is claimed for as long as it looks at it; nothing is changed. Needs opLock.
func (d *Daemon) plan(ctx context.Context, dev *device, r control.AddRequest, attach bool) (err error) {
	if !attach {
		if dev.orig, err = d.openOriginal(ctx, dev.disk); err != nil {
			return d.explainUser(dev.disk, err)
		}
		defer d.closeOriginal(dev, func() {})
	}
	if dev.geo, err = readGeometry(ctx, dev.disk); err != nil {
		return err
	}
	memory, err := cbtmap.MemorySize(dev.geo.Size, d.opts.Config.CBTParams())
	if err != nil {
		return err
	}
	if err := snapshots.CheckSpace(d.cbtDir(), memory); err != nil {
		return err
	}
	mode, err := ublk.CheckConfig(d.ctl, ublk.Config{ID: ublk.AnyID, Queues: r.Queues, Depth: r.Depth, Mode: ublkMode(r.Mode), Geometry: dev.geo,
		NewHandler: func(int, blockdev.Queue) ublk.Handler { return nil }})
	if err != nil {
		return err
	}
	if mode == ublk.ModeCopy {
		memory += int64(r.Queues) * int64(r.Depth) * ublk.DefaultMaxIO
	}
	history := control.History{Reason: control.HistoryAttached, Text: attachedNoHistory}
	failure := control.PowerFailure{Reason: attachedUncovered}
	if !attach {
		failure = d.planLog(dev, r)
		history = d.askHistory(ctx, dev, r.Name).told()
	}
	dev.Device = control.Device{
		Name: r.Name, Original: dev.disk.DisplayPath(), OriginalNumber: dev.disk.Num.String(),
		Size: dev.geo.Size, LogicalBlockSize: dev.geo.LogicalBlock, PhysicalBlockSize: dev.geo.PhysicalBlock,
		Queues: r.Queues, Depth: r.Depth, Mode: modeOf(mode), Attached: attach, Snapshots: []string{}, History: history,
		Plan: &control.AddPlan{Memory: memory, PowerFailure: failure},
	}
	return nil
}

// planLog says whether the change map would go on after a power failure.
func (d *Daemon) planLog(dev *device, r control.AddRequest) control.PowerFailure {
	_, err := d.host.Identify(dev.disk)
	switch {
	case !*r.IntentLog:
		err = errors.New("it shall have no write-intent log")
	case d.opts.Config.StateDir == "":
		err = errors.New("state_dir is empty")
	}
	if err != nil {
		return control.PowerFailure{Reason: err.Error()}
	}
	return control.PowerFailure{Covered: true, ZoneSize: r.IntentLogZone}
}
