package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// The snapshots of a dead daemon, each by the stage it was in:
//
//	being created    its maker has had no answer: nobody knows of it, it is destroyed
//	created          goes on, empty as it was
//	taking           the take was not made: its number is void, and it is as created
//	taken            goes on, and so do its images
//	being destroyed  that is brought to its end
//
// One that cannot go on, because a device, a storage or a table is not to be had,
// ends with its event. The devices do not end with it.

// leftSnapshot is a snapshot of a dead daemon on its way into the hands of this one.
type leftSnapshot struct {
	*snapshots.Left
	images  []*ublk.Claimed // of each device, nil if there is none
	note    snapshotNote
	config  snapshots.Config
	events  chan diffarea.Event
	members []*device // of each device, as far as they are taken over
	filters []*filter.Filter
	// busy: the dead daemon has something under way for an image, which may still write to
	// the snapshot's memory.
	busy bool
}

// leftSnapshots are the snapshots that are there.
func (d *Daemon) leftSnapshots() []*leftSnapshot {
	left, err := snapshots.LeftBehind(d.snapshotsDir())
	if err != nil {
		d.opts.Log.Error("cannot look for the snapshots of a dead daemon", "error", err)
	}
	slices.SortStableFunc(left, func(a, b *snapshots.Left) int { return a.Created.Compare(b.Created) })
	var out []*leftSnapshot
	for _, l := range left {
		s := &leftSnapshot{Left: l, events: make(chan diffarea.Event, 256), images: make([]*ublk.Claimed, len(l.Images))}
		s.config = d.snapshotConfig(s.events)
		if l.Note != nil {
			if err := json.Unmarshal(l.Note, &s.note); err != nil {
				d.opts.Log.Warn("what was said of a snapshot is forgotten", "snapshot", s.id(), "error", err)
			}
		}
		d.events.name(s.id(), s.note.Name)
		out = append(out, s)
	}
	return out
}

// snapshotConfig is what all snapshots have in common.
func (d *Daemon) snapshotConfig(events chan diffarea.Event) snapshots.Config {
	return snapshots.Config{
		StateDir: d.snapshotsDir(), Root: d.host.Root, StorageTimeout: d.opts.Config.StorageTimeout, Control: d.queue, Stores: d.stores,
		Keep: d.keepNote, MachineID: d.host.MachineID,
		OnEvent: func(e diffarea.Event) {
			select {
			case events <- e:
			default: // a queue thread does not wait; what broke is in the state too
				d.eventsDropped.Add(1)
			}
		},
	}
}

func (s *leftSnapshot) id() string { return s.Left.ID.String() }

// claimSnapshots claims what the snapshots need: then nothing of the dead daemon is under
// way for them.
func (d *Daemon) claimSnapshots(ctx context.Context, snaps []*leftSnapshot) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	images := make(chan struct{})
	go func() {
		defer close(images)
		eachAtOnce(snaps, func(s *leftSnapshot) { d.claimImages(ctx, s) })
	}()
	eachAtOnce(snaps, d.claimStorage)
	<-images
}

// claimImages claims the ublk devices of the images.
func (d *Daemon) claimImages(ctx context.Context, s *leftSnapshot) {
	for i, im := range s.Images {
		if im.Number < 0 {
			continue
		}
		info, err := d.ctl.Info(ctx, int(im.Number))
		if errors.Is(err, unix.ENODEV) || err == nil && info.Tag != im.Tag {
			continue
		}
		if err == nil {
			s.images[i], err = ublk.Claim(ctx, d.ctl, int(im.Number))
		}
		deathpoint.Point()
		if errors.Is(err, ublk.ErrDead) {
			err = d.ctl.DeleteDevice(ctx, int(im.Number))
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			s.busy = s.busy || notEnded(err)
			d.opts.Log.Warn("the image of a dead daemon's snapshot cannot be had", "snapshot", s.id(), "device", im.Number, "error", err)
		}
	}
}

