package snapshots

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Clear ends a snapshot of a dead daemon: its storage goes back, with nothing left
// to read in it, and its memory. Its images are gone, or nobody reads them any more.
// It may hang for as long as storage does, so it is called beside other work. If the
// daemon dies meanwhile, the next one does what is left.
func (l *Left) Clear(c Config) error {
	if err := l.clear(c); err != nil {
		return fmt.Errorf("clear snapshot %s: %w", l.ID, err)
	}
	return nil
}

func (l *Left) clear(c Config) error {
	if s := l.failed; s != nil {
		_ = s.Abort()
		s.Destroy()()
		return s.GiveBack()
	}
	l.release()
	if l.foreign {
		return l.Err
	}
	st, err := openState(l.Dir, c.Root)
	if err != nil {
		return err
	}
	st.pins.forget()
	if l.rec == nil {
		return st.clearUntrusted()
	}
	st.rec, st.keep, st.machine = *l.rec, c.Keep, c.MachineID
	var errs []error
	if !l.rec.Destroying && len(l.rec.Storage) > 0 {
		errs = append(errs, st.update(func(r *record) { r.Destroying = true }))
	}
	st.free()
	// Beside each other: any of them may hang.
	var wait sync.WaitGroup
	var mu sync.Mutex
	for n, r := range l.rec.Storage {
		wait.Add(1)
		go func() {
			defer wait.Done()
			if err := st.clear(n, c.StorageTimeout); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("storage %s: %w", r.Path, err))
			}
		}()
	}
	wait.Wait()
	err = errors.Join(errs...)
	if err == nil {
		st.dropNote()
	}
	return errors.Join(err, st.close())
}

// clearUntrusted ends a snapshot of which only the pins are known. It empties the
// files, because a daemon made them. Everything else would need a record.
func (st *state) clearUntrusted() error {
	st.removeAll()
	var errs []error
	for _, n := range st.pins.all() {
		if place, err := st.pins.place(n); err == nil {
			errs = append(errs, emptyUntrusted(place, st.pins.source(n)))
			place.Close()
		}
		errs = append(errs, st.pins.release(n))
	}
	return errors.Join(append(errs, st.close())...)
}

// emptyUntrusted empties what is pinned, and comes from where.
func emptyUntrusted(place *os.File, where string) error {
	st := statOf(place)
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o777 != ownMode {
		return fmt.Errorf("copied data may remain in %s", where)
	}
	fd, err := reopen(place, unix.O_WRONLY)
	if err == nil {
		err = errors.Join(unix.Ftruncate(fd, 0), unix.Close(fd))
	}
	if err != nil {
		return fmt.Errorf("copied data may remain in %s: %w", where, err)
	}
	if st.Nlink > 0 {
		return fmt.Errorf("a file remains, and it is empty: %s", where)
	}
	return nil
}
