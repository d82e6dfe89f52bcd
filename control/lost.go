package control

import (
	"fmt"
	"strings"
)

// Lost is what a daemon had that died.
type Lost struct {
	PID       int            `json:"pid"`
	Devices   []LostDevice   `json:"devices"`
	Snapshots []LostSnapshot `json:"snapshots"`
}

// LostDevice is a filter that went with its daemon.
type LostDevice struct {
	Name     string `json:"name"`
	Original string `json:"original"`
	Path     string `json:"path"` // of the ublk device
	// Waits: it was made to survive its daemon, and its I/O waits.
	Waits bool `json:"waits,omitempty"`
}

// LostSnapshot is a snapshot that went with its daemon.
type LostSnapshot struct {
	ID      string   `json:"id"`
	Devices []string `json:"devices"` // names
	Storage []string `json:"storage"` // paths
}

// String says it in one line.
func (l *Lost) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "the daemon before (process %d) died", l.PID)
	sep := ", and with it "
	for _, dev := range l.Devices {
		what := "the filter"
		if dev.Waits {
			what = "the server of the filter, whose I/O waits,"
		}
		fmt.Fprintf(&b, "%s%s %s over %s (%s)", sep, what, dev.Name, dev.Original, dev.Path)
		sep = ", "
	}
	for _, s := range l.Snapshots {
		fmt.Fprintf(&b, "%sthe snapshot %s of %s", sep, s.ID, strings.Join(s.Devices, " "))
		if len(s.Storage) > 0 {
			fmt.Fprintf(&b, " with differences in %s", strings.Join(s.Storage, " "))
		}
		sep = ", "
	}
	return b.String()
}
