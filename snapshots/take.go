package snapshots

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
)

// TakeOptions say how to take.
type TakeOptions struct {
	// Freeze are directories on the mounted filesystems to freeze around the
	// cut, one per filesystem.
	Freeze []*os.File
	// Freezer freezes them; nil is Freeze.
	Freezer Freezer
	// Limit bounds the freezing and the wait for writes in flight, each.
	Limit time.Duration
}

// Take makes the cut, and returns for how long filesystems were frozen. If it fails,
// nothing was taken, unless Taken says otherwise. In that case nobody may trust the
// images, and the snapshot has to be destroyed.
func (s *Snapshot) Take(ctx context.Context, o TakeOptions) (frozen time.Duration, err error) {
	if len(o.Freeze) == 0 {
		return 0, s.cut(ctx, o.Limit)
	}
	if o.Freezer == nil {
		o.Freezer = Freeze
	}
	f, err := freeze(o.Freezer, o.Freeze, o.Limit)
	if err != nil {
		return 0, err
	}
	defer func() { // even if the cut panics
		// If somebody else thawed a filesystem early, it may have been in use at the cut.
		thawErr := f.thaw()
		frozen = time.Since(f.since)
		err = errors.Join(err, thawErr)
	}()
	return 0, s.cut(ctx, o.Limit)
}

// cut makes the cut, or cancels it when ctx or limit ends before the writes in
// flight do.
func (s *Snapshot) cut(ctx context.Context, limit time.Duration) error {
	first := !s.Taken() && len(s.filters) > 0
	if first {
		if err := s.prepare(); err != nil {
			return err
		}
	}
	ctx, end := context.WithTimeout(ctx, limit)
	defer end()
	cancelled := make(chan struct{})
	var stop func() bool
	err := s.call(func(done func(error)) {
		// Not before: a Cancel that overtook the Take would leave it without a limit.
		stop = context.AfterFunc(ctx, func() {
			s.post(s.engine.Cancel)
			close(cancelled)
		})
		s.engine.Take(func() {
			deathpoint.Point()
			s.state.page.Taken(len(s.filters), s.engine.TakeInfo)
			deathpoint.Point()
		}, func(err error) {
			if err == nil {
				s.setTaken()
			}
			done(err)
		})
	})
	if !stop() {
		// A Cancel that came later would be for the next take.
		<-cancelled
	}
	deathpoint.Point()
	if err != nil && first {
		err = errors.Join(err, s.state.endTake())
	}
	return err
}

// ErrGrown: what the snapshot has made for a disk is too small by now.
var ErrGrown = errors.New("the disk has grown since it was added to the snapshot")

// prepare puts on record what the change maps say before a take.
func (s *Snapshot) prepare() error {
	s.state.mu.Lock()
	devices := slices.Clone(s.state.rec.Devices)
	s.state.mu.Unlock()
	for i, f := range s.filters {
		if devices[i].Size != f.Size() {
			return fmt.Errorf("%s: %w: destroy it, and create another", f.Orig().Name(), ErrGrown)
		}
	}
	var before []cbtmap.Info
	for _, f := range s.filters {
		info := cbtmap.Info{}
		if m := f.CBT(); m != nil {
			info, _ = m.Info() // a map that is corrupted begins anew with the take
		}
		before = append(before, info)
	}
	if err := s.state.newTake(before); err != nil {
		return fmt.Errorf("put the take on record: %w", err)
	}
	return nil
}

// setTaken is for the thread of the engine's snapshot, or before it has begun.
func (s *Snapshot) setTaken() {
	for i := range s.filters {
		s.taken = append(s.taken, &takenDevice{s.engine.Image(i), s.engine.TakeInfo(i)})
	}
}

// Taken says whether the images exist.
func (s *Snapshot) Taken() bool { return len(s.taken) > 0 }

// Image is the image of the device that was added as the i-th, from 0. There is
// none before the take.
func (s *Snapshot) Image(i int) *snapimage.Image { return s.taken[i].image }

// TakeInfo is what the change map of that device says of this take.
func (s *Snapshot) TakeInfo(i int) cbtmap.Info { return s.taken[i].info }
