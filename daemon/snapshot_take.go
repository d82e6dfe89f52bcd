package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TakeSnapshot implements control.API.
func (d *Daemon) TakeSnapshot(ctx context.Context, r control.TakeRequest) (control.Snapshot, error) {
	s, end, err := d.beginOnSnapshot(ctx, r.ID, "take snapshot %s", r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	if err := d.take(ctx, s, r); err != nil {
		return control.Snapshot{}, snapshotError(err, "take snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

func (d *Daemon) take(ctx context.Context, s *snapshot, r control.TakeRequest) error {
	if s.snap.Taken() {
		return snapimage.ErrTaken
	}
	hooks, err := d.beforeTake(ctx, s, r.NoHooks)
	if err != nil {
		return err
	}
	frozen, err := d.cut(ctx, s, r)
	d.afterTake(hooks, err) // as soon as can be: somebody may wait for it
	d.mu.Lock()
	s.warnings = hooks.failed
	d.mu.Unlock()
	if err != nil {
		if s.snap.Taken() {
			return d.abandon(s, err)
		}
		return err
	}
	return d.show(ctx, s, frozen)
}

// cut makes the cut of a take.
func (d *Daemon) cut(ctx context.Context, s *snapshot, r control.TakeRequest) (frozen time.Duration, err error) {
	o := snapshots.TakeOptions{Limit: d.opts.Config.FreezeTimeout, Freezer: d.freeze}
	defer func() {
		for _, f := range o.Freeze {
			f.Close()
		}
	}()
	if !r.NoFreeze {
		for _, m := range d.mountsOver(s) {
			f, err := d.host.OpenMount(m)
			if err != nil {
				return 0, fmt.Errorf("open the filesystem on %s: %w", m.Point, err)
			}
			o.Freeze = append(o.Freeze, f)
		}
	}
	d.step("take snapshot %s: %d filesystems to freeze, writes to wait for", s.id, len(o.Freeze))
	points, err := d.rememberFrozen(o.Freeze)
	if err != nil {
		return 0, err
	}
	before := mapsBefore(s)
	frozen, err = s.snap.Take(ctx, o)
	d.afterFreeze(o.Freeze, points)
	d.tellGenerations(s, before)
	// Requests came to the filters at the cut if they still do.
	for i := 0; err == nil && i < len(s.images); i++ {
		if dev := s.images[i].device; dev != nil {
			if e := d.checkTable(dev); e != nil {
				err = fail(e, "%s", dev.Name)
			}
		}
	}
	return frozen, err
}

// show ends a take whose cut was made: it outlives a power failure, and its images are there.
func (d *Daemon) show(ctx context.Context, s *snapshot, frozen time.Duration) error {
	d.makeDurable(s)
	now := time.Now()
	err := d.changeNote(s, func(n *snapshotNote) { n.Taken, n.Frozen = now, frozen })
	for i := range s.images {
		if err == nil {
			err = d.makeImage(ctx, s, i)
		}
	}
	if err != nil {
		return d.abandon(s, fmt.Errorf("make images: %w: the snapshot is destroyed", err))
	}
	d.mu.Lock()
	s.taken, s.frozen = &now, frozen
	d.ended = nil // who takes another knows of those that have ended
	d.forgetCleared()
	d.mu.Unlock()
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventTaken})
	d.opts.Log.Info("snapshot taken", "snapshot", s.id, "frozen", frozen)
	return nil
}

// makeDurable sees to that a take of which somebody is told outlives a power failure.
func (d *Daemon) makeDurable(s *snapshot) {
	var devices []int
	for i, im := range s.images {
		if im.device.intent != nil {
			devices = append(devices, i)
		}
	}
	d.step("take snapshot %s: make it durable", s.id)
	eachAtOnce(devices, func(i int) { s.images[i].device.intent.taken(s.snap.TakeInfo(i)) })
}

// maxImageDepth bounds the requests in flight for each queue of an image. Without
// zero copy each request has a buffer that is locked in memory, and every snapshot
// has images of its own.
const maxImageDepth = 64

// makeImage makes the ublk device of image i.
func (d *Daemon) makeImage(ctx context.Context, s *snapshot, i int) error {
	im := s.images[i]
	d.step("take snapshot %s: make the image of %s", s.id, im.device.Name)
	geo := im.device.geo
	// An image outlives no power failure, so there is nothing to flush; and
	// a trim of it must not fill the storage with zeroes.
	geo.ReadOnly, geo.VolatileCache, geo.FUA = false, false, false
	geo.MaxDiscard, geo.DiscardGranularity, geo.MaxWriteZeroes = 0, 0, 0
	// Payloads go to the storage as well, whatever it is.
	geo.DMAMask |= sector.Size - 1
	mode := im.device.ublk.Mode
	if s.encrypted {
		mode = ublk.ModeCopy // payloads are decrypted by this process
	}
	var tag uint64
	dev, err := d.addUblk(ctx, imageKind, "image", s.noteName(i), ublk.Config{
		Name: im.device.Name + "@", Queues: im.device.Queues, Depth: min(im.device.Depth, maxImageDepth), MaxIO: ublk.DefaultMaxIO,
		Mode: mode, Geometry: geo, NoPartScan: true,
		Files:      []*blockdev.OSFile{im.device.orig},
		NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler { return s.snap.Image(i).NewQueue(bq) },
	}, func(id int, chosen uint64) error {
		tag = chosen
		return s.snap.SetImage(i, snapshots.Image{Number: int32(id), Tag: tag})
	})
	deathpoint.Point()
	d.mu.Lock()
	im.ublk, im.take = dev, s.snap.TakeInfo(i)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	return d.linkImage(ctx, s, i, tag)
}

// linkImage gives image i its name.
func (d *Daemon) linkImage(ctx context.Context, s *snapshot, i int, tag uint64) error {
	im := s.images[i]
	l, err := d.link(ctx, s.imageName(im.device.Name), im.ublk)
	if err != nil {
		return err
	}
	d.mu.Lock()
	im.link = l
	d.mu.Unlock()
	return s.snap.SetImage(i, snapshots.Image{Number: int32(im.ublk.ID), Tag: tag, Link: l})
}

// mountsOver are the filesystems on the snapshot's devices, each once.
func (d *Daemon) mountsOver(s *snapshot) []disk.Mount {
	var out []disk.Mount
	seen := map[disk.Num]bool{}
	for _, im := range s.images {
		for _, m := range d.host.MountsOver(im.device.ublk.Num, d.lowerDisks) {
			if !seen[m.Num] {
				seen[m.Num] = true
				out = append(out, m)
			}
		}
	}
	return out
}
