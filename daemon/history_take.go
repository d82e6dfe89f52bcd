package daemon

import (
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// A take begins a new generation if the numbers of the one before have run out, or if the
// change map was damaged. Then the history of the device says why.

func mapsBefore(s *snapshot) (before []cbtmap.Info) {
	for _, im := range s.images {
		info, _ := im.device.cbt.Info() // one that is not whole says its generation too
		before = append(before, info)
	}
	return before
}

// whyAnew is why a take, which found the change map as it was before, has begun a new
// generation; false if it has not.
func whyAnew(before, now cbtmap.Info) (control.History, bool) {
	switch {
	case before.GenerationID == now.GenerationID:
		return control.History{}, false
	case before.ChangesNumber == cbtmap.MaxNumber:
		return control.History{Reason: control.HistoryNumbers, Text: fmt.Sprintf("the numbers of takes have run out: take %d was the last one of the generation %v", before.ChangesNumber, before.GenerationID)}, true
	}
	return control.History{Reason: control.HistoryDamaged, Text: "the change map was not whole when a take was made"}, true
}

// tellGenerations tells of the generations that a take has begun, which may have failed since;
// needs opLock.
func (d *Daemon) tellGenerations(s *snapshot, before []cbtmap.Info) {
	for i, im := range s.images {
		now, err := im.device.cbt.Info()
		if h, anew := whyAnew(before[i], now); anew && err == nil {
			d.tellGeneration(im.device, s.id, h)
		}
	}
}

// tellLeftGenerations is tellGenerations of the take of a dead daemon, which may have died
// before it could tell, whatever becomes of the snapshot. The take may not have come to be.
func (d *Daemon) tellLeftGenerations(s *leftSnapshot) {
	for i, dev := range s.members {
		if dev == nil {
			continue
		}
		if s.Stage == snapshots.Taken {
			d.tellLeftGeneration(dev, s.id(), s.Before(i), s.TakeInfo(i))
		} else if now, err := dev.cbt.Info(); err == nil && s.Stage == snapshots.Taking {
			d.tellLeftGeneration(dev, s.id(), s.Before(i), now)
		}
	}
}

// tellLeftGeneration is tellLeftGenerations of one device.
func (d *Daemon) tellLeftGeneration(dev *device, snapshot string, before, taken cbtmap.Info) {
	h, anew := whyAnew(before, taken)
	now, err := dev.cbt.Info()
	if anew && err == nil && now.GenerationID == taken.GenerationID && d.history(dev) != h {
		d.tellGeneration(dev, snapshot, h)
	}
}

func (d *Daemon) tellGeneration(dev *device, snapshot string, h control.History) {
	d.mu.Lock()
	dev.History = h
	d.mu.Unlock()
	d.opts.Log.Warn("change tracking begins anew", "name", dev.Name, "disk", dev.Original, "snapshot", snapshot, "reason", h.Text)
	d.events.notice(control.Event{Kind: control.EventNewGeneration, Device: dev.OriginalNumber, Text: h.Text})
	if r, err := d.readDeviceRecord(dev.Name); err != nil {
		d.opts.Log.Warn("the next daemon will not know why change tracking began anew", "name", dev.Name, "error", err)
	} else {
		r.History = h
		d.changeDeviceRecord(r)
	}
}

// history is what became of the changes known before.
func (d *Daemon) history(dev *device) control.History {
	d.mu.Lock()
	defer d.mu.Unlock()
	return dev.History
}
