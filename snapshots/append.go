package snapshots

import (
	"errors"
	"fmt"
	"time"
)

// ErrStuck: a disk of the snapshot, of its storage or an original, does not
// answer.
var ErrStuck = errors.New("does not answer")

// Append gives the snapshot storage. It returns when the first portion is
// allocated, or with ErrStuck when that takes longer than Config.Patience, all in
// all: the storage is used then if it answers after all, and given back with the
// others.
func (s *Snapshot) Append(c StorageConfig) error {
	path := c.Place.Path
	late := time.After(s.cfg.Patience)
	st, err := s.openStorage(c, late)
	if err != nil {
		return err
	}
	s.storage = append(s.storage, st)
	select {
	case err = <-s.start(func(done func(error)) { s.engine.Append(st.engine(), done) }):
	case <-late:
		return fmt.Errorf("%s: %w", path, ErrStuck)
	}
	if err == nil {
		return nil
	}
	s.storage = s.storage[:len(s.storage)-1]
	r := s.giveBack(path, func() error { return st.discard(0) })
	select {
	case <-r.done:
		err, r.err = errors.Join(err, r.err), nil // told once
	case <-late:
		err = fmt.Errorf("%w; and %s does not answer: it is given back when it does", err, path)
	}
	return err
}

// openStorage is for what may hang itself: a file of a dead file server.
func (s *Snapshot) openStorage(c StorageConfig, late <-chan time.Time) (*storage, error) {
	type result struct {
		st  *storage
		err error
	}
	align := s.align
	opened := make(chan result, 1)
	go func() {
		st, err := c.open(align)
		if err == nil {
			if err = s.state.remember(st, c.Where); err != nil {
				err = errors.Join(err, st.discard(0))
			}
		}
		opened <- result{st, err}
	}()
	select {
	case r := <-opened:
		return r.st, r.err
	case <-late:
		s.giveBack(c.Place.Path, func() error {
			if r := <-opened; r.err == nil {
				return r.st.discard(0)
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
func (s *Snapshot) giveBack(path string, f func() error) *returning {
	r := &returning{path: path, done: make(chan struct{})}
	s.mu.Lock()
	s.returning = append(s.returning, r)
	s.mu.Unlock()
	go func() {
		r.err = f()
		close(r.done)
	}()
	return r
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
