package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strings"
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
	// recent are the latest events of all snapshots, for watchers of everything, and for
	// those who ask for a snapshot that has ended.
	recent []control.Event
	names  map[string]string // of the snapshots that have one, by UUID
	// waited are the lastWaited of snapshots that have ended and are in recent.
	waited map[string]uint64

	// A daemon tells things while it starts, when nobody can watch it yet: the events
	// after the number before, up to answers. It is starting until it answers.
	before, answers uint64
	starting        bool
}

type snapshotEvents struct {
	events     []control.Event
	lastWaited uint64 // seq of the last event that WaitEvent returned
	gone       bool   // destroyed: no more events will come
}

// lost says whether a loss of power, or a restart, has ended the snapshot.
func (s *snapshotEvents) lost() bool {
	return slices.ContainsFunc(s.events, func(e control.Event) bool { return e.Kind == control.EventLost })
}

func newEventLog() *eventLog {
	return &eventLog{snapshots: map[string]*snapshotEvents{}, more: make(chan struct{}), waited: map[string]uint64{}, names: map[string]string{}}
}

// name has the events of a snapshot say its name from now on.
func (l *eventLog) name(id, name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if name != "" {
		l.names[id] = name
	}
}

// called are the snapshots with that beginning of a UUID that have events; or the latest one
// that had that name.
func (l *eventLog) called(ref string) (ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range slices.Backward(l.recent) {
		switch {
		case e.Name == ref:
			return []string{e.Snapshot}
		case looksLikeUUID(ref) && strings.HasPrefix(e.Snapshot, strings.ToLower(ref)) && !slices.Contains(ids, e.Snapshot):
			ids = append(ids, e.Snapshot)
		}
	}
	return ids
}

// savedEvents is an eventLog in its file.
type savedEvents struct {
	Seq       uint64                     `json:"seq"`
	Snapshots map[string]savedOfSnapshot `json:"snapshots"`
	Recent    []control.Event            `json:"recent"`
	Waited    map[string]uint64          `json:"waited,omitempty"`
	// Before is there while a daemon starts: if that dies, what it has told belongs to
	// the start of the next one.
	Before *uint64 `json:"before,omitempty"`
}

type savedOfSnapshot struct {
	Events     []control.Event `json:"events"`
	LastWaited uint64          `json:"last_waited"`
}

const (
	eventsName   = "events.json"
	eventsKind   = "events" // of the statefile
	eventsFormat = 1
)

// openEventLog reads the events of a dead daemon at path, if there are any, and keeps
// those to come there. With an error it begins anew. The daemon is starting then.
//
// A log that begins anew counts from the time, in microseconds. So its numbers are above
// those of the logs before, and a number that somebody has kept holds over a restart of
// the machine.
func openEventLog(path string, fail func(error)) (*eventLog, error) {
	l := newEventLog()
	l.path, l.fail = path, fail
	l.seq = uint64(time.Now().UnixMicro())
	l.before, l.starting = l.seq, true
	text, _, err := statefile.Read(path, eventsKind, eventsFormat)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	var saved savedEvents
	if err == nil {
		// A program that does not know a field here goes on without it.
		err = json.Unmarshal(text, &saved)
	}
	if err != nil {
		return l, err
	}
	l.seq, l.recent = saved.Seq, saved.Recent
	for id, s := range saved.Snapshots {
		l.snapshots[id] = &snapshotEvents{events: s.Events, lastWaited: s.LastWaited}
	}
	maps.Copy(l.waited, saved.Waited)
	l.before = l.seq
	if saved.Before != nil {
		l.before = *saved.Before
	}
	return l, nil
}

// answer ends the start: from now on there may be watchers.
func (l *eventLog) answer() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers, l.starting = l.seq, false
	if l.before < l.seq {
		l.saveLocked()
	}
}

