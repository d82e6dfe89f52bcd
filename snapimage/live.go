package snapimage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// LiveConfig is what a snapshot on this machine is made of.
type LiveConfig struct {
	ID        uuid.UUID
	ChunkSize int64 // bytes
	PoolSize  int64 // bytes, rounded to chunks
	Portion   int64 // bytes by which storage grows at a time
	// StateDir is a directory on a tmpfs that outlives the daemon; the snapshot
	// makes one of its own in it.
	StateDir string
	// Patience is how long storage may take to answer who appends it.
	Patience time.Duration
	// Control is the queue for control work; its thread is not the caller's.
	Control blockdev.Queue
	// OnEvent is called on queue threads and must not block.
	OnEvent func(diffarea.Event)
}

// Live is a Snapshot with its files: state, pool and storage. Its methods
// block, and are called by one owner at a time. The owner makes the image
// devices after Take and removes them before Destroy.
type Live struct {
	*Snapshot
	cfg     LiveConfig
	state   *state
	storage []*storage
	align   int // smallest logical block of its devices, bytes

	mu        sync.Mutex
	returning []*returning
}

// NewLive makes an empty snapshot.
func NewLive(cfg LiveConfig) (*Live, error) {
	if err := diffarea.CheckChunkSize(cfg.ChunkSize); err != nil {
		return nil, err
	}
	st, err := newState(filepath.Join(cfg.StateDir, cfg.ID.String()))
	if err != nil {
		return nil, fmt.Errorf("make state of snapshot %s: %w", cfg.ID, err)
	}
	log, err := st.logConfig(cfg.ChunkSize, cfg.PoolSize)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make state of snapshot %s: %w", cfg.ID, err), st.close())
	}
	log.Portion, log.OnEvent = cfg.Portion, cfg.OnEvent
	s, err := New(Config{ID: cfg.ID, Log: log, Memory: st.memory}, cfg.Control)
	if err != nil {
		return nil, errors.Join(err, st.close())
	}
	return &Live{Snapshot: s, cfg: cfg, state: st, align: sector.Size}, nil
}

// ErrStuck: a disk of the snapshot, of its storage or an original, does not
// answer.
var ErrStuck = errors.New("does not answer")

// call runs f on the control queue's thread and waits until it calls back.
func (v *Live) call(f func(done func(error))) error { return <-v.start(f) }

// start is call without the waiting.
func (v *Live) start(f func(done func(error))) (result chan error) {
	result = make(chan error, 1)
	v.post(func() { f(func(err error) { result <- err }) })
	return result
}

func (v *Live) post(f func()) { v.cfg.Control.Post(&blockdev.Task{Run: f}) }

// AddDevice makes a device part of the snapshot; device is its original's
// number, for events, block its logical block size in bytes.
func (v *Live) AddDevice(f *filter.Filter, device uint64, block int) error {
	if v.Len() > 0 {
		block = min(block, v.align)
	}
	block = int(min(int64(block), v.cfg.ChunkSize))
	for _, s := range v.storage {
		if err := s.suit(block); err != nil {
			return fmt.Errorf("storage %s: %w", s.path, err)
		}
	}
	err := v.call(func(done func(error)) { done(v.Add(f, device)) })
	if err == nil {
		v.align = block
	}
	return err
}

// AppendStorage gives the snapshot storage. It returns when the first portion is
// allocated, or with ErrStuck when that takes longer than LiveConfig.Patience,
// all in all: the storage is used then if it answers after all, and given back
// with the others.
func (v *Live) AppendStorage(c Storage) error {
	path := c.Place.Path
	late := time.After(v.cfg.Patience)
	s, err := v.openStorage(c, late)
	if err != nil {
		return err
	}
	v.storage = append(v.storage, s)
	select {
	case err = <-v.start(func(done func(error)) { v.Append(s.engine(), done) }):
	case <-late:
		return fmt.Errorf("%s: %w", path, ErrStuck)
	}
	if err == nil {
		return nil
	}
	v.storage = v.storage[:len(v.storage)-1]
	r := v.giveBack(path, func() error { return s.discard(0) })
	select {
	case <-r.done:
		err, r.err = errors.Join(err, r.err), nil // told once
	case <-late:
		err = fmt.Errorf("%w; and %s does not answer: it is given back when it does", err, path)
	}
	return err
}

