package daemon

import (
	"encoding/json"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// snapshotNote is what the daemon keeps with a snapshot on record.
type snapshotNote struct {
	Name   string            `json:"name,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	// AutoAppend: it gets more storage by itself.
	AutoAppend *control.AutoAppend `json:"auto_append,omitempty"`

	// Began is when it was created, by a clock that nobody sets. Those of an older program
	// do not say it.
	Began bootTime `json:"began_ns,omitempty"`
	Ends  bootTime `json:"ends_ns,omitempty"` // 0: never by itself
	// Overdue: it was told that the time is over and somebody uses it.
	Overdue bool          `json:"overdue,omitempty"`
	Taken   time.Time     `json:"taken,omitzero"`
	Frozen  time.Duration `json:"frozen_ns,omitempty"`
}

// changeNote changes the note, on record first; needs opLock.
func (d *Daemon) changeNote(s *snapshot, change func(*snapshotNote)) error {
	next := s.note
	change(&next)
	text, err := json.Marshal(next)
	if err == nil {
		err = s.snap.SetNote(text)
	}
	if err == nil {
		d.mu.Lock()
		s.note = next
		d.mu.Unlock()
	}
	return err
}
