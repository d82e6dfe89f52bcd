package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

// What is known of a disk's changes outlives its filter, and so the machine's
// restart: keepHistory writes it down when a filter has ended as it should,
// loadHistory believes it when the next one comes. Package cbtstate says what has to
// hold for that.

// foundHistory is what was kept of a disk.
type foundHistory struct {
	identity disk.Identity // nil if it is not known
	record   *cbtstate.Record
	saved    []byte            // the map, of a clean end
	running  *cbtmap.History   // the map, after a power failure
	refusal  *cbtstate.Refusal // nil if it is believed
	now      *cbtstate.Disk    // what the disk is like, if it is believed; may be nil
	unclean  bool              // there is a running record
	// unanswered: the disk or the state directory did not answer in time.
	unanswered bool
}

// loadHistory gives the new change map of a device the history that was kept of its
// disk, or says why not. The disk must be claimed, and nothing served yet. What was
// found is to be used up before anything is: see useHistory.
func (d *Daemon) loadHistory(ctx context.Context, dev *device, name string) foundHistory {
	found := d.askHistory(ctx, dev, name)
	if found.refusal == nil {
		var err error
		if found.running != nil {
			err = dev.cbt.Restore(*found.running)
		} else {
			err = dev.cbt.Load(found.saved)
		}
		switch {
		case errors.Is(err, cbtmap.ErrMismatch):
			found.refusal = &cbtstate.Refusal{Reason: cbtstate.OtherBlock, Text: "change tracking has another block size: " + err.Error(), Record: found.record}
		case err != nil:
			found.refusal = &cbtstate.Refusal{Reason: cbtstate.Damaged, Text: err.Error(), Record: found.record}
		}
	}
	d.tellHistory(dev, name, found)
	return found
}

// attachedNoHistory is why nothing is found of a disk that is in use.
const attachedNoHistory = "the filter came under a volume that may have been in use"

// noHistory is what is found of a disk that is in use, and so may be written to all the time
// before its filter: nothing.
func (d *Daemon) noHistory(dev *device, name string) (found foundHistory) {
	found.identity, _ = d.host.Identify(dev.disk)
	found.refusal = &cbtstate.Refusal{Reason: control.HistoryAttached, Text: attachedNoHistory}
	d.tellHistory(dev, name, found)
	return found
}

func (d *Daemon) tellHistory(dev *device, name string, found foundHistory) {
	dev.History = found.told()
	no := found.refusal
	if no == nil {
		d.opts.Log.Info("change tracking goes on", "name", name, "disk", dev.disk.DisplayPath(), "kept", found.record.Saved, "power failure", found.running != nil)
		return
	}
	if no.Reason == cbtstate.NoState {
		d.opts.Log.Info("change tracking begins", "name", name, "disk", dev.disk.DisplayPath(), "reason", no.Text)
		return
	}
	d.opts.Log.Warn("change tracking begins anew", "name", name, "disk", dev.disk.DisplayPath(), "reason", no.Text)
	d.events.notice(control.Event{Kind: control.EventNewGeneration, Device: dev.shown().Num.String(), Text: no.Text})
}

// told is what people are told of what was found.
func (f foundHistory) told() control.History {
	if no := f.refusal; no != nil {
		return control.History{Reason: no.Reason, Text: no.Text, AfterPowerFailure: f.unclean}
	}
	from := f.record.Saved.Format(time.RFC3339)
	if f.running == nil {
		return control.History{Continued: true, Text: "goes on from " + from}
	}
	return control.History{Continued: true, AfterPowerFailure: true,
		Text: "goes on after a power failure, from a filter added or taken over at " + from}
}

