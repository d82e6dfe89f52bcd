package daemon

import (
	"errors"
	"fmt"
	"os"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
)

// openLeftMap opens the change map that a dead daemon had of a device of size bytes. With
// cbtmap.ErrCorrupted there is a map as well.
func openLeftMap(path string, size int64) (*cbtmap.Map, error) {
	f, err := openLeft(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	f.Close()
	m, err := cbtmap.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := m.Info()
	if err == nil && info.DeviceCapacity != size {
		err = fmt.Errorf("%w: it is for %d bytes, not %d", errOtherSize, info.DeviceCapacity, size)
	}
	if err != nil && !errors.Is(err, cbtmap.ErrCorrupted) {
		_ = m.Close()
		return nil, err
	}
	return m, err
}

var errOtherSize = errors.New("the disk had another size")

// adoptChangeMap takes the map over, or begins another if it cannot be believed.
func (d *Daemon) adoptChangeMap(dev *device, s *survivor) error {
	name := s.record.Name
	dev.cbtPath = d.cbtFile(name)
	m, err := openLeftMap(dev.cbtPath, dev.geo.Size)
	if m != nil { // one that is corrupted stays so until the next take
		dev.cbt = m
		if s.record.ClaimedByOther {
			m.NewGeneration()
			d.beganAnew(dev, s, control.HistoryWritten, "somebody else had the disk while no daemon did")
		} else if s.record.GrownFrom != 0 { // and the dead daemon may not have told
			d.beganAnew(dev, s, control.HistoryOtherSize, grownText(s.record.GrownFrom, dev.geo.Size))
		}
		return nil
	}
	why := err
	if err = d.createChangeMap(dev, name); err == nil && s.record.GrownFrom != 0 && errors.Is(why, errOtherSize) {
		d.beganAnew(dev, s, control.HistoryOtherSize, grownText(s.record.GrownFrom, dev.geo.Size))
	} else if err == nil {
		d.beganAnew(dev, s, control.HistoryDamaged, fmt.Sprintf("the change map of the daemon before cannot be taken over: %v", why))
	}
	return err
}

// beganAnew tells why the change map of a device that is taken over has a new
// generation, and puts that on record.
func (d *Daemon) beganAnew(dev *device, s *survivor, reason, text string) {
	dev.History = control.History{Reason: reason, Text: text}
	d.opts.Log.Error("all of a disk counts as changed", "name", s.record.Name, "disk", s.record.Original.Path, "reason", text)
	d.events.notice(control.Event{Kind: control.EventNewGeneration, Device: s.record.Original.Number, Text: text})
	deathpoint.Point()
	s.record.History, s.record.ClaimedByOther, s.record.GrownFrom = dev.History, false, 0
	d.changeDeviceRecord(s.record)
}
