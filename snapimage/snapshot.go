package snapimage

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// Errors of a snapshot's life.
var (
	ErrNoDevices = errors.New("the snapshot has no devices: add one first")
	ErrNoStorage = errors.New("the snapshot has no difference storage: append one first")
	ErrTaken     = errors.New("the snapshot has been taken already")
	ErrAdded     = errors.New("the device is in the snapshot already")
	ErrCancelled = errors.New("writes in flight did not end in time: the snapshot was not taken")
	ErrDestroyed = errors.New("the snapshot is being destroyed")
)

// Config is what a snapshot is made of.
type Config struct {
	ID  uuid.UUID
	Log diffarea.LogConfig
	// Memory gives zeroed memory for a device's chunk words, 8 byte aligned,
	// that outlives the process and stays until Destroy has called back.
	Memory func(name string, size int64) ([]byte, error)
}

// Snapshot is a set of devices frozen at one instant.
type Snapshot struct {
	log        *diffarea.Log
	control    blockdev.Queue
	worker     *diffarea.Worker // of the control queue
	memory     func(string, int64) ([]byte, error)
	members    []*member
	storage    int // pieces appended
	cut        *filter.Cut
	taken      bool
	destroying bool
}

// member is one device of a snapshot.
type member struct {
	filter *filter.Filter
	device uint64
	area   *diffarea.Area
	image  *Image
	take   cbtmap.Info // of the change map at the cut
}

// New makes an empty snapshot with its control queue.
func New(c Config, control blockdev.Queue) (*Snapshot, error) {
	l, err := diffarea.NewLog(c.Log)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", c.ID, err)
	}
	return &Snapshot{log: l, control: control, worker: diffarea.NewWorker(control), memory: c.Memory}, nil
}

// post runs f on the control queue's thread.
func (s *Snapshot) post(f func()) { s.control.Post(&blockdev.Task{Run: f}) }

// Log is the snapshot's difference log.
func (s *Snapshot) Log() *diffarea.Log { return s.log }

// Image is the image of device i, nil before the take.
func (s *Snapshot) Image(i int) *Image { return s.members[i].image }

// TakeInfo is what the change map of device i says of this take.
func (s *Snapshot) TakeInfo(i int) cbtmap.Info { return s.members[i].take }

// Add makes a device part of the snapshot; device is its original's number,
// for events.
func (s *Snapshot) Add(f *filter.Filter, device uint64) error {
	if s.taken || s.cut != nil {
		return ErrTaken
	}
	for _, m := range s.members {
		if m.filter == f {
			return fmt.Errorf("%s: %w", f.Orig().Name(), ErrAdded)
		}
	}
	s.members = append(s.members, &member{filter: f, device: device})
	s.log.Expect(s.worker, f.Size())
	return nil
}

// Append gives the snapshot difference storage, before the take or after.
func (s *Snapshot) Append(st diffarea.Storage, done func(error)) {
	if s.destroying {
		done(ErrDestroyed)
		return
	}
	s.log.Append(s.worker, st, func(err error) {
		s.post(func() {
			if err == nil {
				s.storage++
			}
			done(err)
		})
	})
}

// SetRoom says how far a storage can grow: see diffarea.Log.SetRoom.
func (s *Snapshot) SetRoom(f blockdev.File, used, room int64) {
	s.log.SetRoom(s.worker, f, used, room)
}

// Take makes the cut on all devices: all of them or, with an error, none. at
// is called at the very instant, when no write is in flight on any device; it
// must not block and may be nil.
func (s *Snapshot) Take(at func(), done func(error)) {
	switch {
	case s.destroying:
		done(ErrDestroyed)
		return
	case s.taken || s.cut != nil:
		done(ErrTaken)
		return
	case len(s.members) == 0:
		done(ErrNoDevices)
		return
	case s.storage == 0:
		done(ErrNoStorage)
		return
	}
	// All that can fail comes before the gates close.
	filters := make([]*filter.Filter, len(s.members))
	areas := make([]*diffarea.Area, len(s.members))
	for i, m := range s.members {
		if m.area == nil {
			n := diffarea.TableSize(diffarea.Chunks(m.filter.Size(), s.log.ChunkSize()))
			mem, err := s.memory(fmt.Sprintf("words-%d", i), n)
			if err != nil {
				done(fmt.Errorf("%s: get %d bytes for the chunk table: %w", m.filter.Orig().Name(), n, err))
				return
			}
			m.area = diffarea.NewArea(diffarea.AreaConfig{
				Log: s.log, Orig: m.filter.Orig(), Size: m.filter.Size(), Words: mem, Device: m.device,
			})
			m.image = newImage(m.area, m.filter)
		}
		filters[i], areas[i] = m.filter, m.area
	}
	s.cut = filter.StartCut(filters, areas, func() {
		for _, m := range s.members {
			if c := m.filter.CBT(); c != nil {
				m.take = c.Switch()
			}
		}
		if at != nil {
			at()
		}
	}, func(ok bool) {
		s.post(func() {
			s.cut = nil
			if !ok {
				done(ErrCancelled)
				return
			}
			s.taken = true
			done(nil)
		})
	})
}

// Cancel gives up a Take that still waits for writes in flight: it calls back
// with ErrCancelled, and may be tried again.
func (s *Snapshot) Cancel() {
	if s.cut != nil {
		s.cut.Cancel()
	}
}

// Break breaks the snapshot: see diffarea.Log.Break.
func (s *Snapshot) Break(errno unix.Errno) { s.log.Break(s.worker, errno) }

// Abort ends the snapshot, whatever hangs: see diffarea.Log.Abort. Destroy comes
// later.
func (s *Snapshot) Abort() { s.log.Abort(s.worker) }

// Destroy takes the snapshot off its devices. The image devices are gone
// already, or at least no request of theirs is under way. done is called when
// nothing of the snapshot is in use any more: its memory and storage can be
// given back.
func (s *Snapshot) Destroy(done func()) {
	s.destroying = true
	closeLog := func() { s.log.Close(s.worker, func() { s.post(done) }) }
	if !s.taken {
		closeLog()
		return
	}
	filters := make([]*filter.Filter, len(s.members))
	areas := make([]*diffarea.Area, len(s.members))
	for i, m := range s.members {
		filters[i], areas[i] = m.filter, m.area
	}
	filter.Forget(filters, areas, func() { s.post(closeLog) })
}