// openStorage is for what may hang itself: a file of a dead file server.
func (v *Live) openStorage(c Storage, late <-chan time.Time) (*storage, error) {
	type result struct {
		s   *storage
		err error
	}
	align := v.align
	opened := make(chan result, 1)
	go func() {
		s, err := c.open(align)
		if err == nil {
			if err = v.state.remember(s, c.Where); err != nil {
				err = errors.Join(err, s.discard(0))
			}
		}
		opened <- result{s, err}
	}()
	select {
	case r := <-opened:
		return r.s, r.err
	case <-late:
		v.giveBack(c.Place.Path, func() error {
			if r := <-opened; r.err == nil {
				return r.s.discard(0)
			}
			return nil
		})
		return nil, fmt.Errorf("%s: %w", c.Place.Path, ErrStuck)
	}
}

// returning is a storage on its way back. What it takes may hang for as long as
// the storage does not answer; the file or device stays claimed until then.
type returning struct {
	path string
	done chan struct{} // closed when it is back
	err  error         // from then on
}

// giveBack runs f, which gives the storage at path back, beside the caller.
func (v *Live) giveBack(path string, f func() error) *returning {
	r := &returning{path: path, done: make(chan struct{})}
	v.mu.Lock()
	v.returning = append(v.returning, r)
	v.mu.Unlock()
	go func() {
		r.err = f()
		close(r.done)
	}()
	return r
}

// Returning are the paths of storage that is being given back and has not
// answered yet. It may be called beside any other method.
func (v *Live) Returning() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var paths []string
	for _, r := range v.returning {
		select {
		case <-r.done:
		default:
			paths = append(paths, r.path)
		}
	}
	return paths
}

// TakeOptions say how to take.
type TakeOptions struct {
	// Freeze are directories on the mounted filesystems to freeze around the
	// cut, one per filesystem.
	Freeze []*os.File
	// Limit bounds the freezing and the wait for writes in flight, each.
	Limit time.Duration
}

// TakeDevices makes the cut and returns for how long filesystems stood still.
// With an error nothing was taken, unless Taken says otherwise: then the images
// are not to be trusted, and the snapshot is for destroying.
func (v *Live) TakeDevices(ctx context.Context, o TakeOptions) (still time.Duration, err error) {
	var z *frozen
	if len(o.Freeze) > 0 {
		if z, err = freeze(o.Freeze, o.Limit); err != nil {
			return 0, err
		}
		defer func() {
			// A filesystem that somebody thawed early was cut in use.
			terr := z.thaw()
			still = time.Since(z.since)
			err = errors.Join(err, terr)
		}()
	}
	ctx, cancel := context.WithTimeout(ctx, o.Limit)
	defer cancel()
	var over sync.WaitGroup
	over.Add(1)
	stop := context.AfterFunc(ctx, func() {
		v.post(v.Cancel)
		over.Done()
	})
	err = v.call(func(done func(error)) { v.Take(nil, done) })
	if stop() {
		over.Done()
	}
	over.Wait()
	return 0, err
}

// Abort gives the snapshot up without waiting for anything: the original disks
// need it no more, and its images give errors. Destroying it is what is left.
func (v *Live) Abort() {
	_ = v.call(func(done func(error)) {
		v.Snapshot.Abort()
		done(nil)
	})
}

// GiveUp breaks the snapshot, whose storage does not answer: see
// diffarea.Log.Waiting.
func (v *Live) GiveUp(errno unix.Errno) { v.post(func() { v.Snapshot.GiveUp(errno) }) }

// End ends the snapshot, whose image devices are gone. It waits until its
// storage has ended what is under way, for as long as that takes.
func (v *Live) End() {
	_ = v.call(func(done func(error)) { v.Destroy(func() { done(nil) }) })
}

// DestroyFiles gives memory and storage of a snapshot back that has ended, with
// nothing left to read in them. The memory goes at once, each storage when it
// answers, and last of all the record of what was still to be done.
func (v *Live) DestroyFiles() error {
	for _, s := range v.storage {
		used := v.Log().Used(s.file)
		v.giveBack(s.path, func() error { return s.discard(used) })
	}
	v.state.free()
	var errs []error
	for _, r := range v.returning {
		<-r.done
		errs = append(errs, r.err)
	}
	return errors.Join(append(errs, v.state.close())...)
}
