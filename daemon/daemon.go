package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Daemon does what the API says, on this machine.
type Daemon struct {
	opts     Options
	started  time.Time
	host     *disk.Host
	ctl      *ublk.Control
	canGrow  bool                // the driver can change the size of a disk
	queue    *blockdev.RingQueue // control work of snapshots
	stores   *blockdev.RingQueue // writes to their storages
	logs     *blockdev.RingQueue // of write-intent logs
	events   *eventLog
	activity atomic.Pointer[string]

	// opLock is a lock that is held through every operation that changes anything.
	// It is a channel with one place, so that a caller can stop waiting for it.
	opLock chan struct{}

	// mu guards the tables below. It is taken after opLock and never held during
	// I/O. The things in the tables change only under both locks, so that either of
	// them suffices to read.
	mu        sync.Mutex
	devices   map[string]*device // by name
	snapshots map[string]*snapshot
	waiting   map[string]*survivor // by name: devices that could not be taken over yet
	lost      *control.Lost        // see notTakenOver
	// attachedFound are the filters under volumes in use that the daemon before has left;
	// takingOver: not all are served yet, or wait.
	attachedFound []string
	takingOver    bool

	// Under opLock: what is kept of disks that must not be believed any more, and
	// could not be used up yet; see outdated.
	outdated []outdated
	// outdatedDamaged: what the daemon before had in it cannot be read, so that nothing that
	// is kept is believed.
	outdatedDamaged error
	// Under opLock: what of the above is on record, if a record is kept.
	recorded bool
	onRecord []byte

	// What this daemon has found at its start.
	predecessor int                    // the process that died
	recovered   *control.Recovered     // nil: there was nothing
	damaged     []control.LostDevice   // that are not taken over; under opLock
	gone        []*survivor            // whose history is not settled yet; the same
	ended       []control.LostSnapshot // the same
	// Under opLock: those that a loss of power has ended, since the start.
	lostSnapshots []control.LostSnapshot
	cleared       map[string]bool    // of which nothing is left
	unnoted       map[uuid.UUID]bool // snapshots that have no note, under mu

	endsChanged chan struct{} // see lookAtEnds
	tablesTold  chan struct{} // see lookAtTables

	boot  bootDisks
	watch intentWatch

	eventsDropped atomic.Uint64 // of snapshots: queue threads do not wait
	attachedAnew  atomic.Uint64 // volumes

	frozen struct {
		sync.Mutex
		points []frozenPoint // that are on record: see changeFrozen
	}
	lateFreeze *lateFreeze // of the take under way; opLock guards it

	ending ending

	stopRetry context.CancelFunc
}

var _ control.API = (*Daemon)(nil)

// New opens the ublk driver and takes over what a dead daemon left. The
// run directory is locked, with the state directory mounted.
func New(o Options) (*Daemon, error) {
	d := &Daemon{
		opts: o, started: time.Now(), host: o.host(),
		opLock: make(chan struct{}, 1), devices: map[string]*device{}, snapshots: map[string]*snapshot{},
		waiting: map[string]*survivor{},
		cleared: map[string]bool{}, unnoted: map[uuid.UUID]bool{}, endsChanged: make(chan struct{}, 1), tablesTold: make(chan struct{}, 1),
	}
	d.activity.Store(new(string))
	d.ending.untilEnd, d.ending.end = context.WithCancel(context.Background())
	err := errors.Join(o.Dir.subdir(stateName, 0o700), o.Dir.subdir(udevName, 0o755))
	if err != nil {
		return nil, fail(err, "make the state directory")
	}
	for _, dir := range []string{d.cbtDir(), d.countersDir(), d.devicesDir(), d.snapshotsDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fail(err, "make the state directory")
		}
	}
	if d.ctl, err = ublk.OpenControl(); err != nil {
		return nil, driverError(err, "start the daemon")
	}
	d.canGrow = d.ctl.Has(uapi.UBLK_F_UPDATE_SIZE)
	if d.queue, err = blockdev.NewRingQueue(blockdev.RingConfig{Name: "snapshots", Depth: 64}); err != nil {
		d.ctl.Close()
		return nil, driverError(err, "start the daemon")
	}
	// So many that what waits for storages that do not answer holds up no other.
	if d.stores, err = blockdev.NewRingQueue(blockdev.RingConfig{Name: "stores", Depth: 256}); err != nil {
		d.queue.Stop()
		d.ctl.Close()
		return nil, driverError(err, "start the daemon")
	}
	if d.logs, err = blockdev.NewRingQueue(blockdev.RingConfig{Name: "intent-logs", Depth: 64}); err != nil {
		d.stores.Stop()
		d.queue.Stop()
		d.ctl.Close()
		return nil, driverError(err, "start the daemon")
	}
	if r, err := o.Dir.lastRecord(); err == nil {
		d.predecessor = r.PID
	} else if !errors.Is(err, fs.ErrNotExist) {
		o.Log.Error("who the daemon before was is not known", "error", err)
	}
	d.opLock <- struct{}{} // what is tried again later waits until all is taken over
	d.takeOver(context.Background())
	retrying, stop := context.WithCancel(context.Background())
	d.stopRetry = stop
	d.findLost(retrying)
	d.startRecord()
	go func() { // clients are answered meanwhile
		defer func() { <-d.opLock }()
		d.runOwedHooks()
		d.settle(context.Background())
	}()
	go d.retry(retrying)
	go d.watchDisks(retrying)
	go d.endInTime(retrying)
	go d.watchTables(retrying)
	d.startBoot(retrying)
	return d, nil
}