// last is the number of the latest event.
func (l *eventLog) last() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// saveLocked writes the file.
func (l *eventLog) saveLocked() {
	if l.path == "" {
		return
	}
	saved := savedEvents{Seq: l.seq, Snapshots: map[string]savedOfSnapshot{}, Recent: l.recent, Waited: l.waited}
	if l.starting {
		saved.Before = &l.before
	}
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

// ids are the snapshots that are not destroyed, all but the lost ones.
func (l *eventLog) ids() []string { return l.idsOf(false) }

// lostIDs are the lost snapshots of which something may be left.
func (l *eventLog) lostIDs() []string { return l.idsOf(true) }

func (l *eventLog) idsOf(lost bool) (ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, s := range l.snapshots {
		if s.lost() == lost {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
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
	e.Name = l.names[e.Snapshot]
	l.addLocked(&e)
	s.events = latest(append(s.events, e))
	if e.Kind == control.EventDestroyed {
		delete(l.names, e.Snapshot)
		// Watchers still hold s. Who comes now finds what is recent.
		s.gone = true
		delete(l.snapshots, e.Snapshot)
		if s.lastWaited > 0 {
			l.waited[e.Snapshot] = s.lastWaited
		}
	}
	l.tellLocked()
}

// notice adds an event that belongs to no snapshot.
func (l *eventLog) notice(e control.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addLocked(&e)
	l.tellLocked()
}

// addLocked numbers an event, and adds it to the recent ones.
func (l *eventLog) addLocked(e *control.Event) {
	l.seq++
	e.Seq, e.Time = l.seq, time.Now()
	oldest := ""
	if len(l.recent) >= maxEvents {
		oldest = l.recent[0].Snapshot
	}
	l.recent = latest(append(l.recent, *e))
	if _, ok := l.waited[oldest]; ok && len(ofSnapshot(l.recent, oldest)) == 0 {
		delete(l.waited, oldest)
	}
}

// tellLocked keeps what was added, and wakes those who wait for it.
func (l *eventLog) tellLocked() {
	l.saveLocked()
	close(l.more)
	l.more = make(chan struct{})
}

func ofSnapshot(events []control.Event, id string) (of []control.Event) {
	for _, e := range events {
		if e.Snapshot == id {
			of = append(of, e)
		}
	}
	return of
}

// ofLocked are the events of a snapshot; of one that has ended those that are still
// recent. It is nil if there are none.
func (l *eventLog) ofLocked(id string) *snapshotEvents {
	if s := l.snapshots[id]; s != nil || id == "" {
		return s
	}
	s := &snapshotEvents{events: ofSnapshot(l.recent, id), lastWaited: l.waited[id], gone: true}
	if len(s.events) == 0 {
		return nil
	}
	return s
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
	for {
		e, more, err := l.takeNext(r.ID)
		if more == nil {
			return e, err
		}
		select {
		case <-more:
		case <-ctx.Done():
			return control.Event{}, fail(context.Cause(ctx), "wait for an event of snapshot %s", r.ID)
		}
	}
}

// takeNext is the next event of a snapshot that no waiter has had, or an error if none
// will come; or more, if it has to be waited for.
func (l *eventLog) takeNext(id string) (_ control.Event, more chan struct{}, _ error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.ofLocked(id)
	if s == nil {
		return control.Event{}, nil, noSnapshot(id)
	}
	for _, e := range s.events {
		if e.Seq > s.lastWaited && forWaiters(e.Kind) {
			s.lastWaited = e.Seq
			if s.gone {
				l.waited[id] = e.Seq
			}
			l.saveLocked()
			return e, nil, nil
		}
	}
	if s.gone || s.lost() {
		return control.Event{}, nil, noSnapshot(id)
	}
	return control.Event{}, l.more, nil
}

func forWaiters(kind string) bool {
	switch kind {
	case control.EventLowFreeSpace, control.EventNoSpace, control.EventCorrupted, control.EventLost:
		return true
	}
	return false
}

// watch implements control.API.Watch.
func (l *eventLog) watch(ctx context.Context, r control.WatchRequest, each func(control.Event) error) error {
	l.mu.Lock()
	s := l.ofLocked(r.ID)
	seen := r.Since
	var fresh []control.Event
	switch {
	case r.ID != "" && s == nil:
		l.mu.Unlock()
		return noSnapshot(r.ID)
	case seen > l.seq: // of no log that this one follows
		seen = 0
	case r.ID == "" && seen == 0:
		end := l.answers
		if l.starting {
			end = l.seq
		}
		fresh, seen = between(l.recent, l.before, end), l.seq
	}
	l.mu.Unlock()
	for {
		for _, e := range fresh {
			if err := each(e); err != nil {
				return err
			}
		}
		l.mu.Lock()
		from, more, gone, now := l.recent, l.more, false, l.seq
		if s != nil {
			from, gone = s.events, s.gone
		}
		fresh, seen = between(from, seen, now), now
		l.mu.Unlock()
		if len(fresh) > 0 {
			continue
		}
		if gone {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fail(context.Cause(ctx), "watch")
		}
	}
}

// between are the events after one number, up to another.
func between(events []control.Event, after, last uint64) (out []control.Event) {
	for _, e := range events {
		if e.Seq > after && e.Seq <= last {
			out = append(out, e)
		}
	}
	return out
}
