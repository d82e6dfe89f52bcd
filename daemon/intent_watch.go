package daemon

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
)

// intentWatch sees whether the write-intent logs of all devices answer, because a log knows
// no time. It does so for all of them at a time, and nothing while there is none.
type intentWatch struct {
	mu   sync.Mutex
	all  map[*intent]struct{}
	runs bool
}

const (
	// watchInterval is how often it is looked whether a log answers.
	watchInterval = 500 * time.Millisecond
	// lookInterval is how often the superblocks of a disk that is written to are looked at.
	lookInterval = 2 * time.Second
)

func (w *intentWatch) add(in *intent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all == nil {
		w.all = map[*intent]struct{}{}
	}
	w.all[in] = struct{}{}
	if !w.runs {
		w.runs = true
		go w.run()
	}
}

func (w *intentWatch) remove(in *intent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.all, in)
}

// run ends when there is no log any more.
func (w *intentWatch) run() {
	for {
		time.Sleep(watchInterval)
		w.mu.Lock()
		all := slices.Collect(maps.Keys(w.all))
		w.runs = len(all) > 0
		w.mu.Unlock()
		if len(all) == 0 {
			return
		}
		for _, in := range all {
			in.see()
		}
	}
}

// see is one look at a log. It never waits.
func (in *intent) see() {
	if still := in.stalled.look(in.log.Waiting()); still > int(in.d.opts.Config.DiskTimeout/2/watchInterval) {
		in.fail(in.d.stateHangs())
		in.stalled = stall{}
	}
	// A log that is off may be begun anew, or its record is still to be taken back.
	if time.Since(in.lastDue) >= lookInterval && (in.log.State() == intentlog.Off || in.writes() != in.looked.Load()) {
		in.lastDue = time.Now()
		nudge(in.due)
	}
}

// nudge sends something to whoever has not had it yet.
func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
