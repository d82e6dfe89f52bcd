package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// look looks after the log until ctx ends.
func (in *intent) look(ctx context.Context) {
	defer close(in.done)
	defer in.d.watch.remove(in)
	working := make(chan struct{})
	go func() {
		defer close(working)
		in.work(ctx)
	}()
	defer func() { <-working }()
	for {
		select {
		case <-ctx.Done():
			return
		case err := <-in.failed:
			in.giveUp(ctx, err, in.d.opts.Config.DiskTimeout/2)
		}
	}
}

// giveUp makes what is kept of the disk unbelievable, and only then lets the writes go
// that wait for the log; or after a limit, because they must not wait for ever.
func (in *intent) giveUp(ctx context.Context, why error, limit time.Duration) {
	in.uncovered(why)
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := in.stopRecord(limited)
	for err != nil && limited.Err() == nil {
		select {
		case <-limited.Done():
		case <-time.After(stopAgain):
			err = in.stopRecord(limited)
		}
	}
	if err != nil && ctx.Err() == nil {
		in.uncovered(fmt.Errorf("%w; what is kept cannot be taken back yet, and would be believed: %w", why, err))
		in.d.opts.Log.Error("writes go on although the write-intent log cannot be taken back: if the power fails before it can, changes are missed",
			"name", in.name, "error", err)
	} else if err == nil {
		in.uncovered(why) // a look at the superblocks may have said otherwise meanwhile
	}
	in.log.GiveUp()
}

// stopRecord takes the record back that counts.
func (in *intent) stopRecord(ctx context.Context) error {
	return in.d.callState(ctx, func() error {
		in.state.Lock()
		defer in.state.Unlock()
		if err := ctx.Err(); err != nil { // there may be another record by now
			return err
		}
		return in.stopLocked()
	})
}

func (in *intent) stopLocked() error {
	in.record = cbtstate.Record{}
	err := in.d.stopState(in.dev, in.identity)
	in.mu.Lock()
	in.stopped = err == nil
	in.mu.Unlock()
	return err
}

// stopState takes back what is kept of a disk that has a filter.
func (d *Daemon) stopState(dev *device, id disk.Identity) error {
	return d.takeBack(dev, id, func(s *cbtstate.Store) error { return s.Stop(id) })
}

// takeBack has do take back what is kept of a disk in the state directory, and no other log
// rely on it.
func (d *Daemon) takeBack(dev *device, id disk.Identity, do func(*cbtstate.Store) error) error {
	store, err := d.openState(dev, false)
	err = ifKept(store, err, func() error { return do(store) })
	d.giveUpSame(dev, id)
	return err
}

// giveUpSame has the logs of other devices given up that count under the same identity, because
// what counts under it is being taken back. The other disk may be a clone, or the same one,
// plugged in again while the filter of before is still there. dev may be nil.
func (d *Daemon) giveUpSame(dev *device, id disk.Identity) {
	for _, other := range d.sortedDevices() {
		d.mu.Lock()
		in := other.intent
		d.mu.Unlock()
		if other != dev && in != nil && slices.Equal(in.identity, id) && in.counts() {
			in.fail(errors.New("the record of its log was taken back, because another filter is or was over a disk that says the same of itself"))
		}
	}
}

// counts says whether a power failure would not cost the history.
func (in *intent) counts() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.reason == "" && !in.gone
}

// work keeps what is in the state directory up to date until ctx ends. It may hang.
func (in *intent) work(ctx context.Context) {
	wait, next := beginAgain, time.Now().Add(beginAgain)
	for {
		newBase := false
		select {
		case <-ctx.Done():
			return
		case <-in.wake:
			newBase = true
		case <-in.due:
		}
		state := in.log.State()
		if state == intentlog.Off && in.believed() {
			_ = in.stopRecord(ctx)
		}
		switch {
		case state == intentlog.Off && (newBase || time.Now().After(next)):
			if in.beginAgain(ctx) == nil {
				wait = beginAgain
			}
			next = time.Now().Add(wait)
			wait = min(2*wait, beginAgainLimit)
			continue
		case state != intentlog.On:
			continue
		}
		if now := in.writes(); now != in.looked.Load() || newBase {
			if err := in.lookAgain(ctx); err != nil {
				in.uncovered(err)
			} else {
				in.looked.Store(now)
			}
		}
		if newBase {
			if err := in.newBase(); err != nil {
				in.d.opts.Log.Warn("the base of the write-intent log stays an older one: after a power failure more counts as changed", "name", in.name, "error", err)
			}
		}
	}
}

// believed says whether a record may still count, when the log is off.
func (in *intent) believed() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.reason != "" && !in.stopped
}

