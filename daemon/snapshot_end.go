package daemon

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A snapshot may have an end of life. When its time is over the daemon destroys it, unless
// somebody uses an image of it: then that is told, and it is destroyed when nobody does.
//
//	created, set ──> time is over ──> in use: told once, looked at again ──┐
//	                      │               ^────────────────────────────────┤
//	                      └────────────────────────────────────────────────┴──> destroyed

const (
	// endInterval is how often a snapshot whose time is over is looked at while somebody
	// uses it.
	endInterval = 3 * time.Second
	// endAgain is after how long another attempt follows one that failed.
	endAgain = time.Minute
	// maxEndWait is the longest sleep: timers stand still while the machine is suspended,
	// and the time of a snapshot does not.
	maxEndWait = 30 * time.Second
)

// bootTime is a time of the clock that runs from the start of the machine, also while that
// is suspended, and that nobody sets. No snapshot outlives the machine.
type bootTime time.Duration

func bootNow() bootTime {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // which every kernel has
	return bootTime(t.Nano())
}

// endAfter is when the time of a snapshot is over that lives so long from now on.
func endAfter(ttl time.Duration) bootTime {
	if ttl == 0 {
		return 0
	}
	return bootNow() + bootTime(ttl)
}

// wall is the time by the clock on the wall, as that is set now.
func (t bootTime) wall() time.Time {
	return time.Now().Add(time.Duration(t - bootNow())).Round(time.Second)
}

// maxTTL keeps sums of times from overflowing.
const maxTTL = 100 * 365 * 24 * time.Hour

func checkTTL(ttl time.Duration) error {
	if ttl < 0 || ttl > maxTTL {
		return invalid("time to live of %v: want at most 100 years, or 0 for no end", ttl)
	}
	return nil
}

// SetSnapshot implements control.API.
func (d *Daemon) SetSnapshot(ctx context.Context, r control.SetRequest) (control.Snapshot, error) {
	s, end, err := d.beginOnSnapshot(ctx, r.ID, "set snapshot %s", r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	if err = checkTTL(r.TTL); err == nil {
		err = d.changeNote(s, func(n *snapshotNote) { n.Ends, n.Overdue = endAfter(r.TTL), false })
	}
	if err != nil {
		return control.Snapshot{}, fail(err, "set snapshot %s", s.id)
	}
	d.mu.Lock()
	s.overdue = ""
	d.mu.Unlock()
	d.lookAtEnds()
	return d.describeSnapshot(s), nil
}

// lookAtEnds has endInTime look when the next one ends.
func (d *Daemon) lookAtEnds() {
	select {
	case d.endsChanged <- struct{}{}:
	default:
	}
}

// endInTime destroys the snapshots whose time is over, until ctx ends.
func (d *Daemon) endInTime(ctx context.Context) {
	again := map[string]time.Time{} // when one that is overdue is looked at again
	for {
		wait := d.untilNextEnd(again)
		var timer <-chan time.Time
		if wait >= 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-d.endsChanged:
			continue
		case <-timer:
		}
		for _, s := range d.sortedSnapshots() {
			if !d.isOver(s) || time.Now().Before(again[s.id]) {
				continue
			}
			if pause, err := d.endNow(ctx, s); err == nil {
				again[s.id] = time.Now().Add(pause)
			}
		}
	}
}

// isOver says whether the time of a snapshot is over and its end has not begun.
func (d *Daemon) isOver(s *snapshot) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return s.note.Ends != 0 && !s.releasing && s.note.Ends <= bootNow()
}

// untilNextEnd is how long nothing is to be done, below 0 if no snapshot has an end.
func (d *Daemon) untilNextEnd(again map[string]time.Time) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id := range again {
		if d.snapshots[id] == nil {
			delete(again, id)
		}
	}
	next, now := time.Duration(-1), bootNow()
	for id, s := range d.snapshots {
		if s.note.Ends == 0 || s.releasing {
			continue
		}
		wait := max(time.Duration(s.note.Ends-now), time.Until(again[id]), 0)
		if next < 0 || wait < next {
			next = wait
		}
	}
	return min(next, maxEndWait)
}

// endNow destroys a snapshot whose time is over. If that could not be done, it is to be tried
// again after the pause.
func (d *Daemon) endNow(ctx context.Context, s *snapshot) (pause time.Duration, err error) {
	end, err := d.begin(ctx, "end snapshot %s, whose time is over, if nobody uses it", s.id)
	if err != nil {
		return 0, err
	}
	defer end()
	if !d.isOver(s) { // any more
		return 0, nil
	}
	if !s.destroying {
		if who := d.imageUser(ctx, s); who != nil {
			d.tellOverdue(s, errorOf(who).Message)
			return endInterval, nil
		}
		if !s.note.Overdue {
			d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventExpired})
		}
		d.opts.Log.Info("the time of a snapshot is over: it is destroyed", "snapshot", s.called())
	}
	if err := d.startDestroy(s); err != nil {
		d.opts.Log.Error("a snapshot whose time is over cannot be destroyed", "snapshot", s.called(), "error", err)
	}
	return endAgain, nil
}

// tellOverdue tells, once, who keeps a snapshot from its end.
func (d *Daemon) tellOverdue(s *snapshot, who string) {
	d.mu.Lock()
	s.overdue = who
	d.mu.Unlock()
	if s.note.Overdue {
		return
	}
	d.opts.Log.Warn("the time of a snapshot is over, but it is in use: it is destroyed when nobody uses it", "snapshot", s.called(), "user", who)
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventExpired, Text: who + ": it is destroyed when nobody uses it"})
	if err := d.changeNote(s, func(n *snapshotNote) { n.Overdue = true }); err != nil {
		d.opts.Log.Warn("the next daemon will tell once more that a snapshot is in use", "snapshot", s.called(), "error", err)
	}
}