// claimStorage has a snapshot's storage, if it will be needed. What it waits for it
// says when the snapshot is reopened.
func (d *Daemon) claimStorage(s *leftSnapshot) {
	if s.Err == nil && !s.Stage.Ends(s.Pending) {
		if err := s.Claim(s.config); err != nil {
			d.opts.Log.Warn("storage of a dead daemon's snapshot cannot be claimed", "snapshot", s.id(), "error", publicPaths(err.Error()))
		}
	}
}

// reopenSnapshot makes a snapshot that was taken of what outlived the dead daemon. Its devices
// are not served yet. Without one and without a reason, it is one that shall end, or one for
// makeAgain.
func (d *Daemon) reopenSnapshot(s *leftSnapshot, devices map[string]*device) (_ *snapshot, reason error) {
	if s.Err != nil {
		return nil, s.Err
	}
	var missing string
	maps := make([]*cbtmap.Map, len(s.Devices))
	s.members, s.filters = make([]*device, len(s.Devices)), make([]*filter.Filter, len(s.Devices))
	for i, known := range s.Devices {
		dev := devices[known.Name]
		if dev == nil || unix.Mkdev(dev.shown().Num.Major, dev.shown().Num.Minor) != known.Number {
			missing = known.Name
			continue
		}
		s.members[i], maps[i], s.filters[i] = dev, dev.cbt, dev.filter
	}
	d.tellLeftGenerations(s)
	if s.Stage == snapshots.Taking {
		if err := s.Void(maps); err != nil {
			return nil, err
		}
		deathpoint.Point()
	}
	switch {
	case s.Stage.Ends(s.Pending):
		return nil, nil
	case missing != "":
		return nil, fmt.Errorf("its device %s is not taken over", missing)
	case s.busy:
		return nil, errNotEnded
	}
	if s.Stage != snapshots.Taken {
		return nil, nil
	}
	return d.adoptSnapshot(s, s.Reopen)
}

// makeAgain makes those again that were not taken. Nothing was copied for them, so all else is
// served and goes on already: their storage may not answer for as long as storage_timeout. They
// wait for that side by side.
func (d *Daemon) makeAgain(ctx context.Context, all []*leftSnapshot, reopened []*snapshot, reasons []error) {
	var created []int
	for i, s := range all {
		if reopened[i] == nil && reasons[i] == nil && !s.Stage.Ends(s.Pending) {
			created = append(created, i)
		}
	}
	eachAtOnce(created, func(i int) {
		if reopened[i], reasons[i] = d.adoptSnapshot(all[i], all[i].Again); reopened[i] != nil {
			reasons[i] = d.goOn(ctx, reopened[i], all[i]) // which has no image that could fail
		}
	})
}

// adoptSnapshot has a snapshot of a dead daemon that is opened, as by Left.Reopen.
func (d *Daemon) adoptSnapshot(s *leftSnapshot, open func(snapshots.Config, []*filter.Filter) (*snapshots.Snapshot, error)) (*snapshot, error) {
	snap, err := open(s.config, s.filters)
	if err != nil {
		return nil, err
	}
	deathpoint.Point()
	taken := s.Stage == snapshots.Taken
	out := &snapshot{
		id: s.id(), snap: snap, chunk: s.Chunk, created: s.Created, encrypted: s.Encrypted,
		engineEvents: s.events, destroyed: make(chan struct{}),
	}
	for i, dev := range s.members {
		im := &image{device: dev}
		if taken {
			im.take = snap.TakeInfo(i)
		}
		out.images = append(out.images, im)
	}
	for _, text := range s.Storage {
		var st control.Storage
		if err := json.Unmarshal(text, &st); err != nil {
			d.opts.Log.Warn("what was said of a storage is forgotten", "snapshot", out.id, "error", err)
		}
		out.storage = append(out.storage, st)
	}
	out.note = s.note
	if taken {
		at := out.note.Taken
		if at.IsZero() { // its daemon died before it could say so
			at = s.Created
		}
		out.taken, out.frozen = &at, out.note.Frozen
	}
	d.mu.Lock()
	d.snapshots[out.id] = out
	d.mu.Unlock()
	return out, nil
}