// useHistory sees to that what was found is not used again, believed or not: from now on
// it is out of date. If the device's log has begun, that has taken its place already.
func (d *Daemon) useHistory(ctx context.Context, dev *device, name string, found foundHistory) {
	if d.opts.Config.StateDir == "" || found.identity == nil || dev.intent != nil && dev.powerFailure().Covered {
		return
	}
	err := d.stateHangs()
	if !found.unanswered {
		ctx, cancel := context.WithTimeout(ctx, d.opts.Config.DiskTimeout/4)
		defer cancel()
		err = d.callState(ctx, func() error { return d.useState(dev, found.identity) })
	}
	if err == nil {
		return
	}
	d.useLater(d.here(found.identity))
	if found.refusal == nil {
		found.refusal = &cbtstate.Refusal{Reason: cbtstate.NoPlace, Text: err.Error(), Record: found.record}
		dev.cbt.NewGeneration()
		d.tellHistory(dev, name, found)
	}
}

// takenOver notes that the log of a device has taken the place of what was to be used up
// later; needs opLock.
func (d *Daemon) takenOver(dev *device) {
	if dev.intent != nil && dev.powerFailure().Covered {
		d.usedUp(d.here(dev.intent.identity))
	}
}

// useState uses up what is kept of a disk, now. It may hang.
func (d *Daemon) useState(dev *device, id disk.Identity) error {
	return d.takeBack(dev, id, func(s *cbtstate.Store) error {
		if err := s.Stop(id); err != nil {
			return err
		}
		return s.Use(id)
	})
}

// askHistory finds what was kept, and looks at the disk. Both may hang.
func (d *Daemon) askHistory(ctx context.Context, dev *device, name string) foundHistory {
	refused := func(reason, text string) foundHistory {
		return foundHistory{refusal: &cbtstate.Refusal{Reason: reason, Text: text}}
	}
	if d.opts.Config.StateDir == "" {
		return refused(cbtstate.NoState, "nothing is kept: state_dir is empty")
	}
	limit, err := cbtmap.MemorySize(dev.geo.Size, d.opts.Config.CBTParams())
	if err != nil {
		return refused(cbtstate.Unknown, err.Error())
	}
	// What was kept may have smaller blocks.
	limit = max(limit, 256<<20)
	fd, err := duplicate(dev)
	if err != nil {
		return refused(cbtstate.Unknown, err.Error())
	}
	ctx, cancel := context.WithTimeout(ctx, d.opts.Config.DiskTimeout/2)
	defer cancel()
	owed, damaged := slices.Clone(d.outdated), d.outdatedDamaged
	found, err := bounded.Call(ctx, func() foundHistory {
		defer unix.Close(fd)
		found := d.findHistory(ctx, fd, dev, name, limit)
		if found.refusal == nil && damaged != nil {
			found.refusal = &cbtstate.Refusal{Reason: cbtstate.Unclean, Text: "it is not known whether what is kept is out of date: " + damaged.Error(), Record: found.record}
		}
		if found.refusal == nil && slices.ContainsFunc(owed, d.here(found.identity).is) {
			found.refusal = &cbtstate.Refusal{Reason: cbtstate.Unclean, Text: "what is kept is from before the last filter over the disk, and could not be removed since", Record: found.record}
		}
		return found
	}, func(foundHistory) {})
	if err == nil {
		return found
	}
	found = refused(cbtstate.NoPlace, "the disk or "+d.opts.Config.StateDir+" does not answer")
	found.identity, _ = d.host.Identify(dev.disk)
	found.unanswered = true
	return found
}

func (d *Daemon) findHistory(ctx context.Context, fd int, dev *device, name string, limit int64) (found foundHistory) {
	refuse := func(err error) foundHistory {
		if !errors.As(err, &found.refusal) {
			found.refusal = &cbtstate.Refusal{Reason: cbtstate.Unknown, Text: err.Error()}
		}
		return found
	}
	var err error
	if found.identity, err = d.host.Identify(dev.disk); err != nil {
		return refuse(err)
	}
	store, err := d.openState(dev, false)
	if err != nil {
		return refuse(err)
	}
	defer store.Close()
	if found.record, found.saved, err = store.Find(found.identity, name, limit); err == nil {
		var now cbtstate.Disk
		if now, err = d.lookAt(ctx, fd, dev, found.identity, fingerprint.Read); err == nil {
			if no := found.record.Judge(now); no != nil {
				err = no
			}
			found.now = &now
		}
	} else if no := (*cbtstate.Refusal)(nil); errors.As(err, &no) && slices.Contains(noClean, no.Reason) {
		d.findRunning(ctx, fd, dev, store, limit, &found, &err)
	}
	if err != nil {
		return refuse(err)
	}
	return found
}

