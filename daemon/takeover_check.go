package daemon

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// A program that is to take over from a daemon that lives must know all that is on record. The
// number of the state directory does not tell, because the versions of its files rise by
// themselves. What this program does not know, it would leave alone: a filter would wait with
// its I/O, a snapshot would end, and all of that goes on now.
//
// So a record that a newer program has written refuses the takeover. One that cannot be read
// for another reason does so as long as the daemon has the filter or the snapshot, until that
// is removed: else it would be the reload that has it wait. But of what the daemon could not
// take over itself nothing is lost, and the next program may be the remedy.

// checkRecords says whether this program knows all that is on record. It changes nothing.
func (d RunDir) checkRecords() error {
	now, _ := d.lastRecord() // if that is not known, only what is newer is refused
	has := &Daemon{opts: Options{Dir: d}}
	for _, e := range dirEntries(has.devicesDir()) {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		_, err := has.readDeviceRecord(name)
		served := slices.ContainsFunc(now.Devices, func(l control.LostDevice) bool { return l.Name == name })
		if err := unknown(err, served, "take over the filter "+name, "or remove the filter first: ublk-blksnap remove "+name); err != nil {
			return err
		}
	}
	left, err := snapshots.LeftBehind(has.snapshotsDir())
	if err != nil {
		return fail(err, "take over")
	}
	for _, s := range left {
		id := s.ID.String()
		held := slices.ContainsFunc(now.Snapshots, func(l control.LostSnapshot) bool { return l.ID == id })
		if err := unknown(s.Err, held, "take over snapshot "+id, "or destroy it first: ublk-blksnap snapshot destroy "+id); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		path, kind string
		newest     int
	}{
		{has.frozenFile(), frozenKind, frozenFormat},
		{has.hooksFile(), hooksKind, hooksFormat},
		{has.removedFile(), removedKind, removedFormat},
		{has.outdatedFile(), outdatedKind, outdatedFormat},
		{filepath.Join(d.State(), eventsName), eventsKind, eventsFormat},
	} {
		_, _, err := statefile.Read(f.path, f.kind, f.newest)
		if err := unknown(err, false, "take over", `or end the daemon with its own "daemon stop" first`); err != nil {
			return err
		}
	}
	return nil
}

// unknown is the error of a record that was read with err, nil if that keeps nobody from
// taking over. has: the daemon has what the record is of.
func unknown(err error, has bool, what, fix string) error {
	switch {
	case errors.Is(err, statefile.ErrNewer):
		return &control.Error{Code: control.Unsupported, Message: what + ": " + err.Error(), Fix: fix}
	case err != nil && has:
		return &control.Error{Code: control.Corrupted, Message: what + ": " + err.Error(), Fix: "mend that, " + fix}
	}
	return nil
}
