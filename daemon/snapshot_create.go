package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// CreateSnapshot implements control.API.
func (d *Daemon) CreateSnapshot(ctx context.Context, r control.CreateRequest) (control.Snapshot, error) {
	end, err := d.beginNew(ctx, "create snapshot")
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	s, err := d.create(ctx, r)
	if err != nil {
		return control.Snapshot{}, snapshotError(err, "create snapshot")
	}
	d.opts.Log.Info("snapshot created", "snapshot", s.called(), "chunk", s.chunk)
	return d.describeSnapshot(s), nil
}

func (d *Daemon) create(ctx context.Context, r control.CreateRequest) (s *snapshot, err error) {
	if err := errors.Join(d.checkSnapshotName(r.Name), checkLabels(r.Labels), checkTTL(r.TTL)); err != nil {
		return nil, err
	}
	auto, err := d.autoAppendOf(r.AutoAppend)
	if err != nil {
		return nil, err
	}
	var devices, attached []*device
	defer func() {
		if err != nil {
			err = errors.Join(err, d.detach(attached))
		}
	}()
	for _, ref := range r.Devices {
		dev, fresh, err := d.findOrAttach(ctx, ref, r.Attach)
		if err != nil {
			return nil, err
		}
		if fresh {
			attached = append(attached, dev)
		}
		if slices.Contains(devices, dev) {
			return nil, &control.Error{Code: control.Invalid, Errno: unix.EALREADY, Message: dev.Name + ": named twice"}
		}
		devices = append(devices, dev)
	}
	chunk, err := d.chunkSize(r.ChunkSize, devices)
	if err != nil {
		return nil, err
	}
	s = &snapshot{chunk: chunk, encrypted: d.opts.Config.Encrypt, created: time.Now(), engineEvents: make(chan diffarea.Event, 256), destroyed: make(chan struct{})}
	id := uuid.New()
	s.id = id.String()
	pool := d.opts.Config.DiffBufferPoolSize
	if n := d.opts.Config.ChunkMaximumInQueue; n > 0 {
		pool = min(pool, n*chunk)
	}
	if r.Encrypt != nil {
		s.encrypted = *r.Encrypt
	}
	c := d.snapshotConfig(s.engineEvents)
	c.Encrypt = s.encrypted
	c.ID, c.ChunkSize, c.PoolSize, c.Portion = id, chunk, pool, d.opts.Config.DiffStorageMinimum*sector.Size
	c.Pending = true // until it is answered, nobody knows of it
	s.note = snapshotNote{Name: r.Name, Labels: r.Labels, AutoAppend: auto, Began: bootNow(), Ends: endAfter(r.TTL)}
	if c.Note, err = json.Marshal(s.note); err != nil {
		return nil, err
	}
	if s.snap, err = snapshots.New(c); err != nil {
		return nil, err
	}
	d.events.name(s.id, s.note.Name)
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCreated})
	go d.forwardEvents(s)
	d.mu.Lock()
	d.snapshots[s.id] = s
	d.mu.Unlock()
	for _, dev := range devices {
		if err := d.addTo(ctx, s, dev); err != nil {
			return nil, d.abandon(s, err)
		}
	}
	for _, st := range r.Storage {
		st.Auto = false
		if err := d.appendTo(s, st); err != nil {
			return nil, d.abandon(s, err)
		}
	}
	if r.Take {
		if err := d.take(ctx, s, control.TakeRequest{ID: s.id, NoFreeze: r.NoFreeze, NoHooks: r.NoHooks}); err != nil {
			if !s.destroying { // take has not begun to destroy it
				err = d.abandon(s, err)
			}
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		// The caller does not learn its UUID, so nobody else could destroy it.
		return nil, d.abandon(s, err)
	}
	if err := s.snap.SetPending(false); err != nil {
		return nil, d.abandon(s, err)
	}
	d.lookAtEnds()
	return s, nil
}

// findOrAttach is the device that ref names. If the disk has no filter and attach
// allows it, findOrAttach puts one over it, and the device is fresh.
func (d *Daemon) findOrAttach(ctx context.Context, ref string, attach bool) (dev *device, fresh bool, err error) {
	dev, err = d.findDevice(ref)
	if err == nil || !attach || control.CodeOf(err) != control.NotFound {
		if err != nil {
			return nil, false, fail(err, "%s", ref)
		}
		return dev, false, nil
	}
	if dev, err = d.add(ctx, control.AddRequest{Path: ref, Attach: control.AttachPossible}); err != nil {
		return nil, false, fail(err, "attach %s", ref)
	}
	d.opts.Log.Info("added", "name", dev.Name, "disk", dev.Original, "device", dev.Path)
	return dev, true, nil
}

// detach removes the filters that a failed change had added. A filter that somebody
// has begun to use stays.
func (d *Daemon) detach(attached []*device) error {
	var errs []error
	for _, dev := range attached {
		if err := d.removeIdle(context.Background(), dev); err != nil {
			errs = append(errs, fmt.Errorf("%s keeps its filter: %w", dev.Original, err))
		} else {
			d.opts.Log.Info("removed", "name", dev.Name, "disk", dev.Original)
		}
	}
	return errors.Join(errs...)
}

// chunkSize chooses the chunk size for devices. It is the size that was asked for, or
// else the smallest one with no more than the configured number of chunks.
func (d *Daemon) chunkSize(asked int64, devices []*device) (int64, error) {
	c := d.opts.Config
	if asked != 0 {
		if err := diffarea.CheckChunkSize(asked); err != nil {
			return 0, invalid("%v", err)
		}
		return asked, nil
	}
	shift := c.ChunkMinimumShift
	for _, dev := range devices {
		if dev.Size > 0 {
			n := (dev.Size + c.ChunkMaximumCount - 1) / c.ChunkMaximumCount // bytes a chunk has to have
			shift = max(shift, int64(bits.Len64(uint64(n-1))))
		}
	}
	return 1 << min(shift, c.ChunkMaximumShift), nil
}

// AddToSnapshot implements control.API.
func (d *Daemon) AddToSnapshot(ctx context.Context, r control.SnapshotDeviceRequest) (control.Snapshot, error) {
	s, end, err := d.beginOnSnapshot(ctx, r.ID, "add %s to snapshot %s", r.Device, r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	dev, fresh, err := d.findOrAttach(ctx, r.Device, r.Attach)
	if err == nil {
		if err = d.addTo(ctx, s, dev); err != nil && fresh {
			err = errors.Join(err, d.detach([]*device{dev}))
		}
	}
	if err != nil {
		return control.Snapshot{}, fail(err, "snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

// addTo needs opLock.
func (d *Daemon) addTo(ctx context.Context, s *snapshot, dev *device) error {
	if err := d.checkTable(dev); err != nil {
		return fail(err, "add %s", dev.Name)
	}
	if dev.removing {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "add " + dev.Name + ": it is being removed",
			Fix: "end that first: ublk-blksnap remove " + dev.Name}
	}
	if s.note.Name != "" && s.taken == nil { // else the names are its own images'
		if err := d.checkFreeName(ctx, s.imageName(dev.Name)); err != nil {
			return err
		}
	}
	if err := s.snap.Add(dev.filter, snapshots.Device{
		Name: dev.Name, Path: dev.Original, Number: unix.Mkdev(dev.shown().Num.Major, dev.shown().Num.Minor), Block: dev.geo.LogicalBlock,
	}); err != nil {
		return snapshotError(err, "add %s", dev.Name)
	}
	d.mu.Lock()
	s.images = append(s.images, &image{device: dev})
	d.mu.Unlock()
	return nil
}