// goOn lets a snapshot work whose devices are served: its images come back, and its
// events go on.
func (d *Daemon) goOn(ctx context.Context, s *snapshot, left *leftSnapshot) error {
	if !d.events.has(s.id, control.EventCreated) {
		d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCreated})
	}
	if s.taken != nil {
		for i := range s.images {
			if err := d.nameImage(ctx, s, i, left.images[i]); err != nil {
				return fmt.Errorf("the image of %s: %w", s.images[i].device.Name, err)
			}
		}
		if !d.events.has(s.id, control.EventTaken) {
			d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventTaken})
		}
	}
	go d.forwardEvents(s)
	d.opts.Log.Info("taken over", "snapshot", s.id, "images", len(s.images), "taken", s.taken != nil)
	return nil
}

// resumeImages serves the images again, all at once. One that cannot be is left to
// goOn.
func (d *Daemon) resumeImages(ctx context.Context, reopened []*snapshot, left []*leftSnapshot) {
	ctx, cancel := context.WithTimeout(ctx, serveTimeout)
	defer cancel()
	var all []func()
	for i, s := range reopened {
		if s == nil || s.taken == nil {
			continue
		}
		for n, claimed := range left[i].images {
			if claimed != nil {
				all = append(all, func() { d.resumeImage(ctx, s, n, claimed) })
			}
		}
	}
	eachAtOnce(all, func(resume func()) { resume() })
}

// resumeImage serves an image again, or deletes its device.
func (d *Daemon) resumeImage(ctx context.Context, s *snapshot, i int, claimed *ublk.Claimed) {
	im := s.images[i]
	dev, err := claimed.Prepare(ctx, ublk.Config{
		Name: im.device.Name + "@", Files: []*blockdev.OSFile{im.device.orig}, OpenedBy: d.openedBy, Claim: d.claimDisk,
		NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler { return s.snap.Image(i).NewQueue(bq) },
	})
	if err == nil {
		if err = dev.Resume(ctx); err != nil {
			dev.Abandon()
		}
	}
	if err != nil {
		d.opts.Log.Error("an image is not taken over: another is made, and who used that one gets errors", "snapshot", s.id, "device", claimed.ID, "error", err)
		if err := d.ctl.DeleteDevice(ctx, claimed.ID); err != nil {
			d.opts.Log.Warn("cannot remove an image", "snapshot", s.id, "device", claimed.ID, "error", err)
		}
		return
	}
	d.mu.Lock()
	im.ublk = dev
	d.mu.Unlock()
}

// nameImage gives an image its name again, or makes its device anew.
func (d *Daemon) nameImage(ctx context.Context, s *snapshot, i int, claimed *ublk.Claimed) error {
	deathpoint.Point()
	im := s.images[i]
	if im.ublk == nil {
		return d.makeImage(ctx, s, i)
	}
	err := d.note(filepath.Base(im.ublk.Path), "image", s.noteName(i))
	if err = errors.Join(err, d.linkImage(ctx, s, i, claimed.Tag)); err != nil {
		d.opts.Log.Warn("an image has lost its name", "snapshot", s.id, "device", im.ublk.Path, "error", err)
	}
	return nil
}

