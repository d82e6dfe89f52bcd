package snapimage

import (
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Member is one device of a snapshot that Reopen takes over.
type Member struct {
	Filter *filter.Filter // its queues have not begun to serve
	Device uint64
	Size   int64 // of the image, as at the take; the disk may have grown since
	Words  []byte
	// Data calls back with the ranges of Words that may be other than zero; nil
	// means all of it.
	Data func(yield func(from, to int64))
	Take cbtmap.Info
}

// Reopen takes over a taken snapshot of a daemon that died, from what outlived
// it: the memory of its log and tables, and its storage in the order of Append.
// Its devices, all of them, are in the order of Add.
func Reopen(c Config, control blockdev.Queue, members []Member, storage []diffarea.Storage) (*Snapshot, error) {
	l, err := diffarea.OpenLog(c.Log, storage)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", c.ID, err)
	}
	s := &Snapshot{
		log: l, control: control, worker: diffarea.NewWorker(control), memory: c.Memory,
		storage: len(storage), taken: true,
	}
	for _, m := range members {
		if m.Filter.Size() < m.Size {
			return nil, fmt.Errorf("snapshot %s: %s has %d bytes, and had %d at the take", c.ID, m.Filter.Orig().Name(), m.Filter.Size(), m.Size)
		}
		a, err := diffarea.OpenArea(diffarea.AreaConfig{
			Log: l, Orig: m.Filter.Orig(), Size: m.Size, Words: m.Words, Device: m.Device,
		}, m.Data)
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", c.ID, err)
		}
		s.members = append(s.members, &member{
			filter: m.Filter, device: m.Device, area: a, image: newImage(a, m.Filter), take: m.Take,
		})
	}
	for _, m := range s.members {
		m.filter.Install(m.area)
	}
	s.post(func() { l.Resume(s.worker) })
	return s, nil
}
