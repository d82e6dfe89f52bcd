package snapshots

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
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
	// StorageTimeout is how long a caller that appends storage waits for it.
	StorageTimeout time.Duration
	// Control is the queue for control work; its thread is not the caller's.
	Control blockdev.Queue
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
	storage []*storage
	devices int            // added
	align   int            // smallest logical block of the devices, bytes
	taken   []*takenDevice // by device, empty before the take

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
	st, err := newState(filepath.Join(c.StateDir, c.ID.String()))
	if err != nil {
		return nil, fmt.Errorf("make state of snapshot %s: %w", c.ID, err)
	}
	log, err := st.logConfig(c.ChunkSize, c.PoolSize)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make state of snapshot %s: %w", c.ID, err), st.close())
	}
	log.Portion, log.OnEvent = c.Portion, c.OnEvent
	engine, err := snapimage.New(snapimage.Config{ID: c.ID, Log: log, Memory: st.memory}, c.Control)
	if err != nil {
		return nil, errors.Join(err, st.close())
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

// Add makes a device part of the snapshot; device is its original's number, for
// events, block its logical block size in bytes.
func (s *Snapshot) Add(f *filter.Filter, device uint64, block int) error {
	if s.devices > 0 {
		block = min(block, s.align)
	}
	block = int(min(int64(block), s.cfg.ChunkSize))
	for _, st := range s.storage {
		if err := st.fitAlign(block); err != nil {
			return fmt.Errorf("storage %s: %w", st.path, err)
		}
	}
	if err := s.call(func(done func(error)) { done(s.engine.Add(f, device)) }); err != nil {
		return err
	}
	s.devices++
	s.align = block
	return nil
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
// no more, and its images give errors. After that the caller can only destroy it.
func (s *Snapshot) Abort() {
	_ = s.call(func(done func(error)) {
		s.engine.Abort()
		done(nil)
	})
}

// Destroy takes the snapshot, whose image devices are gone, off its devices. It
// waits until its storage has ended what is under way, for as long as that takes.
func (s *Snapshot) Destroy() {
	_ = s.call(func(done func(error)) { s.engine.Destroy(func() { done(nil) }) })
}

// GiveBack gives the memory and storage of a destroyed snapshot back, with nothing left
// to read in them. The memory goes at once. Each storage goes when it answers. Last of
// all goes the record of what was still to be done.
func (s *Snapshot) GiveBack() error {
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
	return errors.Join(append(errs, s.state.close())...)
}
