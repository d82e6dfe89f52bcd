package control

import (
	"fmt"
	"strings"
)

// Lost is what a daemon that died had, while no other has taken it over; and from then
// on what that one could not take over.
type Lost struct {
	PID       int            `json:"pid"`
	Devices   []LostDevice   `json:"devices"`
	Snapshots []LostSnapshot `json:"snapshots"`
}

// LostDevice is a filter without a server.
type LostDevice struct {
	Name     string `json:"name"`
	Original string `json:"original"`
	Path     string `json:"path"` // of the ublk device
	// Waits: its I/O waits to be taken over, or until it is removed by force.
	Waits bool `json:"waits,omitempty"`
	// Reason is why it could not be taken over; empty if no daemon has tried.
	Reason string `json:"reason,omitempty"`
}

// LostSnapshot is a snapshot without a server.
type LostSnapshot struct {
	ID      string   `json:"id"`
	Name    string   `json:"name,omitempty"` // if it is known and has one
	Devices []string `json:"devices"`        // names; none if its record cannot be trusted
	Storage []string `json:"storage"`        // paths
	// Reason is why it has ended; empty if no daemon has tried to take it over.
	Reason string `json:"reason,omitempty"`
}

// String says it in one line.
func (l *Lost) String() string {
	var waiting, ended []string
	add := func(what, reason string) {
		if reason == "" {
			waiting = append(waiting, what)
		} else {
			ended = append(ended, what+": "+reason)
		}
	}
	for _, dev := range l.Devices {
		what := "the filter " + dev.Name
		if dev.Original != "" {
			what += fmt.Sprintf(" over %s (%s)", dev.Original, dev.Path)
		}
		if dev.Waits && dev.Reason != "" {
			what += ", whose I/O waits"
		}
		add(what, dev.Reason)
	}
	for _, s := range l.Snapshots {
		what := "the snapshot " + s.ID
		if s.Name != "" {
			what += " (" + s.Name + ")"
		}
		if len(s.Devices) > 0 {
			what += " of " + strings.Join(s.Devices, " ")
		}
		if len(s.Storage) > 0 {
			what += " with differences in " + strings.Join(s.Storage, " ")
		}
		add(what, s.Reason)
	}
	said := fmt.Sprintf("the daemon before (process %d) died", l.PID)
	if l.PID == 0 {
		said = "before this daemon there was another boot, or none"
	}
	if len(waiting) > 0 {
		said += ", and for the next one wait " + strings.Join(waiting, ", ")
	}
	if len(ended) > 0 {
		said += "; not taken over: " + strings.Join(ended, "; ")
	}
	return said
}