// driverError gives a code to each reason why this machine cannot have a device.
// The messages of these errors say what to do.
func driverError(err error, what string) error {
	var code control.Code
	switch {
	case errors.Is(err, ublk.ErrNoDriver), errors.Is(err, ublk.ErrTooOld), errors.Is(err, uring.ErrNotSupported):
		code = control.Unsupported
	case errors.Is(err, ublk.ErrPermission), errors.Is(err, uring.ErrDisabled):
		code = control.Denied
	default:
		return fail(err, "%s: open the ublk driver", what)
	}
	return &control.Error{Code: code, Message: what + ": " + err.Error()}
}

// CheckDriver loads the ublk driver if need be. Its error says why this machine
// does not have it.
func CheckDriver() error {
	ctl, err := ublk.OpenControl()
	if err != nil {
		return driverError(err, "look for the driver")
	}
	ctl.Close()
	return nil
}

func (d *Daemon) cbtDir() string       { return filepath.Join(d.opts.Dir.State(), "cbt") }
func (d *Daemon) snapshotsDir() string { return filepath.Join(d.opts.Dir.State(), "snapshots") }

// begin starts a change: it waits for its turn, and notes what is going on. The
// returned function ends the change. If the caller goes away while he waits,
// nothing is done.
func (d *Daemon) begin(ctx context.Context, format string, args ...any) (end func(), err error) {
	select {
	case d.opLock <- struct{}{}:
	case <-ctx.Done():
		return nil, notBegun(ctx, format, args...)
	}
	end = func() {
		d.saveRecord()
		d.activity.Store(new(string))
		notify("STATUS=" + d.summary())
		<-d.opLock
	}
	if ctx.Err() != nil {
		end()
		return nil, notBegun(ctx, format, args...)
	}
	d.step(format, args...)
	return end, nil
}

// notBegun is why a change had not its turn before ctx ended. If that was because another
// program takes over, a client may ask that one: see control.Client.
func notBegun(ctx context.Context, format string, args ...any) error {
	why := context.Cause(ctx)
	err := fail(why, format, args...)
	if errors.Is(why, errTakenOver) {
		err.Errno = unix.ERESTART
	}
	return err
}

// summary is what a daemon that does nothing in particular says of itself.
func (d *Daemon) summary() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.devices) == 0 {
		return "no filters"
	}
	return fmt.Sprintf("%d filters, %d snapshots; to be stopped with: ublk-blksnap daemon stop", len(d.devices), len(d.snapshots))
}

// step says what is going on now.
func (d *Daemon) step(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	d.activity.Store(&s)
}

// Info implements control.API.
func (d *Daemon) Info(context.Context) (control.Info, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return control.Info{
		Version: control.Version, PID: os.Getpid(), Started: d.started,
		RunDir: string(d.opts.Dir), Config: d.opts.ConfigPath, Activity: *d.activity.Load(), Recovered: d.recovered, Lost: d.lost, LogLinesLost: d.opts.Log.Lost(), LastEvent: d.events.last(),
		Unfiltered: d.unfiltered(),
	}, nil
}

