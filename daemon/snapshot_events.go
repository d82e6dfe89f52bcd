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
	paces := time.NewTicker(paceEach)
	defer paces.Stop()
	s.pace.add(time.Now(), s.copied())
	go s.watchRoom()
	var stalled stall
	var auto autoAppend
	for {
		var e diffarea.Event
		select {
		case <-paces.C:
			s.pace.add(time.Now(), s.copied())
			auto.lookAfter(d, s, time.Now())
			continue
		case err := <-auto.done:
			auto.ended(d, s, err, time.Now())
			continue
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
		if e.Kind == diffarea.LowFreeSpace {
			ev.Rate = s.pace.rate(time.Now(), s.copied())
			ev.Percent, ev.Left = percent(e.Used, e.Limit), lasts(e.Limit-e.Used, ev.Rate)
			said = append(said, "percent", ev.Percent, "bytes_per_second", ev.Rate, "time_left", ev.Left)
		}
		d.opts.Log.Warn("snapshot", said...)
		d.events.emit(ev)
		auto.lookAfter(d, s, time.Now())
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
	id, err := d.findEvents(r.ID)
	if err != nil {
		return control.Event{}, err
	}
	r.ID = id
	return d.events.wait(ctx, r)
}

// Watch implements control.API.
func (d *Daemon) Watch(ctx context.Context, r control.WatchRequest, each func(control.Event) error) error {
	if r.ID != "" {
		id, err := d.findEvents(r.ID)
		if err != nil {
			return err
		}
		r.ID = id
	}
	return d.events.watch(ctx, r, each)
}

// findEvents is the UUID of the snapshot that is called so, or was.
func (d *Daemon) findEvents(ref string) (id string, err error) {
	if u, err := uuid.Parse(ref); err == nil {
		return u.String(), nil
	}
	s, err := d.findSnapshot(ref)
	if err == nil {
		return s.id, nil
	}
	if ended := d.events.called(ref); len(ended) == 1 && control.CodeOf(err) == control.NotFound {
		return ended[0], nil
	}
	return "", err
}

// Serves implements stopper.
func (d *Daemon) Serves() { d.events.answer() }
