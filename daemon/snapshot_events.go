package daemon

import (
	"context"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// looks is how often a snapshot is looked at within storage_timeout.
const looks = 8

// forwardEvents passes on the events of a snapshot until the snapshot is destroyed.
// If writes wait too long for another disk than their own, it gives the snapshot up.
func (d *Daemon) forwardEvents(s *snapshot) {
	limit := d.opts.Config.StorageTimeout
	look := time.NewTicker(limit / looks)
	defer look.Stop()
	var stalled stall
	for {
		var e diffarea.Event
		select {
		case <-look.C:
			s.use.RLock()
			if stalled.look(s.snap.Waiting()) >= looks && !s.gone && s.snap.Err() == 0 {
				d.opts.Log.Error("the snapshot is given up, because writes wait for a disk that is not their own and does not answer", "snapshot", s.id, "for", limit, "disks", s.hanging())
				s.snap.Break(unix.ETIMEDOUT)
			}
			s.use.RUnlock()
			continue
		case e = <-s.engineEvents:
		case <-s.destroyed:
			select {
			case e = <-s.engineEvents:
			default:
				d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventDestroyed})
				return
			}
		}
		ev := control.Event{Snapshot: s.id, Kind: e.Kind.String(), Sectors: e.Sectors, Errno: -int(e.Errno)}
		if e.Device != 0 {
			ev.Device = disk.Num{Major: unix.Major(e.Device), Minor: unix.Minor(e.Device)}.String()
		}
		said := []any{"snapshot", s.id, "event", ev.Kind, "device", ev.Device, "sectors", ev.Sectors}
		if e.Errno != 0 {
			said = append(said, "error", e.Errno)
		}
		d.opts.Log.Warn("snapshot", said...)
		d.events.emit(ev)
		if ev.Kind == control.EventCorrupted {
			s.use.RLock()
			if !s.gone {
				s.snap.Told()
			}
			s.use.RUnlock()
		}
	}
}

// WaitEvent implements control.API.
func (d *Daemon) WaitEvent(ctx context.Context, r control.WaitRequest) (control.Event, error) {
	u, err := uuid.Parse(r.ID)
	if err != nil {
		return control.Event{}, invalid("snapshot %q: not a UUID", r.ID)
	}
	r.ID = u.String()
	return d.events.wait(ctx, r)
}

// Watch implements control.API.
func (d *Daemon) Watch(ctx context.Context, r control.WatchRequest, each func(control.Event) error) error {
	if r.ID != "" {
		u, err := uuid.Parse(r.ID)
		if err != nil {
			return invalid("snapshot %q: not a UUID", r.ID)
		}
		r.ID = u.String()
	}
	return d.events.watch(ctx, r, each)
}

// Serves implements stopper.
func (d *Daemon) Serves() { d.events.answer() }
