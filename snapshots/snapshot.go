package snapshots

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
)

// Config is what a snapshot is made of.
type Config struct {
	ID        uuid.UUID
	ChunkSize int64 // bytes
	PoolSize  int64 // bytes, rounded to chunks
	Portion   int64 // bytes by which storage grows at a time
	// StateDir is a directory on a tmpfs that outlives the daemon. The snapshot
	// makes a directory of its own in it.
	StateDir string
	// Root is the root directory that everybody sees, as of a disk.Host: another than
	// "/" says that this process has a mount namespace of its own. Empty is "/".
	Root string
	// Encrypt: what is stored is encrypted, on the thread of Stores. The images of the
	// snapshot are to be served in copy mode: see snapimage.Queue.
	Encrypt bool
	// Pending: nobody has been told of the snapshot yet. See SetPending.
	Pending bool
	// Note is what the owner wants to know of the snapshot again. See SetNote.
	Note json.RawMessage
	// StorageTimeout is how long a caller that appends storage waits for it.
	StorageTimeout time.Duration
	// Control is the queue for control work; its thread is not the caller's.
	Control blockdev.Queue
	// Stores is the queue that writes to the storages. No ublk device is open in its ring,
	// so a storage that does not answer keeps none from the next daemon.
	Stores blockdev.Queue
	// Keep puts a note on stable storage, in the place of the snapshot's last, or removes
	// it if it is nil: see Lost. If it fails, or is nil, a loss of power leaves what was
	// stored.
	Keep func(id uuid.UUID, note []byte) error
	// MachineID is what the note says of the machine: see disk.Host.MachineID. If it is nil,
	// it says nothing.
	MachineID func() string
	// OnEvent is called on queue threads and must not block.
	OnEvent func(diffarea.Event)
}

// Snapshot is a snapshot on this machine. Its methods block, and are called by
// one owner at a time, except for those that say otherwise. The owner makes the
// image devices after Take and removes them before Destroy.
type Snapshot struct {
	cfg     Config
	engine  *snapimage.Snapshot // for the thread of cfg.Control alone
	log     *diffarea.Log       // of engine, for what may be asked on any thread
	state   *state
	storage []*storage       // changed under mu
	filters []*filter.Filter // of the devices, in the order of Add
	align   int              // smallest logical block of the devices, bytes
	noted   bool             // see StayNoted
	taken   []*takenDevice   // by device, empty before the take

	mu        sync.Mutex
	returning []*returning
}

// takenDevice is what a take has made of a device.
type takenDevice struct {
	image *snapimage.Image
	info  cbtmap.Info
}

// New makes an empty snapshot.
func New(c Config) (*Snapshot, error) {
	if err := diffarea.CheckChunkSize(c.ChunkSize); err != nil {
		return nil, err
	}
	st, err := newState(filepath.Join(c.StateDir, c.ID.String()), c.Root, record{
		ID: c.ID, Chunk: c.ChunkSize, Pool: c.PoolSize, Portion: c.Portion, Created: time.Now(), Pending: c.Pending, Encrypted: c.Encrypt, Note: c.Note,
	})
	if err != nil {
		return nil, fmt.Errorf("make state of snapshot %s: %w", c.ID, err)
	}
	st.keep, st.machine = c.Keep, c.MachineID
	s, err := beginSnapshot(c, st)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make state of snapshot %s: %w", c.ID, err), st.close())
	}
	return s, nil
}

// beginSnapshot makes an empty snapshot in fresh memory.
func beginSnapshot(c Config, st *state) (*Snapshot, error) {
	log, err := st.logConfig(st.file, c.ChunkSize, c.PoolSize)
	if err != nil {
		return nil, err
	}
	if c.Encrypt {
		if log.Seal, err = st.newSeal(); err != nil {
			return nil, err
		}
	}
	log.Portion, log.OnEvent, log.Stores = c.Portion, c.OnEvent, c.Stores
	engine, err := snapimage.New(snapimage.Config{ID: c.ID, Log: log, Memory: st.memory}, c.Control)
	if err != nil {
		return nil, err
	}
	return &Snapshot{cfg: c, engine: engine, log: engine.Log(), state: st, align: sector.Size}, nil
}

// call runs f on the control queue's thread and waits until it calls back.
func (s *Snapshot) call(f func(done func(error))) error { return <-s.start(f) }

// start is call without the waiting.
func (s *Snapshot) start(f func(done func(error))) (result chan error) {
	result = make(chan error, 1)
	s.post(func() { f(func(err error) { result <- err }) })
	return result
}

// post runs f on the control queue's thread, some time.
func (s *Snapshot) post(f func()) { s.cfg.Control.Post(&blockdev.Task{Run: f}) }