// endSnapshot ends a snapshot that cannot be taken over, with its event, or one that
// shall end, without a reason. The rest of it goes beside what waits for this daemon,
// by what is returned.
func (d *Daemon) endSnapshot(ctx context.Context, s *leftSnapshot, reason error) (rest func()) {
	if reason != nil {
		d.opts.Log.Error("a snapshot cannot be taken over: it ends", "snapshot", s.id(), "reason", publicPaths(reason.Error()))
		d.ended = append(d.ended, s.lost(reason))
		d.tellEnd(s, reason)
	} else {
		d.opts.Log.Warn("a snapshot that was to end when its daemon died is destroyed", "snapshot", s.id(), "stage", s.Stage.String())
	}
	for i, claimed := range s.images {
		if claimed == nil {
			continue
		}
		d.unlink(s.Images[i].Link, diskName(claimed.ID))
		if err := d.ctl.DeleteDevice(ctx, claimed.ID); err != nil && !errors.Is(err, unix.ENODEV) {
			d.opts.Log.Warn("cannot remove the image of a snapshot that ends", "snapshot", s.id(), "device", claimed.ID, "error", err)
		}
		deathpoint.Point()
	}
	return func() { d.clearSnapshot(ctx, s) }
}

// tellEnd tells of a snapshot that ends, and why.
func (d *Daemon) tellEnd(s *leftSnapshot, reason error) {
	if d.events.has(s.id(), control.EventCorrupted) {
		return
	}
	errno := unix.EIO
	errors.As(reason, &errno)
	d.events.emit(control.Event{Snapshot: s.id(), Kind: control.EventCorrupted, Errno: -int(errno), Text: publicPaths(reason.Error())})
}

// lost is what is told of a snapshot that ends.
func (s *leftSnapshot) lost(reason error) control.LostSnapshot {
	lost := control.LostSnapshot{ID: s.id(), Name: s.note.Name, Reason: publicPaths(reason.Error())}
	for _, dev := range s.Devices {
		lost.Devices = append(lost.Devices, dev.Name)
	}
	for _, text := range s.Storage {
		var st control.Storage
		if json.Unmarshal(text, &st) == nil {
			lost.Storage = append(lost.Storage, st.Path)
		}
	}
	return lost
}

// endSnapshots ends those that were not reopened.
func (d *Daemon) endSnapshots(ctx context.Context, snaps []*leftSnapshot, reopened []*snapshot, reasons []error) {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	var rests []func()
	for i, s := range snaps {
		if reopened[i] == nil {
			rests = append(rests, d.endSnapshot(ctx, s, reasons[i]))
		}
	}
	eachAtOnce(rests, func(rest func()) { rest() })
}

// clearSnapshot removes what is left of a snapshot that ends. If its storage does not
// answer, that takes as long as that lasts, but clearSnapshot itself returns
// when ctx ends, because somebody waits for this daemon to start.
func (d *Daemon) clearSnapshot(ctx context.Context, s *leftSnapshot) {
	_, late := bounded.Call(ctx, func() error {
		if err := s.Clear(s.config); err != nil {
			d.opts.Log.Warn("a part of a dead daemon's snapshot cannot be removed", "snapshot", s.id(), "error", publicPaths(err.Error()))
		}
		if slices.Contains(d.events.ids(), s.id()) {
			d.events.emit(control.Event{Snapshot: s.id(), Kind: control.EventDestroyed})
		}
		return nil
	}, func(error) {})
	if late != nil {
		d.opts.Log.Warn("the storage of a dead daemon's snapshot does not answer: it is given back when it does", "snapshot", s.id())
	}
}

// forgetEvents tells the end of snapshots that a dead daemon had destroyed, all but
// saying so.
func (d *Daemon) forgetEvents(left []*leftSnapshot) {
	for _, id := range d.events.ids() {
		if !slices.ContainsFunc(left, func(s *leftSnapshot) bool { return s.id() == id }) {
			d.events.emit(control.Event{Snapshot: id, Kind: control.EventDestroyed})
		}
	}
}

// openEvents takes the events of a dead daemon over.
func (d *Daemon) openEvents() {
	path := filepath.Join(d.opts.Dir.State(), eventsName)
	events, err := openEventLog(path, func(err error) {
		d.opts.Log.Warn("events cannot be kept for the next daemon", "error", err)
	})
	if err != nil {
		d.opts.Log.Error("the events of a dead daemon are lost", "error", err)
		_ = os.Remove(path)
	}
	d.events = events
}
