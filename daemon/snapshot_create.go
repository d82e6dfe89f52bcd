package daemon

import (
	"context"
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
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// CreateSnapshot implements control.API.
func (d *Daemon) CreateSnapshot(ctx context.Context, r control.CreateRequest) (control.Snapshot, error) {
	end, err := d.begin(ctx, "create snapshot")
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	s, err := d.create(ctx, r)
	if err != nil {
		return control.Snapshot{}, snapshotError(err, "create snapshot")
	}
	d.o.Log.Info("snapshot created", "snapshot", s.id, "chunk", s.chunk)
	return d.describeSnapshot(s), nil
}

func (d *Daemon) create(ctx context.Context, r control.CreateRequest) (s *snapshot, err error) {
	var devices, attached []*device
	defer func() {
		if err != nil {
			err = errors.Join(err, d.detach(attached))
		}
	}()
	for _, ref := range r.Devices {
		v, fresh, err := d.findOrAttach(ctx, ref, r.Attach)
		if err != nil {
			return nil, err
		}
		if fresh {
			attached = append(attached, v)
		}
		if slices.Contains(devices, v) {
			return nil, fail(snapshotError(snapimage.ErrAdded, "%s", v.Name), "add a device")
		}
		devices = append(devices, v)
	}
	chunk, err := d.chunkSize(r.ChunkSize, devices)
	if err != nil {
		return nil, err
	}
	s = &snapshot{chunk: chunk, created: time.Now(), told: make(chan diffarea.Event, 256), over: make(chan struct{})}
	id := uuid.New()
	s.id = id.String()
	pool := d.o.Config.DiffBufferPoolSize
	if n := d.o.Config.ChunkMaximumInQueue; n > 0 {
		pool = min(pool, n*chunk)
	}
	s.live, err = snapshots.New(snapshots.Config{
		ID: id, ChunkSize: chunk, PoolSize: pool,
		Portion:  d.o.Config.DiffStorageMinimum * sector.Size,
		StateDir: d.snapshotsDir(),
		Patience: d.o.Config.StorageTimeout,
		Control:  d.queue,
		OnEvent: func(e diffarea.Event) {
			select {
			case s.told <- e:
			default: // a queue thread does not wait; what broke is in the state too
			}
		},
	})
	if err != nil {
		return nil, err
	}
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCreated})
	go d.tell(s)
	d.mu.Lock()
	d.snapshots[s.id] = s
	d.mu.Unlock()
	for _, v := range devices {
		if err := d.addTo(s, v); err != nil {
			return nil, d.undo(s, err)
		}
	}
	for _, st := range r.Storage {
		if err := d.appendTo(s, st); err != nil {
			return nil, d.undo(s, err)
		}
	}
	if r.Take {
		if err := d.take(ctx, s, control.TakeRequest{ID: s.id, NoFreeze: r.NoFreeze}); err != nil {
			if !s.leaving { // take has not begun to destroy it
				err = d.undo(s, err)
			}
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		// Nobody will learn its UUID.
		return nil, d.undo(s, err)
	}
	return s, nil
}

// findOrAttach is the device that ref names, with a filter put over it if it has
// none and attach allows it: a fresh one.
func (d *Daemon) findOrAttach(ctx context.Context, ref string, attach bool) (v *device, fresh bool, err error) {
	v, err = d.find(ref)
	if err == nil || !attach || control.CodeOf(err) != control.NotFound {
		if err != nil {
			return nil, false, fail(err, "%s", ref)
		}
		return v, false, nil
	}
	if v, err = d.add(ctx, control.AddRequest{Path: ref}); err != nil {
		return nil, false, fail(err, "attach %s", ref)
	}
	d.o.Log.Info("added", "name", v.Name, "disk", v.Original, "device", v.Path)
	return v, true, nil
}

// detach takes back the filters of a change that failed. One that somebody has
// begun to use stays.
func (d *Daemon) detach(attached []*device) error {
	var errs []error
	for _, v := range attached {
		if err := d.removeIdle(context.Background(), v); err != nil {
			errs = append(errs, fmt.Errorf("%s keeps its filter: %w", v.Original, err))
		} else {
			d.o.Log.Info("removed", "name", v.Name, "disk", v.Original)
		}
	}
	return errors.Join(errs...)
}

// chunkSize chooses the chunk size for devices: as asked for, or the smallest
// that needs no more than the configured number of chunks.
func (d *Daemon) chunkSize(asked int64, devices []*device) (int64, error) {
	c := d.o.Config
	if asked != 0 {
		if err := diffarea.CheckChunkSize(asked); err != nil {
			return 0, invalid("%v", err)
		}
		return asked, nil
	}
	shift := c.ChunkMinimumShift
	for _, v := range devices {
		if v.Size > 0 {
			n := (v.Size + c.ChunkMaximumCount - 1) / c.ChunkMaximumCount // bytes a chunk has to have
			shift = max(shift, int64(bits.Len64(uint64(n-1))))
		}
	}
	return 1 << min(shift, c.ChunkMaximumShift), nil
}

// AddToSnapshot implements control.API.
func (d *Daemon) AddToSnapshot(ctx context.Context, r control.SnapshotDeviceRequest) (control.Snapshot, error) {
	end, err := d.begin(ctx, "add %s to snapshot %s", r.Device, r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	s, err := d.usable(r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	v, fresh, err := d.findOrAttach(ctx, r.Device, r.Attach)
	if err == nil {
		if err = d.addTo(s, v); err != nil && fresh {
			err = errors.Join(err, d.detach([]*device{v}))
		}
	}
	if err != nil {
		return control.Snapshot{}, fail(err, "snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

// addTo needs change.
func (d *Daemon) addTo(s *snapshot, v *device) error {
	if v.leaving {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "add " + v.Name + ": it is being removed",
			Fix: "end that first: ublk-blksnap remove " + v.Name}
	}
	if err := s.live.Add(v.filter, unix.Mkdev(v.disk.Num.Major, v.disk.Num.Minor), v.geo.LogicalBlock); err != nil {
		return snapshotError(err, "add %s", v.Name)
	}
	d.mu.Lock()
	s.images = append(s.images, &image{of: v})
	d.mu.Unlock()
	return nil
}
