package daemon

import (
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A take begins a new generation if the numbers of the one before have run out, or if the
// change map was damaged. Then the history of the device says why.

// mapBefore is what a change map said of itself before a take.
type mapBefore struct {
	info cbtmap.Info
	err  error
}

func mapsBefore(s *snapshot) (before []mapBefore) {
	for _, im := range s.images {
		info, err := im.device.cbt.Info()
		before = append(before, mapBefore{info, err})
	}
	return before
}

// anew is why a take has begun a new generation; false if it has not.
func (b mapBefore) anew(now cbtmap.Info) (control.History, bool) {
	switch {
	case b.err != nil:
		return control.History{Reason: control.HistoryDamaged, Text: fmt.Sprintf("the change map was not whole when a take was made: %v", b.err)}, true
	case b.info.GenerationID != now.GenerationID:
		return control.History{Reason: control.HistoryNumbers, Text: fmt.Sprintf("the numbers of takes have run out: take %d was the last one of the generation %v", b.info.ChangesNumber, b.info.GenerationID)}, true
	}
	return control.History{}, false
}

// tellGenerations tells of the generations that a take has begun; needs opLock.
func (d *Daemon) tellGenerations(s *snapshot, before []mapBefore) {
	for i, im := range s.images {
		if h, anew := before[i].anew(s.snap.TakeInfo(i)); anew {
			d.tellGeneration(im.device, s.id, h)
		}
	}
}

// tellLeftGeneration is tellGenerations of a device and a take of a dead daemon, which may
// have died before it could tell.
func (d *Daemon) tellLeftGeneration(dev *device, snapshot string, before, taken cbtmap.Info) {
	b := mapBefore{info: before}
	if before.ChangesNumber != cbtmap.MaxNumber { // the record does not tell a map that was not whole
		b.err = cbtmap.ErrCorrupted
	}
	h, anew := b.anew(taken)
	now, err := dev.cbt.Info()
	if anew && err == nil && now.GenerationID == taken.GenerationID && d.history(dev).Reason != h.Reason {
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
