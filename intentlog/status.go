package intentlog

// State is what a log does.
type State uint8

// The states.
//
//	Off ── Start ──> On ── an error ──> Failed
//	 ^                │                   │
//	 └──── GiveUp ────┴───────────────────┘
const (
	Off    State = iota // all writes pass
	On                  // writes wait for their entries
	Failed              // writes that have no entry wait for GiveUp
)

func (s State) String() string {
	switch s {
	case Off:
		return "off"
	case On:
		return "on"
	case Failed:
		return "failed"
	}
	return "unknown"
}

// Idle says whether the memory of a log that is off, its file and the original disk are not
// in use any more.
func (l *Log) Idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state == Off && !l.writing && l.flushes == 0
}

// Waiting says whether anybody waits for the log, and how many writes of it have
// ended. When the one stays true and the other what it is, the log does not answer, and
// nobody but its owner can tell when that is too long.
func (l *Log) Waiting() (waits bool, ended uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waiting.head != nil || l.batch.head != nil || len(l.next) > 0 || len(l.batched) > 0, l.ended
}

// State is what it does now.
func (l *Log) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// Status is what a person may want to know of a log.
type Status struct {
	State State
	Err   error // why it failed
	Zones int64
	Zone  int64 // size of one, bytes
	// Logged is how many zones would count, as a whole, as changed since the last take if
	// the power failed now.
	Logged int64
}

// Status is what it is now.
func (l *Log) Status() Status {
	l.mu.Lock()
	s := Status{State: l.state, Err: l.err, Zones: int64(len(l.durable)), Zone: 1 << l.c.ZoneShift}
	mark, base := l.info.ChangesNumber+1, l.base
	l.mu.Unlock()
	for z := range l.durable {
		if e := stamp(l.durable[z].Load()); e.epoch() > base || e.epoch() == base && e.mark() >= mark {
			s.Logged++
		}
	}
	return s
}
