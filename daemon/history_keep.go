package daemon

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

// The stages of keeping a history, for who waits only so long: what is given up
// before its last step never counts.
const (
	keepBegun int32 = iota
	keepCommitted
	keepGivenUp
)

// keepHistory keeps what is known of a disk's changes for the next filter over it.
// The device serves nobody any more, the disk is still claimed; needs opLock.
func (d *Daemon) keepHistory(dev *device) {
	if d.opts.Config.StateDir == "" {
		return
	}
	d.step("remove %s: keep its change map", dev.Name)
	err := d.endIntent(dev)
	if err == nil {
		err = d.tryKeepHistory(dev, func(cbtstate.Disk) error { return nil })
	}
	if err != nil {
		d.stopHistory(dev)
		d.opts.Log.Warn("the change map is not kept: the next filter over this disk begins a new generation",
			"name", dev.Name, "disk", dev.disk.DisplayPath(), "reason", err)
		return
	}
	d.opts.Log.Info("the change map is kept", "name", dev.Name, "disk", dev.disk.DisplayPath(), "directory", d.opts.Config.StateDir)
}

// endIntent ends the log of a device that serves nobody any more.
func (d *Daemon) endIntent(dev *device) error {
	if dev.intent == nil {
		return nil
	}
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	return dev.intent.end(ctx)
}

// stopHistory sees to that a power failure does not bring back what is known of a disk
// whose filter does not end as it should; needs opLock.
func (d *Daemon) stopHistory(dev *device) {
	if dev.intent == nil {
		return
	}
	if d.endIntent(dev) != nil {
		d.useLater(d.here(dev.intent.identity))
		return
	}
	d.stopIdentity(dev, d.here(dev.intent.identity))
}

// stopIdentity takes back what counts of a disk that had a filter with a log, now or
// later; dev may be nil.
func (d *Daemon) stopIdentity(dev *device, o outdated) {
	if o.Identity == nil || o.StateDir == "" {
		return
	}
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	err := d.callState(ctx, func() error {
		if o.StateDir == d.opts.Config.StateDir {
			return d.stopState(dev, o.Identity)
		}
		return d.useUp(o)
	})
	if err != nil {
		d.useLater(o)
	}
}

// leaveKept takes back what counts of the disk of a device that is taken over, if the log that
// is about to begin does not take its place: a volume or an array may lie on other disks by now,
// which makes its identity another one, or this daemon may have another state directory. A later
// one must not believe it. Then the new place goes on record, before anything counts there: so
// whoever dies, what counts is what is on record. Needs opLock.
func (d *Daemon) leaveKept(s *survivor) {
	old := s.record.kept()
	if old.Identity == nil {
		return // it has no log
	}
	now := d.here(old.Identity)
	if in := s.dev.intent; in != nil {
		if now.Identity = in.identity; old.is(now) {
			return
		}
	}
	d.stopIdentity(s.dev, old)
	deathpoint.Point()
	if old.is(now) {
		return
	}
	if old.StateDir != now.StateDir && slices.ContainsFunc(d.outdated, old.is) {
		d.opts.Log.Error("what the state directory of before has cannot be taken back yet: remove its files before it is used again",
			"name", s.record.Name, "directory", old.StateDir)
	}
	s.record.Identity, s.record.StateDir = now.Identity, now.StateDir
	d.changeDeviceRecord(s.record)
}

// tryKeepHistory keeps the map of a disk, unless check has an objection to what the disk is
// like.
func (d *Daemon) tryKeepHistory(dev *device, check func(cbtstate.Disk) error) error {
	saved, err := dev.cbt.Save()
	if err != nil {
		return err
	}
	fd, err := duplicate(dev)
	if err != nil {
		return err
	}
	var stage atomic.Int32
	var identity disk.Identity // set before the stage is keepCommitted
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	result, late := bounded.Call(ctx, func() error {
		defer unix.Close(fd)
		r := cbtstate.Record{ID: uuid.New(), Name: dev.Name, Path: dev.disk.DisplayPath(), Program: control.Version, Saved: time.Now()}
		id, err := d.host.Identify(dev.disk)
		if err != nil {
			return err
		}
		store, err := d.openState(dev, true)
		if err != nil {
			return err
		}
		defer store.Close()
		if err := unix.Fsync(fd); err != nil {
			return fmt.Errorf("sync %s: %w", dev.disk.DisplayPath(), err)
		}
		if r.Disk, err = d.lookAt(ctx, fd, dev, id, fingerprint.Read); err != nil {
			return err
		}
		if err := check(r.Disk); err != nil {
			return err
		}
		// A volume or an array may lie on other disks by now, which makes its identity another
		// one: what the log has counted under must not stay.
		if in := dev.intent; in != nil && !slices.Equal(in.identity, id) {
			if err := store.Stop(in.identity); err != nil {
				return err
			}
		}
		identity = id
		return store.Save(r, saved, func() bool { return stage.CompareAndSwap(keepBegun, keepCommitted) })
	}, func(error) {})
	if late != nil {
		// The last step may be under way, and end when the disk has a filter again.
		if !stage.CompareAndSwap(keepBegun, keepGivenUp) {
			d.useLater(d.here(identity))
		}
		return fmt.Errorf("the disk or %w", d.stateHangs())
	}
	if result == nil {
		d.usedUp(d.here(identity))
	} else if stage.Load() == keepCommitted {
		d.useLater(d.here(identity))
	}
	return result
}