// Add makes a device part of the snapshot.
func (s *Snapshot) Add(f *filter.Filter, d Device) error {
	if s.Taken() || slices.Contains(s.filters, f) {
		return s.add(f, d) // says what is wrong
	}
	at := len(s.filters)
	if err := s.state.update(func(r *record) {
		r.Devices = append(r.Devices[:at], recordDevice{Device: d, Size: f.Size(), Image: Image{Number: NoImage}})
	}); err != nil {
		return err
	}
	err := s.add(f, d)
	if err != nil {
		err = errors.Join(err, s.state.update(func(r *record) { r.Devices = r.Devices[:at] }))
	}
	return err
}

// add is Add without the record.
func (s *Snapshot) add(f *filter.Filter, d Device) error {
	block := int(min(int64(d.Block), s.cfg.ChunkSize))
	if len(s.filters) > 0 {
		block = min(block, s.align)
	}
	for _, st := range s.storage {
		if err := st.fitAlign(block); err != nil {
			return fmt.Errorf("storage %s: %w", st.path, err)
		}
	}
	if err := s.call(func(done func(error)) { done(s.engine.Add(f, d.Number)) }); err != nil {
		return err
	}
	s.filters = append(s.filters, f)
	s.align = block
	return nil
}

// SetImage puts the ublk device of an image on record, that of the device that was
// added as the i-th. The record comes before the ublk device, and goes after it:
// then its number is NoImage.
func (s *Snapshot) SetImage(i int, im Image) error {
	return s.state.update(func(r *record) { r.Devices[i].Image = im })
}

// SetPending puts on record whether nobody has been told of the snapshot yet: the
// next daemon destroys it then.
func (s *Snapshot) SetPending(pending bool) error {
	return s.state.update(func(r *record) { r.Pending = pending })
}

// SetNote puts on record what the owner wants to know of the snapshot again.
func (s *Snapshot) SetNote(n json.RawMessage) error {
	return s.state.update(func(r *record) { r.Note = n })
}

// StayNoted has GiveBack leave a note, which names no storage any more, so that the next
// boot tells of the snapshot: the machine ends, and nobody may see its end.
func (s *Snapshot) StayNoted() { s.noted = true }

// Told puts on record that the owner knows, where it outlives the daemon, that the
// snapshot is broken: else the next daemon is told it again. What is stored will never be
// read any more, so the key goes.
func (s *Snapshot) Told() {
	removeKey(filepath.Join(s.state.dir, keyName))
	if s.state.page.mem != nil {
		s.state.page.SetBreakReported()
	}
}

// Err is the errno that broke the snapshot, 0 while it is whole. Until GiveBack,
// on any thread.
func (s *Snapshot) Err() unix.Errno { return s.log.Err() }

// Usage says how full the snapshot is. Until GiveBack, on any thread.
func (s *Snapshot) Usage() diffarea.Usage { return s.log.Usage() }

// Waiting says whether writes wait for a disk that may not answer: see
// diffarea.Log.Waiting. Until GiveBack, on any thread.
func (s *Snapshot) Waiting() (waits bool, done uint64) { return s.log.Waiting() }

// UnderWay names the disks that the snapshot waits for. Until GiveBack, on any
// thread.
func (s *Snapshot) UnderWay() []string { return s.log.UnderWay() }

// Break breaks the snapshot, because a disk does not answer: see Waiting. It may be
// called on any thread.
func (s *Snapshot) Break(errno unix.Errno) { s.post(func() { s.engine.Break(errno) }) }

// Abort gives the snapshot up without waiting for anything. The original disks need it
// no more, and its images give errors. After that the caller can only destroy it, and
// that is on record. An error says that the record could not be written; the caller
// goes on all the same.
func (s *Snapshot) Abort() error {
	_ = s.call(func(done func(error)) {
		s.engine.Abort()
		done(nil)
	})
	deathpoint.Point()
	return s.state.update(func(r *record) { r.Destroying = true })
}

// Destroy takes the snapshot, whose image devices are gone, off its devices before
// anything that is called later. wait waits until its storage has ended what is under way,
// for as long as that takes.
func (s *Snapshot) Destroy() (wait func()) {
	done := make(chan struct{})
	s.post(func() { s.engine.Destroy(func() { close(done) }) })
	return func() { <-done }
}

// GiveBack gives the memory and storage of a destroyed snapshot back, with nothing left
// to read in them. The memory goes at once. Each storage goes when it answers. Last of
// all goes the record of what was still to be done.
func (s *Snapshot) GiveBack() error {
	// If that fails, the next daemon finds a log that was given up.
	_ = s.state.update(func(r *record) { r.Destroying = true })
	for _, st := range s.storage {
		used := s.log.Used(st.file)
		s.giveBack(st.path, func() error { return st.wipe(used) })
	}
	s.state.free()
	var errs []error
	for _, r := range s.returning {
		<-r.done
		errs = append(errs, r.err)
	}
	err := errors.Join(errs...)
	if err == nil {
		if !s.noted || !s.state.keepNote() {
			s.state.dropNote()
		}
	}
	return errors.Join(err, s.state.close())
}