// Stop implements control.API.
func (d *Daemon) Stop(ctx context.Context) (err error) {
	end, err := d.begin(ctx, "stop")
	if err != nil {
		return err
	}
	defer func() {
		// After a stop that succeeded the lock stays held, so that nothing can be
		// added any more.
		if err != nil {
			end()
			err = fail(err, "stop")
		}
	}()
	for _, w := range d.sortedWaiting() {
		return w.waitingError(w.record.Name)
	}
	all := d.sortedDevices()
	var nums []disk.Num
	for _, dev := range all {
		nums = append(nums, dev.ublk.Num)
	}
	d.awaitClosed(ctx, nums)
	for _, dev := range all {
		if err := d.checkIdle(dev); err != nil {
			return fail(err, "%s", dev.Name)
		}
	}
	// The sync may take long, or not end. So it comes before anything is removed.
	for _, dev := range all {
		if err := d.sync(ctx, dev); err != nil {
			return fail(err, "%s", dev.Name)
		}
	}
	for _, s := range d.sortedSnapshots() {
		if err := d.destroy(s); err != nil {
			return err
		}
	}
	var removed []string
	for _, dev := range all {
		if err := d.removeIdle(context.WithoutCancel(ctx), dev); err != nil {
			e := fail(err, "%s", dev.Name)
			if len(removed) > 0 {
				e.Message += "; already removed: " + strings.Join(removed, ", ")
			}
			return e
		}
		removed = append(removed, dev.Name)
	}
	d.finishStop()
	return nil
}

// finishStop is the end of a stop: no filter is left; needs opLock.
func (d *Daemon) finishStop() {
	d.forgetRemoved()
	if d.useOutdated(); len(d.outdated) > 0 {
		d.opts.Log.Error("what is kept of disks from before is out of date, and cannot be removed: remove it before they have filters in another boot",
			"directory", d.outdated[0].StateDir)
	}
	// Nothing will be missed when this daemon ends, so its record goes.
	if d.recorded {
		d.recorded = false
		if err := d.opts.Dir.remove(recordName); err != nil {
			d.opts.Log.Warn("cannot remove the record of the filters that this daemon had", "error", err)
		}
	}
}

// Close implements stopper.
func (d *Daemon) Close() {
	d.stopRetry()
	d.queue.Stop()
	// A file that does not answer may hold its queue up, and the process ends now.
	stopped, cancel := context.WithTimeout(context.Background(), settleLimit)
	defer cancel()
	for _, q := range []*blockdev.RingQueue{d.stores, d.logs} {
		_, _ = bounded.Call(stopped, func() error { q.Stop(); return nil }, func(error) {})
	}
	d.ctl.Close()
}

// Answers implements stopper.
func (d *Daemon) Answers(ctx context.Context) error {
	if err := d.queue.Answers(ctx); err != nil {
		return err
	}
	for _, dev := range d.served() {
		if err := dev.Answers(ctx); err != nil {
			return err
		}
	}
	return nil
}

// served are all our ublk devices: images first, then filters.
func (d *Daemon) served() (all []*ublk.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.snapshots {
		for _, im := range s.images {
			if im.ublk != nil {
				all = append(all, im.ublk)
			}
		}
	}
	for _, dev := range d.devices {
		if dev.ublk != nil {
			all = append(all, dev.ublk)
		}
	}
	return all
}

// lowerDisks names the disk under one of our own devices, for a search that goes
// down a stack of devices.
func (d *Daemon) lowerDisks(n disk.Num) []disk.Num {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range d.devices {
		if dev.ublk.Num == n {
			return []disk.Num{dev.disk.Num}
		}
	}
	for _, s := range d.snapshots {
		for _, im := range s.images {
			if im.ublk != nil && im.ublk.Num == n {
				return []disk.Num{im.device.disk.Num}
			}
		}
	}
	return nil
}

// withDiskTimeout is ctx with a limit for calls that wait for a disk, or for the
// driver, which may wait for a disk too.
func (d *Daemon) withDiskTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, d.opts.Config.DiskTimeout)
}