// writes is how many requests have changed the disk.
func (in *intent) writes() (n uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.gone {
		return 0
	}
	for i := range in.counters {
		for _, op := range []ublk.Op{ublk.OpWrite, ublk.OpDiscard, ublk.OpWriteZeroes} {
			n += in.counters[i].Requests[op].Load()
		}
	}
	return n
}

// beginAgain begins a log anew that has failed.
func (in *intent) beginAgain(ctx context.Context) error {
	end, err := in.d.begin(ctx, "begin the write-intent log of %s", in.name)
	if err != nil {
		return err
	}
	defer end()
	limited, cancel := context.WithTimeout(ctx, in.d.opts.Config.DiskTimeout/2)
	defer cancel()
	if _, err = in.d.host.Identify(in.dev.disk); err != nil { // another disk looks the same by now
		in.uncovered(err)
		return err
	}
	if err = in.tryBegin(limited); err == nil {
		// What may be left from before is not to be used up any more.
		in.d.usedUp(in.d.here(in.identity))
		return nil
	}
	in.uncovered(err)
	return err
}

// lookAgain looks whether the superblocks have changed, and puts that on record.
func (in *intent) lookAgain(ctx context.Context) error {
	in.state.Lock()
	known := in.record.Fingerprint
	in.state.Unlock()
	now, err := in.superblocks(ctx, known)
	if err != nil {
		return err
	}
	in.state.Lock()
	defer in.state.Unlock()
	if in.ended || in.record.ID == uuid.Nil {
		return nil
	}
	if !slices.Equal(now, in.record.Fingerprint) {
		store, err := in.d.openState(in.dev, false)
		if err != nil {
			return err
		}
		defer store.Close()
		r := in.record
		r.Fingerprint = now
		if err := store.Run(r); err != nil {
			return err
		}
		in.record = r
	}
	in.covered()
	return nil
}

// newBase makes a new base, so that what was written before it is known exactly.
func (in *intent) newBase() error {
	in.state.Lock()
	defer in.state.Unlock()
	if in.ended || in.record.ID == uuid.Nil {
		return intentlog.ErrOff
	}
	base, err := in.base()
	if err != nil {
		return err
	}
	store, err := in.d.openState(in.dev, false)
	if err != nil {
		return err
	}
	defer store.Close()
	if err := store.WriteBase(in.identity, in.record.ID, base); err != nil {
		return err
	}
	return in.log.Committed(base)
}

// taken makes a take durable, before anybody is told of it.
func (in *intent) taken(info cbtmap.Info) {
	ctx := context.Background()
	done := make(chan error, 1)
	in.log.Taken(info, func(err error) { done <- err })
	limited, cancel := context.WithTimeout(ctx, in.d.opts.Config.DiskTimeout)
	defer cancel()
	var err error
	select {
	case err = <-done:
	case <-limited.Done():
		err = fmt.Errorf("%s or %s does not answer", in.dev.disk.DisplayPath(), in.d.opts.Config.StateDir)
	}
	if errors.Is(err, intentlog.ErrGeneration) {
		err = in.d.callState(limited, in.newBase)
	}
	if err != nil && !errors.Is(err, intentlog.ErrOff) {
		in.giveUp(ctx, fmt.Errorf("a take could not be made durable: %w", err), in.d.opts.Config.DiskTimeout/2)
	}
	nudge(in.wake)
}

// hold waits until the log has ranges that have been marked.
func (in *intent) hold(ranges []cbtmap.Sectors) {
	for _, r := range ranges {
		var w intentlog.Wait
		done := make(chan struct{})
		w.Init(in.d.logs, func() { close(done) })
		if in.log.Hold(&w, int64(r.First)*sector.Size, int64(r.Count)*sector.Size) {
			<-done
		}
	}
}

// covered and uncovered say whether a power failure would cost the history.
func (in *intent) covered() {
	in.mu.Lock()
	told := in.told
	in.reason, in.told, in.stopped = "", false, false
	in.mu.Unlock()
	if told {
		in.d.opts.Log.Info("change tracking would go on after a power failure again", "name", in.name)
		in.d.events.notice(control.Event{Kind: control.EventCovered, Device: in.dev.disk.Num.String()})
	}
}

func (in *intent) uncovered(why error) {
	text := publicPaths(why.Error())
	in.mu.Lock()
	again := in.told
	in.reason, in.told = text, true
	in.mu.Unlock()
	if !again {
		in.d.opts.Log.Warn("a power failure would cost the history of changes now", "name", in.name, "reason", text)
		in.d.events.notice(control.Event{Kind: control.EventUncovered, Device: in.dev.disk.Num.String(), Text: text})
	}
}
