package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/snapimage"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// snapshot is a snapshot with its image devices.
type snapshot struct {
	id      string
	live    *snapshots.Snapshot
	chunk   int64
	created time.Time
	// told carries events from the queue threads, which must not wait; over is
	// closed when all is gone, and failed says then what is left of it.
	told   chan diffarea.Event
	over   chan struct{}
	failed error

	// use is held by those who look into live without holding Daemon.change, and
	// by giveBack while it goes away. gone changes under Daemon.mu too.
	use  sync.RWMutex
	gone bool

	// Daemon.mu guards what follows.
	leaving bool // its end has begun; nothing can be asked of it any more
	ending  bool // all of it but the images is on its way back
	images  []*image
	storage []control.Storage
	taken   *time.Time
	frozen  time.Duration
}

// image is one device of a snapshot.
type image struct {
	of   *device
	dev  *ublk.Device // nil until taken
	link string
	take cbtmap.Info
}

// snapshotError gives the engine's errors their codes.
func snapshotError(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	e := fail(err, format, args...)
	set := func(c control.Code, n unix.Errno) { e.Code, e.Errno = c, n }
	switch {
	case errors.Is(err, snapimage.ErrNoDevices):
		set(control.NotFound, unix.ENODEV)
	case errors.Is(err, snapimage.ErrNoStorage):
		set(control.NoSpace, unix.ENOSPC)
	case errors.Is(err, snapimage.ErrTaken), errors.Is(err, snapimage.ErrAdded):
		set(control.Exists, unix.EALREADY)
	case errors.Is(err, snapimage.ErrCancelled), errors.Is(err, snapshots.ErrFreezeTimeout), errors.Is(err, snapshots.ErrStuck):
		set(control.Timeout, unix.ETIMEDOUT)
	case errors.Is(err, snapshots.ErrStorageInUse):
		set(control.Busy, unix.EBUSY)
	case errors.Is(err, snapshots.ErrNoStorageThere):
		set(control.Invalid, unix.EINVAL)
	}
	return e
}

func (d *Daemon) sortedSnapshots() []*snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*snapshot, 0, len(d.snapshots))
	for _, s := range d.snapshots {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *snapshot) int { return a.created.Compare(b.created) })
	return out
}

// holding are the UUIDs of the snapshots that hold the device.
func (d *Daemon) holding(v *device) []string {
	ids := []string{}
	for _, s := range d.sortedSnapshots() {
		if d.has(s, v) {
			ids = append(ids, s.id)
		}
	}
	return ids
}

func (d *Daemon) has(s *snapshot, v *device) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	// Whose storage alone is still on its way back needs the disk no more.
	return !s.gone && slices.ContainsFunc(s.images, func(im *image) bool { return im.of == v })
}

// findSnapshot is the snapshot of that UUID.
func (d *Daemon) findSnapshot(id string) (*snapshot, error) {
	u, err := uuid.Parse(id)
	if err != nil {
		return nil, invalid("snapshot %q: not a UUID", id)
	}
	d.mu.Lock()
	s := d.snapshots[u.String()]
	d.mu.Unlock()
	if s == nil {
		return nil, d.explainSnapshot(noSnapshot(u.String()), u.String())
	}
	return s, nil
}

// usable is findSnapshot for those who want something of it; needs change.
func (d *Daemon) usable(id string) (*snapshot, error) {
	s, err := d.findSnapshot(id)
	if err == nil && s.leaving {
		return nil, &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "snapshot " + s.id + ": is being destroyed", Fix: "create another"}
	}
	if err == nil && s.live.Err() != 0 {
		errno := s.live.Err()
		return nil, &control.Error{Code: control.Corrupted, Errno: errno, Message: "snapshot " + s.id + ": is corrupted: " + errno.Error(), Fix: "destroy it, and take another"}
	}
	return s, err
}

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

