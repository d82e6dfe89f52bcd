package cbtstate

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// Store is an open state directory. Its calls may hang as long as its filesystem
// does. Only the process that has claimed a disk keeps state of it.
type Store struct{ folder folder }

// folder is a directory as a Store needs it: the machine's, or one that a test
// takes the power from.
type folder interface {
	// create makes a new file, in the place of one that is there.
	create(name string) (file, error)
	// read is all of a file of at most limit bytes that nobody else can write to.
	read(name string, limit int64) ([]byte, error)
	names() ([]string, error)
	rename(from, to string) error
	remove(name string) error // no error if there is none
	sync() error              // makes names durable
	close()
}

type file interface {
	Write(b []byte) (int, error)
	Sync() error
	Close() error
}

// The files of a disk are its key with one of these; what is not whole yet has
// newSuffix behind that.
const (
	recordSuffix = ".json"
	mapSuffix    = ".map"
	usedSuffix   = ".used"
	newSuffix    = ".new"

	maxRecord = 16 << 20
)

// Open opens the directory at path, as seen from the directory root, and makes it if
// it is to be made. The error is a *Refusal: Untrusted if somebody else can write to
// it or lead the path elsewhere, NoState if it is not there, else NoPlace.
func Open(root, path string, create bool) (*Store, error) {
	f, err := openFolder(root, path, create)
	if err != nil {
		return nil, err
	}
	return &Store{f}, nil
}

// Close closes it.
func (s *Store) Close() { s.folder.close() }

// Save keeps a change map. Just before the step that makes it count, commit is asked
// whether it still shall. When Save returns nil all is on stable storage; after an
// error nothing counts, unless the error came after that step.
func (s *Store) Save(r Record, m []byte, commit func() bool) error {
	k := key(r.Identity)
	r.MapSHA256 = hashOf(m)
	text, err := r.encode()
	if err != nil {
		return fmt.Errorf("keep the change map: %w", err)
	}
	steps := []func() error{
		// There is none, unless it could not be used up.
		func() error { return s.folder.remove(k + recordSuffix) },
		s.folder.sync,
		func() error { return write(s.folder, k+mapSuffix, m) },
		func() error { return write(s.folder, k+recordSuffix+newSuffix, text) },
		s.folder.sync,
		func() error {
			if !commit() {
				return errors.New("took too long")
			}
			return s.folder.rename(k+recordSuffix+newSuffix, k+recordSuffix)
		},
		s.folder.sync,
		func() error { return s.folder.remove(k + usedSuffix) },
		func() error { return s.folder.remove(k + runningSuffix) },
		s.folder.sync,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("keep the change map: %w", err)
		}
	}
	s.Tidy(r.Identity, uuid.Nil)
	return nil
}

// write writes a file whole: it has its name when its bytes are on stable storage.
func write(in folder, name string, b []byte) error {
	fresh := name
	if !strings.HasSuffix(name, newSuffix) {
		fresh += newSuffix
	}
	f, err := in.create(fresh)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil && fresh != name {
		err = in.rename(fresh, name)
	}
	return err
}

// replace is write, and durable when it returns nil.
func replace(in folder, name string, b []byte) error {
	if err := write(in, name, b); err != nil {
		return err
	}
	return in.sync()
}

// Find is what is kept of a disk: its record, and its map of at most limit bytes. The
// error is a *Refusal. name is what the filter will be called: if nothing is kept of
// the disk the text may tell of what is kept under that name.
func (s *Store) Find(id disk.Identity, name string, limit int64) (*Record, []byte, error) {
	k := key(id)
	r, err := s.record(k + recordSuffix)
	used, usedErr := s.record(k + usedSuffix)
	switch {
	case errors.Is(err, fs.ErrNotExist) && errors.Is(usedErr, fs.ErrNotExist):
		return nil, nil, s.explainAbsence(id, name)
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, used.refuse(Unclean, "the last filter over the disk did not end cleanly, or its change map could not be kept")
	case err != nil:
		return nil, nil, refusalOf(err)
	case usedErr != nil && !errors.Is(usedErr, fs.ErrNotExist):
		return nil, nil, refusalOf(usedErr) // it may say that this one was used
	case usedErr == nil && used.ID == r.ID:
		return nil, nil, r.refuse(Used, "the state was used before: %s%s has come back", k, recordSuffix)
	}
	m, err := s.folder.read(k+mapSuffix, limit)
	if err != nil {
		return nil, nil, refusalOf(fmt.Errorf("%s%s: %w", k, mapSuffix, err))
	}
	if hashOf(m) != r.MapSHA256 {
		return nil, nil, r.refuse(Damaged, "%s%s is not the map that was kept", k, mapSuffix)
	}
	return r, m, nil
}

// record reads a record. The error is fs.ErrNotExist, or a *Refusal.
func (s *Store) record(name string) (*Record, error) {
	b, err := s.folder.read(name, maxRecord)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r, no := decode(b)
	if no != nil {
		no.Text = name + " " + no.Text
		return nil, no
	}
	if k, _, _ := strings.Cut(name, "."); key(r.Identity) != k {
		return nil, refuse(OtherDisk, "%s is of another disk: %s", name, r.Identity)
	}
	return r, nil
}

func refusalOf(err error) *Refusal {
	var no *Refusal
	if errors.As(err, &no) {
		return no
	}
	if errors.Is(err, fs.ErrNotExist) {
		return refuse(Damaged, "%v", err)
	}
	return refuse(NoPlace, "%v", err)
}

// explainAbsence says why nothing is kept of a disk.
func (s *Store) explainAbsence(id disk.Identity, name string) *Refusal {
	names, _ := s.folder.names()
	for _, n := range names {
		if !strings.HasSuffix(n, recordSuffix) {
			continue
		}
		if r, err := s.record(n); err == nil && r.Name == name {
			return r.refuse(OtherDisk, "what was kept for %s is of another disk: %s, and not %s", name, r.Identity, id)
		}
	}
	return refuse(NoState, "nothing was kept of this disk")
}

// Use sees to that what is kept of a disk is not used again. It is durable when Use
// returns nil, also if there was nothing. Only then may the disk be written to by
// somebody who counts on what Find returned.
func (s *Store) Use(id disk.Identity) error {
	k := key(id)
	if err := s.useUp(k, recordSuffix); err != nil {
		return fmt.Errorf("use up the change map that was kept: %w", err)
	}
	// The map means nothing any more.
	for _, name := range []string{k + mapSuffix, k + mapSuffix + newSuffix, k + recordSuffix + newSuffix} {
		_ = s.folder.remove(name)
	}
	return nil
}

// useUp has a record that may count not count any more, durably.
func (s *Store) useUp(k, suffix string) error {
	if err := s.folder.rename(k+suffix, k+usedSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.folder.sync()
}
