package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// maxEvents is how many events of one snapshot are kept; older ones are dropped.
const maxEvents = 1024

// eventLog keeps what happened to each snapshot for those who ask later, also of the
// next daemon.
type eventLog struct {
	path string          // of its file; empty: none
	fail func(err error) // told that the file could not be written

	mu        sync.Mutex
	seq       uint64
	snapshots map[string]*snapshotEvents
	// more is closed and replaced with every event.
	more chan struct{}
	// recent are the latest events of all snapshots, for watchers of everything.
	recent []control.Event
}

type snapshotEvents struct {
	events     []control.Event
	lastWaited uint64 // seq of the last event that WaitEvent returned
	gone       bool   // destroyed: no more events will come
}

func newEventLog() *eventLog {
	return &eventLog{snapshots: map[string]*snapshotEvents{}, more: make(chan struct{})}
}

// savedEvents is an eventLog in its file.
type savedEvents struct {
	Seq       uint64                     `json:"seq"`
	Snapshots map[string]savedOfSnapshot `json:"snapshots"`
	Recent    []control.Event            `json:"recent"`
}

type savedOfSnapshot struct {
	Events     []control.Event `json:"events"`
	LastWaited uint64          `json:"last_waited"`
}

const (
	eventsKind   = "events" // of the statefile
	eventsFormat = 1
)

// openEventLog reads the events of a dead daemon at path, if there are any, and keeps
// those to come there. With an error it begins anew.
func openEventLog(path string, fail func(error)) (*eventLog, error) {
	l := newEventLog()
	l.path, l.fail = path, fail
	text, _, err := statefile.Read(path, eventsKind, eventsFormat)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	var saved savedEvents
	if err == nil {
		err = json.Unmarshal(text, &saved)
	}
	if err != nil {
		return l, err
	}
	l.seq, l.recent = saved.Seq, saved.Recent
	for id, s := range saved.Snapshots {
		l.snapshots[id] = &snapshotEvents{events: s.Events, lastWaited: s.LastWaited}
	}
	return l, nil
}

// saveLocked writes the file.
func (l *eventLog) saveLocked() {
	if l.path == "" {
		return
	}
	saved := savedEvents{Seq: l.seq, Snapshots: map[string]savedOfSnapshot{}, Recent: l.recent}
	for id, s := range l.snapshots {
		saved.Snapshots[id] = savedOfSnapshot{s.events, s.lastWaited}
	}
	if err := statefile.Write(l.path, eventsKind, eventsFormat, saved); err != nil {
		l.fail(err)
	}
}

// has says whether a snapshot has had an event of that kind.
func (l *eventLog) has(id, kind string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.snapshots[id]
	return s != nil && slices.ContainsFunc(s.events, func(e control.Event) bool { return e.Kind == kind })
}

// ids are the snapshots that are not destroyed.
func (l *eventLog) ids() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.snapshots))
}

// emit adds an event of a snapshot. It takes a lock for a moment, and no other.
func (l *eventLog) emit(e control.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.snapshots[e.Snapshot]
	if s == nil {
		s = &snapshotEvents{}
		l.snapshots[e.Snapshot] = s
	}
	l.seq++
	e.Seq, e.Time = l.seq, time.Now()
	s.events = latest(append(s.events, e))
	l.recent = latest(append(l.recent, e))
	if e.Kind == control.EventDestroyed {
		// Watchers still hold s, but nobody new shall find it.
		s.gone = true
		delete(l.snapshots, e.Snapshot)
	}
	l.saveLocked()
	close(l.more)
	l.more = make(chan struct{})
}

// notice adds an event that belongs to no snapshot.
func (l *eventLog) notice(e control.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	e.Seq, e.Time = l.seq, time.Now()
	l.recent = latest(append(l.recent, e))
	l.saveLocked()
	close(l.more)
	l.more = make(chan struct{})
}

func latest(e []control.Event) []control.Event {
	if len(e) > maxEvents {
		e = append(e[:0], e[len(e)-maxEvents:]...)
	}
	return e
}

func noSnapshot(id string) *control.Error {
	return &control.Error{Code: control.NotFound, Errno: unix.ESRCH, Message: "snapshot " + id + ": no such snapshot"}
}

// wait implements control.API.WaitEvent. It leaves out creation, take and
// destruction, because callers have done these themselves. Only watchers get them.
func (l *eventLog) wait(ctx context.Context, r control.WaitRequest) (control.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	l.mu.Lock()
	s := l.snapshots[r.ID]
	l.mu.Unlock()
	if s == nil {
		return control.Event{}, noSnapshot(r.ID)
	}
	for {
		l.mu.Lock()
		more, gone := l.more, s.gone
		for _, e := range s.events {
			if e.Seq > s.lastWaited && forWaiters(e.Kind) {
				s.lastWaited = e.Seq
				l.saveLocked()
				l.mu.Unlock()
				return e, nil
			}
		}
		l.mu.Unlock()
		if gone {
			return control.Event{}, noSnapshot(r.ID)
		}
		select {
		case <-more:
		case <-ctx.Done():
			return control.Event{}, fail(ctx.Err(), "wait for an event of snapshot %s", r.ID)
		}
	}
}

func forWaiters(kind string) bool {
	return kind == control.EventLowFreeSpace || kind == control.EventNoSpace || kind == control.EventCorrupted
}

// watch implements control.API.Watch.
func (l *eventLog) watch(ctx context.Context, id string, each func(control.Event) error) error {
	l.mu.Lock()
	s := l.snapshots[id]
	seen := uint64(0)
	if id == "" {
		seen = l.seq
	}
	l.mu.Unlock()
	if id != "" && s == nil {
		return noSnapshot(id)
	}
	for {
		var fresh []control.Event
		l.mu.Lock()
		from, more, gone := l.recent, l.more, false
		if s != nil {
			from, gone = s.events, s.gone
		}
		for _, e := range from {
			if e.Seq > seen {
				fresh = append(fresh, e)
			}
		}
		l.mu.Unlock()
		for _, e := range fresh {
			if err := each(e); err != nil {
				return err
			}
			seen = e.Seq
		}
		if gone {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fail(ctx.Err(), "watch")
		}
	}
}