// AppendStorage implements control.API.
func (d *Daemon) AppendStorage(ctx context.Context, r control.StorageRequest) (control.Snapshot, error) {
	end, err := d.begin(ctx, "append storage to snapshot %s", r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	s, err := d.usable(r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	if err := d.appendTo(s, r.Storage); err != nil {
		return control.Snapshot{}, fail(err, "snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

// appendTo needs change.
func (d *Daemon) appendTo(s *snapshot, st control.Storage) error {
	if !filepath.IsAbs(st.Path) {
		return invalid("storage %q: not an absolute path", st.Path)
	}
	if st.Limit < 0 || st.Limit > 0 && st.Limit < s.chunk {
		return invalid("storage %s: a limit of %s holds no chunk of %s", st.Path, control.FormatSize(st.Limit), control.FormatSize(s.chunk))
	}
	place, err := d.host.OpenPlace(st.Path)
	if err != nil {
		return fail(err, "storage %s", st.Path)
	}
	if st.Warning, err = d.checkPlace(place); err != nil {
		place.Close()
		return fail(err, "storage %s", st.Path)
	}
	overwrite := st.Overwrite || st.OverwriteFile && place.Kind() == unix.S_IFREG
	d.step("allocate storage in %s", st.Path)
	if err := s.live.Append(snapshots.StorageConfig{
		Place: place, Where: d.host.Where(place), Limit: st.Limit, Overwrite: overwrite, Probe: d.probe,
	}); err != nil {
		if hanging := s.live.Returning(); len(hanging) > 0 {
			d.o.Log.Warn("storage that was not appended does not answer: it is given back when it does", "snapshot", s.id, "storage", asKnown(strings.Join(hanging, ", ")))
		}
		return snapshotError(err, "storage %s", st.Path)
	}
	d.mu.Lock()
	s.storage = append(s.storage, st)
	d.mu.Unlock()
	return nil
}

// probe says what a block device holds, which may not answer.
func (d *Daemon) probe(dev *os.File) (string, error) {
	if d.o.Prober == nil {
		return "", errors.New("the daemon could not start its prober")
	}
	ctx, cancel := context.WithTimeout(context.Background(), d.o.Config.StorageTimeout)
	defer cancel()
	return d.o.Prober.Probe(ctx, dev)
}

// checkPlace refuses storage on a disk with a filter: a write to the storage that
// needed a copy to the storage would wait for itself. It returns what could not be
// found out about the place.
func (d *Daemon) checkPlace(p *disk.Place) (warning string, err error) {
	for _, v := range d.sorted() {
		on, err := d.host.LiesOn(p, v.disk.Num, d.below)
		var doubt *disk.Error
		switch {
		case on && err == nil:
			return "", &control.Error{Code: control.Busy, Errno: unix.EBUSY, Fix: "choose a place on another disk",
				Message: fmt.Sprintf("lies on %s, which has the filter %s", v.Original, v.Name)}
		case on && errors.As(err, &doubt):
			return "", &control.Error{Code: control.Busy, Errno: unix.EBUSY, Fix: "choose a place on another disk",
				Message: fmt.Sprintf("perhaps lies on %s, which has the filter %s: it %s", v.Original, v.Name, doubt.What)}
		case errors.Is(err, disk.ErrUnknown) && errors.As(err, &doubt):
			warning = "not known on which disk, and it must not be one with a filter: " + doubt.What
		case err != nil:
			return "", err
		}
	}
	if warning != "" {
		d.o.Log.Warn("storage may lie anywhere", "storage", p.Path, "warning", warning)
	}
	return warning, nil
}

// TakeSnapshot implements control.API.
func (d *Daemon) TakeSnapshot(ctx context.Context, r control.TakeRequest) (control.Snapshot, error) {
	end, err := d.begin(ctx, "take snapshot %s", r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	s, err := d.usable(r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	if err := d.take(ctx, s, r); err != nil {
		return control.Snapshot{}, snapshotError(err, "take snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

func (d *Daemon) take(ctx context.Context, s *snapshot, r control.TakeRequest) error {
	if s.live.Taken() {
		return snapimage.ErrTaken
	}
	o := snapshots.TakeOptions{Limit: d.o.Config.FreezeTimeout}
	defer func() {
		for _, f := range o.Freeze {
			f.Close()
		}
	}()
	if !r.NoFreeze {
		for _, m := range d.mountsOver(s) {
			f, err := d.host.OpenMount(m)
			if err != nil {
				return fmt.Errorf("open the filesystem on %s: %w", m.Point, err)
			}
			o.Freeze = append(o.Freeze, f)
		}
	}
	d.step("take snapshot %s: %d filesystems to freeze, writes to wait for", s.id, len(o.Freeze))
	if err := d.rememberFrozen(o.Freeze); err != nil {
		return err
	}
	frozen, err := s.live.Take(ctx, o)
	_ = os.Remove(d.frozenFile())
	if err != nil {
		if s.live.Taken() {
			return d.undo(s, err)
		}
		return err
	}
	if err := d.makeImages(ctx, s); err != nil {
		return d.undo(s, fmt.Errorf("make images: %w: the snapshot is destroyed", err))
	}
	now := time.Now()
	d.mu.Lock()
	s.taken, s.frozen = &now, frozen
	d.mu.Unlock()
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventTaken})
	d.o.Log.Info("snapshot taken", "snapshot", s.id, "frozen", frozen)
	return nil
}

// frozenFile names the filesystems that a take has frozen: one that is killed
// before it can thaw them would leave them standing still for good.
func (d *Daemon) frozenFile() string { return filepath.Join(d.o.Dir.State(), "frozen") }

func (d *Daemon) rememberFrozen(mounts []*os.File) error {
	if len(mounts) == 0 {
		return nil
	}
	var b strings.Builder
	for _, m := range mounts {
		fmt.Fprintf(&b, "%s\x00", m.Name())
	}
	return os.WriteFile(d.frozenFile(), []byte(b.String()), 0o600)
}

// thawLeftover thaws what a dead daemon had frozen.
func (d *Daemon) thawLeftover() {
	b, err := os.ReadFile(d.frozenFile())
	if err != nil {
		return
	}
	for _, point := range slices.Backward(strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")) {
		f, err := d.host.Open(point, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err == nil {
			err = snapshots.Thaw(f, d.o.Config.FreezeTimeout)
			f.Close()
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			d.o.Log.Warn("cannot thaw what a dead daemon froze", "filesystem", point, "error", err)
			continue
		}
		d.o.Log.Warn("a filesystem that a dead daemon froze goes on", "filesystem", point)
	}
	_ = os.Remove(d.frozenFile())
}

// mountsOver are the filesystems on the snapshot's devices, each once.
func (d *Daemon) mountsOver(s *snapshot) []disk.Mount {
	var out []disk.Mount
	seen := map[disk.Num]bool{}
	for _, im := range s.images {
		for _, m := range d.host.MountsOver(im.of.dev.Num, d.below) {
			if !seen[m.Num] {
				seen[m.Num] = true
				out = append(out, m)
			}
		}
	}
	return out
}

// maxImageDepth bounds the requests in flight per queue of an image: without
// zero copy each has a buffer that is locked in memory, for every snapshot anew.
const maxImageDepth = 64

func (d *Daemon) makeImages(ctx context.Context, s *snapshot) error {
	for i, im := range s.images {
		d.step("take snapshot %s: make the image of %s", s.id, im.of.Name)
		name := filepath.Join(imageDir, im.of.Name+"-"+s.id)
		geo := im.of.geo
		// An image outlives no power failure, so there is nothing to flush; and
		// a trim of it must not fill the storage with zeroes.
		geo.ReadOnly, geo.VolatileCache, geo.FUA = false, false, false
		geo.MaxDiscard, geo.DiscardGranularity, geo.MaxWriteZeroes = 0, 0, 0
		// Payloads go to the storage as well, whatever it is.
		geo.DMAMask |= sector.Size - 1
		dev, err := d.addUblk(ctx, imageKind, im.of.Name+"-"+s.id, ublk.Config{
			Name: im.of.Name + "@", Queues: im.of.Queues, Depth: min(im.of.Depth, maxImageDepth), MaxIO: ublk.DefaultMaxIO,
			Mode: im.of.dev.Mode, Geometry: geo, NoPartScan: true,
			Recovery:   im.of.Recovery,
			Files:      []*blockdev.OSFile{im.of.orig},
			NewHandler: func(_ int, bq blockdev.Queue) ublk.Handler { return s.live.Image(i).NewQueue(bq) },
		})
		d.mu.Lock()
		im.dev, im.take = dev, s.live.TakeInfo(i)
		d.mu.Unlock()
		if err != nil {
			return err
		}
		l, err := d.link(ctx, name, dev)
		if err != nil {
			return err
		}
		d.mu.Lock()
		im.link = l
		d.mu.Unlock()
	}
	return nil
}

// DestroySnapshot implements control.API.
func (d *Daemon) DestroySnapshot(ctx context.Context, id string) error {
	s, err := d.beginDestroy(ctx, id)
	if err != nil {
		return err
	}
	// Nobody else has to wait for its storage.
	if err := d.awaitGone(ctx, s); err != nil {
		return snapshotError(err, "destroy snapshot %s", s.id)
	}
	return nil
}

func (d *Daemon) beginDestroy(ctx context.Context, id string) (*snapshot, error) {
	end, err := d.begin(ctx, "destroy snapshot %s", id)
	if err != nil {
		return nil, err
	}
	defer end()
	s, err := d.findSnapshot(id)
	if err != nil {
		return nil, err
	}
	if err := d.end(s); err != nil {
		return nil, snapshotError(err, "destroy snapshot %s", s.id)
	}
	return s, nil
}

// destroyBroken destroys a snapshot because its device v is removed by force.
func (d *Daemon) destroyBroken(id string, v *device) error {
	s, err := d.findSnapshot(id)
	if err != nil {
		return err
	}
	if s.taken != nil && !s.leaving {
		d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventCorrupted, Device: v.OriginalNumber, Errno: -int(unix.ENODEV)})
		d.o.Log.Warn("snapshot broken by the removal of its device", "snapshot", s.id, "name", v.Name)
	}
	return d.destroy(s)
}

// undo destroys a snapshot with which something failed; needs change. What does
// not answer has been waited for by then.
func (d *Daemon) undo(s *snapshot, err error) error {
	if errors.Is(err, snapshots.ErrStuck) {
		return errors.Join(err, d.end(s))
	}
	return errors.Join(err, d.destroy(s))
}

// destroy ends a snapshot and waits for it, with an end; needs change.
func (d *Daemon) destroy(s *snapshot) error {
	if err := d.end(s); err != nil {
		return err
	}
	return d.awaitGone(context.Background(), s)
}

// end removes the images of a snapshot and begins to give the rest back; needs
// change. With an error the snapshot is still there, less what of it could be
// removed.
func (d *Daemon) end(s *snapshot) error {
	d.mu.Lock()
	s.leaving = true
	d.mu.Unlock()
	if s.ending {
		return nil
	}
	// First of all, so that whatever hangs below, the original disks do not.
	broken := s.live.Err() == unix.EIO || s.live.Err() == unix.ETIMEDOUT
	s.live.Abort()
	for _, im := range s.images {
		if im.dev == nil {
			continue
		}
		d.step("destroy snapshot %s: remove the image of %s", s.id, im.of.Name)
		if err := d.removeUblk(im.dev, im.link); err != nil {
			return err
		}
		d.mu.Lock()
		im.dev = nil
		d.mu.Unlock()
	}
	d.step("destroy snapshot %s: give the storage back", s.id)
	d.mu.Lock()
	s.ending = true
	d.mu.Unlock()
	go d.giveBack(s, broken)
	return nil
}

// giveBack gives memory and storage of a snapshot without images back, beside
// all other work: a storage that does not answer is waited for without an end.
func (d *Daemon) giveBack(s *snapshot, broken bool) {
	s.live.Destroy()
	s.use.Lock()
	d.mu.Lock()
	s.gone = true
	d.mu.Unlock()
	s.use.Unlock()
	if err := s.live.GiveBack(); err != nil {
		// Nothing uses them any more: what is left is files.
		d.o.Log.Error("storage or state not given back", "snapshot", s.id, "error", asKnown(err.Error()))
		if !broken { // storage that does not work can not be emptied either
			s.failed = err
		}
	}
	d.mu.Lock()
	delete(d.snapshots, s.id)
	d.mu.Unlock()
	d.o.Log.Info("snapshot destroyed", "snapshot", s.id)
	close(s.over)
}

// awaitGone waits until nothing is left of a snapshot that ends, within the
// limit for storage; change is not needed.
func (d *Daemon) awaitGone(ctx context.Context, s *snapshot) error {
	select {
	case <-s.over:
		return s.failed
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d.o.Config.StorageTimeout):
	}
	s.use.RLock()
	hanging := s.hanging()
	s.use.RUnlock()
	d.o.Log.Warn("a disk of a destroyed snapshot does not answer: what is left is given back when it does", "snapshot", s.id, "disks", hanging)
	return fmt.Errorf("%s: %w: what is left of the snapshot goes by itself when it does", strings.Join(hanging, ", "), snapshots.ErrStuck)
}

// hanging are the disks that the log of a snapshot waits for, storage or
// originals, and storage that does not come back; needs use.
func (s *snapshot) hanging() []string {
	names := s.live.Returning()
	if !s.gone {
		names = append(names, s.live.UnderWay()...)
	}
	if len(names) == 0 {
		names = []string{"a disk"} // whose name is not known
	}
	for i, name := range names {
		names[i] = asKnown(name)
	}
	return names
}

// tell passes on the events of a snapshot until it is destroyed, and gives it
// up when writes have to wait too long for its storage.
func (d *Daemon) tell(s *snapshot) {
	limit := d.o.Config.StorageTimeout
	look := time.NewTicker(limit / 8)
	defer look.Stop()
	var moved time.Time // when the log last got on, or nobody waited
	var done uint64     // as of the last look
	for {
		var e diffarea.Event
		select {
		case now := <-look.C:
			s.use.RLock()
			if waits, n := s.live.Waiting(); !waits || n != done || moved.IsZero() {
				moved, done = now, n
			} else if now.Sub(moved) >= limit && !s.gone && s.live.Err() == 0 {
				d.o.Log.Error("writes wait for another disk than their own, which does not answer: the snapshot is given up", "snapshot", s.id, "for", limit, "disks", s.hanging())
				s.live.GiveUp(unix.ETIMEDOUT)
			}
			s.use.RUnlock()
			continue
		case e = <-s.told:
		case <-s.over:
			select {
			case e = <-s.told:
			default:
				d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventDestroyed})
				return
			}
		}
		ev := control.Event{Snapshot: s.id, Kind: e.Kind.String(), Sectors: e.Sectors, Errno: -int(e.Errno)}
		if e.Device != 0 {
			ev.Device = disk.Num{Major: unix.Major(e.Device), Minor: unix.Minor(e.Device)}.String()
		}
		said := []any{"snapshot", s.id, "event", ev.Kind, "device", ev.Device, "sectors", ev.Sectors}
		if e.Errno != 0 {
			said = append(said, "error", e.Errno)
		}
		d.o.Log.Warn("snapshot", said...)
		d.events.emit(ev)
	}
}

// Snapshots implements control.API.
func (d *Daemon) Snapshots(context.Context) ([]control.Snapshot, error) {
	out := []control.Snapshot{}
	for _, s := range d.sortedSnapshots() {
		out = append(out, d.describeSnapshot(s))
	}
	return out, nil
}

// Snapshot implements control.API.
func (d *Daemon) Snapshot(_ context.Context, id string) (control.Snapshot, error) {
	s, err := d.findSnapshot(id)
	if err != nil {
		return control.Snapshot{}, err
	}
	return d.describeSnapshot(s), nil
}

func (d *Daemon) describeSnapshot(s *snapshot) control.Snapshot {
	out := control.Snapshot{ID: s.id, State: control.SnapshotCreated, Created: s.created, ChunkSize: s.chunk, Images: []control.SnapshotImage{}, Storage: []control.Storage{}}
	s.use.RLock()
	if !s.gone {
		u := s.live.Usage()
		out.Usage = control.SnapshotUsage{
			Copied:   u.Regions * u.ChunkSize,
			Stored:   (u.Regions - u.Unstored) * u.ChunkSize,
			Capacity: u.Capacity * u.ChunkSize,
		}
		out.Errno = -int(s.live.Err())
	} else {
		out.Errno = -int(unix.ESHUTDOWN)
	}
	s.use.RUnlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	out.Taken, out.Frozen = s.taken, s.frozen
	out.Storage = append(out.Storage, s.storage...)
	switch {
	case s.leaving:
		out.State = control.SnapshotDestroying
	case out.Errno != 0:
		out.State = control.SnapshotCorrupted
	case s.taken != nil:
		out.State = control.SnapshotTaken
	}
	for _, im := range s.images {
		x := control.SnapshotImage{Device: im.of.Name, Original: im.of.Original, Errno: out.Errno}
		if im.dev != nil {
			x.Path, x.Link = im.dev.Path, im.link
			take := takeOf(im.take)
			x.Take = &take
		}
		out.Images = append(out.Images, x)
	}
	return out
}

// WaitEvent implements control.API.
func (d *Daemon) WaitEvent(ctx context.Context, r control.WaitRequest) (control.Event, error) {
	u, err := uuid.Parse(r.ID)
	if err != nil {
		return control.Event{}, invalid("snapshot %q: not a UUID", r.ID)
	}
	r.ID = u.String()
	return d.events.wait(ctx, r)
}

// Watch implements control.API.
func (d *Daemon) Watch(ctx context.Context, id string, each func(control.Event) error) error {
	if id != "" {
		u, err := uuid.Parse(id)
		if err != nil {
			return invalid("snapshot %q: not a UUID", id)
		}
		id = u.String()
	}
	return d.events.watch(ctx, id, each)
}
