package snapshots

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
)

// config is c with what the record says.
func (l *Left) config(c Config) Config {
	c.ID, c.ChunkSize, c.PoolSize, c.Portion, c.Pending, c.Encrypt = l.ID, l.rec.Chunk, l.rec.Pool, l.rec.Portion, l.rec.Pending, l.rec.Encrypted
	return c
}

// check says whether the snapshot can be taken over at stage, with these filters.
func (l *Left) check(stage Stage, filters int) error {
	switch {
	case l.Err != nil:
		return l.Err
	case l.Stage != stage:
		return fmt.Errorf("it is %v, not %v", l.Stage, stage)
	case filters != len(l.Devices):
		return fmt.Errorf("it has %d devices, not %d", len(l.Devices), filters)
	}
	return nil
}

// align is the smallest logical block of the devices: see Snapshot.
func (l *Left) align() int {
	align := sector.Size
	for i, d := range l.Devices {
		if block := int(min(int64(d.Block), l.Chunk)); i == 0 || block < align {
			align = block
		}
	}
	return align
}

// Claim claims the storages anew, within c.StorageTimeout: after that nothing of the
// dead daemon is under way on them. Again and Reopen do it too, unless it was done;
// alone it may be called beside that of other snapshots. If it fails, that is final,
// because filters wait for it: then Again and Reopen fail at once, for the same reason.
func (l *Left) Claim(c Config) error {
	switch {
	case l.Err != nil:
		return l.Err
	case l.claimed == nil && l.noClaim == nil:
		l.noClaim = l.claim(c)
	}
	return l.noClaim
}

func (l *Left) claim(c Config) error {
	st, err := openState(l.Dir, c.Root)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", l.ID, err)
	}
	st.rec, st.keep, st.machine = *l.rec, c.Keep, c.MachineID
	align := l.align()
	ctx, cancel := context.WithTimeout(context.Background(), c.StorageTimeout)
	defer cancel()
	claimed := make([]*storage, len(l.rec.Storage))
	errs := make([]error, len(claimed))
	var wait sync.WaitGroup
	for n, r := range l.rec.Storage {
		if r.Stage == storageUsed {
			wait.Add(1)
			go func() {
				defer wait.Done()
				claimed[n], errs[n] = st.reclaim(ctx, n, align)
			}()
		}
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, s := range claimed {
			if s != nil {
				s.close()
			}
		}
		return fmt.Errorf("snapshot %s: %w", l.ID, err)
	}
	st.pins.forget()
	l.state, l.claimed = st, claimed
	return nil
}

// release lets go of what Claim and a Reopen in vain have.
func (l *Left) release() {
	for _, s := range l.claimed {
		if s != nil {
			s.close()
		}
	}
	if l.state != nil {
		l.state.release()
	}
	l.claimed, l.state = nil, nil
}

