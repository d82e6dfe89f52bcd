package snapshots

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
)

// ErrNoAnswer: a disk of the snapshot, of its storage or an original, does not
// answer.
var ErrNoAnswer = errors.New("does not answer")

// Append gives the snapshot storage. It returns when the first portion is allocated. If
// all of that takes longer than Config.StorageTimeout, it fails with ErrNoAnswer. Then the
// storage is used if it answers after all, and is given back with the others.
func (s *Snapshot) Append(c StorageConfig) error {
	path := c.Place.Path
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.StorageTimeout)
	defer cancel()
	st, err := s.openStorage(ctx, c)
	if err != nil {
		return err
	}
	s.use(append(s.storage, st))
	late, err := s.give(ctx, st)
	if late || err == nil {
		return err
	}
	s.use(slices.Clone(s.storage[:len(s.storage)-1]))
	r := s.giveBack(path, func() error { return st.wipe(0) })
	select {
	case <-r.done:
		err, r.err = errors.Join(err, r.err), nil // told once
	case <-ctx.Done():
		err = fmt.Errorf("%w; and %s does not answer: it is given back when it does", err, path)
	}
	return err
}

// give gives the engine a storage, for as long as ctx lasts.
func (s *Snapshot) give(ctx context.Context, st *storage) (late bool, err error) {
	deathpoint.Point()
	select {
	case err = <-s.start(func(done func(error)) { s.engine.Append(st.engine(), done) }):
		deathpoint.Point()
		return false, err
	case <-ctx.Done():
		return true, fmt.Errorf("%s: %w", st.path, ErrNoAnswer)
	}
}

// openStorage opens a storage. Opening may hang, because
// the file may lie on a dead file server.
func (s *Snapshot) openStorage(ctx context.Context, c StorageConfig) (*storage, error) {
	type opened struct {
		st  *storage
		err error
	}
	align := s.align
	back := &returning{path: c.Place.Path, done: make(chan struct{})}
	o, late := bounded.Call(ctx, func() (o opened) {
		o.st, o.err = s.state.openStorage(c, align)
		return o
	}, func(o opened) {
		if o.err == nil {
			back.err = o.st.wipe(0)
		}
		close(back.done)
	})
	if late != nil {
		s.awaitLater(back)
		return nil, fmt.Errorf("%s: %w", c.Place.Path, ErrNoAnswer)
	}
	return o.st, o.err
}

// returning is a storage that is being given back. That may hang for as long as the
// storage does not answer. The file or device stays claimed until then.
type returning struct {
	path string
	done chan struct{} // closed when it is back
	err  error         // from then on
}

// giveBack runs f, which gives the storage at path back, beside the caller.
func (s *Snapshot) giveBack(path string, f func() error) *returning {
	r := &returning{path: path, done: make(chan struct{})}
	s.awaitLater(r)
	go func() {
		r.err = f()
		close(r.done)
	}()
	return r
}

// awaitLater leaves the wait for a storage on its way back to GiveBack.
func (s *Snapshot) awaitLater(r *returning) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.returning = append(s.returning, r)
}

// Returning are the paths of storage that is being given back and has not
// answered yet. It may be called beside any other method.
func (s *Snapshot) Returning() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var paths []string
	for _, r := range s.returning {
		select {
		case <-r.done:
		default:
			paths = append(paths, r.path)
		}
	}
	return paths
}