// noClean are the reasons with which there is no record of a clean end.
var noClean = []string{cbtstate.NoState, cbtstate.Unclean, cbtstate.OtherDisk}

// findRunning is findHistory of a disk that had a filter when the power failed. If there
// is nothing of such a filter, err stays what it is.
func (d *Daemon) findRunning(ctx context.Context, fd int, dev *device, store *cbtstate.Store, limit int64, found *foundHistory, err *error) {
	record, base, log, e := store.FindRunning(found.identity, limit)
	if nothingKept(e) {
		return
	}
	// Damaged or not, a running record says it. Only a directory that cannot be read says nothing.
	no := (*cbtstate.Refusal)(nil)
	errors.As(e, &no)
	found.unclean = no == nil || no.Record != nil || no.Reason != cbtstate.NoPlace
	if *err = e; e != nil {
		return
	}
	found.record = record
	now, e := d.lookAt(ctx, fd, dev, found.identity, fingerprint.Running)
	if *err = e; e != nil {
		return
	}
	if no := record.JudgeRunning(now); no != nil {
		*err = no
		return
	}
	running, e := intentlog.Recover(base, log)
	if e != nil {
		*err = &cbtstate.Refusal{Reason: cbtstate.Damaged, Text: e.Error(), Record: record}
		return
	}
	found.running = &running
	if whole, e := d.lookAt(ctx, fd, dev, found.identity, fingerprint.Read); e == nil {
		found.now = &whole
	}
}

const (
	// looksAtDisk is how often a disk is looked at that does not keep still.
	looksAtDisk = 5
	lookPause   = 50 * time.Millisecond
)

// fingerprintOf is fingerprint.Read or fingerprint.Running.
type fingerprintOf func(ctx context.Context, r io.ReaderAt, size int64, block int) ([]fingerprint.Place, error)

// lookAt is what a disk is like now, which nobody may write to. fd is open on it.
func (d *Daemon) lookAt(ctx context.Context, fd int, dev *device, id disk.Identity, look fingerprintOf) (now cbtstate.Disk, err error) {
	now = cbtstate.Disk{Identity: id, Size: dev.geo.Size, Machine: d.host.MachineID()}
	if now.Boot, err = disk.BootID(); err != nil {
		return now, err
	}
	r, err := fingerprint.OpenDirect(fd, dev.geo.LogicalBlock)
	if err != nil {
		return now, err
	}
	defer r.Close()
	// The kernel counts a write after it has told of its end. So one of ours may be counted
	// only now.
	for range looksAtDisk {
		if w, err := d.host.CountWrites(dev.disk); err == nil {
			now.Writes = &w
		}
		if now.Fingerprint, err = look(ctx, r, dev.geo.Size, dev.geo.LogicalBlock); err != nil || now.Writes == nil {
			return now, err
		}
		if w, err := d.host.CountWrites(dev.disk); err == nil && w == *now.Writes {
			return now, nil
		}
		time.Sleep(lookPause)
	}
	return now, &cbtstate.Refusal{Reason: cbtstate.Written, Text: "somebody else writes to the disk at this moment"}
}

// duplicate is another descriptor of the original, for who may still be at it when
// the daemon's own is closed.
func duplicate(dev *device) (int, error) {
	fd, err := unix.FcntlInt(uintptr(dev.orig.Fd()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("duplicate the descriptor of %s: %w", dev.disk.DisplayPath(), err)
	}
	return fd, nil
}
