package snapshots

import (
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
)

// Stage is how far a snapshot had come when its daemon died.
//
//	Created <──> Taking ──> Taken ──> Destroying
//	   └───────────────────────────────^
type Stage int

// The stages.
const (
	// Created: it has the devices and storage that were added. Left.Again goes on with it.
	Created Stage = iota + 1
	// Taking: a take had begun, and was not made. After Left.Void it is Created.
	Taking
	// Taken: its images exist. Left.Reopen goes on with it.
	Taken
	// Destroying: its end had begun. Left.Clear completes it.
	Destroying
)

func (s Stage) String() string {
	switch s {
	case Created:
		return "created"
	case Taking:
		return "taking"
	case Taken:
		return "taken"
	case Destroying:
		return "destroying"
	}
	return "unknown"
}

// Ends says whether a snapshot that a dead daemon left shall end, whatever else there is of
// it. pending: nobody has been told of it.
func (s Stage) Ends(pending bool) bool { return pending || s == Destroying }

// Past is what the files of a snapshot tell of it.
type Past struct {
	Stage  Stage
	Before []cbtmap.Info // of each device, if a take had begun
	Take   []cbtmap.Info // of each device, if it was taken
	Broken unix.Errno    // what broke it, 0 while whole
}

// PastOf is that of a snapshot of so many devices. destroying is on record; page is the
// take's and log the log's state, each nil if it is not there or cannot be read. It says
// in words if the page is damaged.
func PastOf(destroying bool, devices int, page, log []byte) (p Past, wrong string) {
	p.Stage = Created
	if destroying {
		p.Stage = Destroying
		return p, ""
	}
	if page == nil {
		return p, ""
	}
	if p.Before, p.Take, wrong = NewTakePage(page).read(devices); wrong != "" {
		return p, wrong
	}
	if p.Stage = Taking; p.Take == nil {
		return p, ""
	}
	p.Stage = Taken
	if log == nil {
		return p, ""
	}
	if p.Broken = diffarea.Dead(log); p.Broken == unix.ESHUTDOWN {
		p.Stage = Destroying // it was given up, and there was no time to say so
	}
	return p, ""
}