// Again makes a snapshot of one that is Created: nothing was copied for it, so it
// begins in fresh memory, with its devices and its storage. filters are those of
// its devices. The ID and the sizes in c come from the record. After an error Clear
// is what is left.
func (l *Left) Again(c Config, filters []*filter.Filter) (*Snapshot, error) {
	fail := func(err error) (*Snapshot, error) { return nil, fmt.Errorf("snapshot %s: %w", l.ID, err) }
	if err := l.check(Created, len(filters)); err != nil {
		return fail(err)
	}
	if err := l.Claim(c); err != nil {
		return nil, err
	}
	c = l.config(c)
	l.state.format()
	s, err := beginSnapshot(c, l.state)
	if err != nil {
		l.release()
		return fail(err)
	}
	claimed := l.claimed
	l.state, l.claimed, l.failed = nil, nil, s // which gives back what follows
	s.use(kept(claimed))
	for i, f := range filters {
		if err := s.add(f, l.Devices[i]); err != nil {
			return fail(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.StorageTimeout)
	defer cancel()
	for _, st := range s.storage {
		if _, err := s.give(ctx, st); err != nil {
			return fail(err)
		}
	}
	l.failed = nil
	s.clearUnfinished()
	return s, nil
}

func kept(claimed []*storage) (kept []*storage) {
	for _, s := range claimed {
		if s != nil {
			kept = append(kept, s)
		}
	}
	return kept
}

// Reopen takes over a snapshot that is Taken, from its memory and its storage.
// filters are those of its devices, and their queues have not begun to serve. The
// ID and the sizes in c come from the record. Nothing of the dead daemon is under
// way any more, on storage (see Claim), on the disks and on the images; only the
// caller can know the last two. After an error the filters are what they were, and
// Clear is what is left.
//
// If the snapshot is broken, c.OnEvent is told so, unless Told says that it was.
func (l *Left) Reopen(c Config, filters []*filter.Filter) (*Snapshot, error) {
	fail := func(err error) (*Snapshot, error) {
		l.release()
		return nil, fmt.Errorf("snapshot %s: %w", l.ID, err)
	}
	if err := l.check(Taken, len(filters)); err != nil {
		return fail(err)
	}
	if err := l.Claim(c); err != nil {
		return nil, err
	}
	c = l.config(c)
	st := l.state
	log, err := st.logConfig(st.reopen, c.ChunkSize, c.PoolSize)
	if err != nil {
		return fail(err)
	}
	if c.Encrypt && l.Broken == 0 {
		if log.Seal, err = st.reopenSeal(); err != nil {
			return fail(err)
		}
	}
	log.Portion, log.OnEvent, log.Stores = c.Portion, c.OnEvent, c.Stores
	page, f, err := st.reopen(takeName, TakeSize(len(filters)), true)
	if err != nil {
		return fail(err)
	}
	f.Close()
	st.page = TakePage{page}
	var members []snapimage.Member
	for i, d := range l.rec.Devices {
		n := diffarea.TableSize(diffarea.Chunks(d.Size, c.ChunkSize))
		words, f, err := st.reopen(wordsName(i), n, n <= smallTable)
		if err != nil {
			return fail(err)
		}
		defer f.Close()
		members = append(members, snapimage.Member{
			Filter: filters[i], Device: d.Number, Size: d.Size, Words: words, Data: dataOf(f, n), Take: l.take[i],
		})
	}
	sources := make([]diffarea.Storage, len(l.claimed))
	for n, s := range l.claimed {
		if s != nil {
			sources[n] = s.engine()
		}
	}
	engine, err := snapimage.Reopen(snapimage.Config{ID: c.ID, Log: log, Memory: st.memory}, c.Control, members, sources)
	if err != nil {
		l.release()
		return nil, err
	}
	s := &Snapshot{cfg: c, engine: engine, log: engine.Log(), state: st, storage: kept(l.claimed), filters: filters, align: l.align()}
	s.setTaken()
	l.state, l.claimed = nil, nil
	s.tellBroken()
	s.clearUnfinished()
	deathpoint.Point()
	return s, nil
}

// dataOf are the stretches of a file of n bytes that have data.
func dataOf(f *os.File, n int64) func(yield func(from, to int64)) {
	return func(yield func(from, to int64)) {
		for at := int64(0); at < n; {
			from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return // the rest is a hole
			}
			to := n
			if err == nil {
				to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
			}
			if err != nil {
				yield(at, n) // cannot tell: all of it may be
				return
			}
			yield(from, min(to, n))
			at = to
		}
	}
}

// tellBroken tells the owner of a break that happened in the last process, if it
// does not know.
func (s *Snapshot) tellBroken() {
	errno := s.log.Err()
	if errno == 0 || s.state.page.BreakReported() || s.cfg.OnEvent == nil {
		return
	}
	s.post(func() {
		if errno == unix.ENOSPC {
			s.cfg.OnEvent(diffarea.Event{Kind: diffarea.NoSpace})
		}
		s.cfg.OnEvent(diffarea.Event{Kind: diffarea.Corrupted, Errno: errno})
	})
}

// clearUnfinished gives back, beside the caller, the storages that the dead daemon
// was making or giving back.
func (s *Snapshot) clearUnfinished() {
	for n, r := range s.state.recorded().Storage {
		if r.Stage == storageMaking || r.Stage == storageLeaving {
			s.giveBack(r.Path, func() error { return s.state.clear(n, s.cfg.StorageTimeout) })
		}
	}
}
