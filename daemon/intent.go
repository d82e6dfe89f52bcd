package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

// A change map goes on after a power failure, because its device has a write-intent log
// (package intentlog) in the state directory. Package cbtstate says which files there
// are, and what has to hold for them to be believed.
//
//	begin ──> covered ── the log fails, or does not answer ──> stop ──> let the writes go
//	  ^          │ after each take, a new base                                 │
//	  │          └ after writes, a look at the superblocks                     │
//	  └────────────────────────── again and again ─────────────────────────────┘

// intent is the write-intent log of a device, and what keeps it.
type intent struct {
	d        *Daemon
	dev      *device
	identity disk.Identity
	log      *intentlog.Log
	memory   []byte            // of the log
	file     *blockdev.OSFile  // of the log: whatever file its descriptor is of now
	counters []filter.Counters // of the device's queues
	name     string

	// state is held while what is kept of the disk in the state directory changes,
	// however long that takes.
	state sync.Mutex
	// Under state: the record that counts, if its ID is not nil, and whether there shall
	// be none any more, because the device goes.
	record cbtstate.Record
	ended  bool

	mu      sync.Mutex
	gone    bool   // nobody may look at the disk any more
	reason  string // why a power failure would cost the history; empty if it would not
	told    bool   // of that reason
	stopped bool   // there is no record that counts: durably so

	failed chan error    // the log is to be given up; has place for one
	wake   chan struct{} // a new base is wanted; has place for one
	due    chan struct{} // a look at the disk is due; has place for one
	stop   context.CancelFunc
	done   chan struct{} // closed when nobody looks after the log any more

	// looked is how many requests had changed the disk at the last look at it.
	looked atomic.Uint64
	// Of the watch's goroutine, and when a look was last due.
	stalled stall
	lastDue time.Time
}

const (
	// stopAgain is how long to wait before a record is taken back again.
	stopAgain = 200 * time.Millisecond
	// beginAgain is how long to wait before a log that has failed is begun anew; it
	// doubles up to beginAgainLimit.
	beginAgain      = 10 * time.Second
	beginAgainLimit = 10 * time.Minute
)

// newIntent makes the log of a device of size bytes that shall have one, off. It has no file
// yet, and follows no map.
func (d *Daemon) newIntent(dev *device, name string, zone, size int64) (in *intent, err error) {
	in = &intent{d: d, dev: dev, name: name, counters: dev.counters.queues, reason: "it has not begun", failed: make(chan error, 1), wake: make(chan struct{}, 1), due: make(chan struct{}, 1), done: make(chan struct{})}
	if in.identity, err = d.host.Identify(dev.disk); err != nil {
		return nil, err
	}
	shift := intentlog.DefaultZoneShift(size)
	if zone != 0 {
		shift = uint8(bits.TrailingZeros64(uint64(zone)))
	}
	if in.memory, err = unix.Mmap(-1, 0, int(intentlog.FileSize(size, shift)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, fmt.Errorf("get memory: %w", err)
	}
	fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		in.file = blockdev.NewOSFile(fd, "the write-intent log of "+dev.disk.DisplayPath())
		in.log, err = intentlog.New(intentlog.Config{
			Size: size, ZoneShift: shift, Orig: dev.orig, Queue: d.logs, File: in.file, Memory: in.memory,
			Failed: func(err error) { in.fail(err) },
		})
	}
	if err != nil {
		in.free()
		return nil, err
	}
	return in, nil
}

// fail tells whoever looks after the log that it is to be given up. It does not wait.
func (in *intent) fail(err error) {
	select {
	case in.failed <- err:
	default:
	}
}

// free frees what a log is made of that nobody uses any more.
func (in *intent) free() {
	if in.file != nil {
		_ = in.file.Close()
	}
	_ = unix.Munmap(in.memory)
}

// makeFilter makes a device's filter, with a log unless zone is negative. A device whose
// log cannot be had has a reason in its place: that is never an error.
func (d *Daemon) makeFilter(dev *device, name string, queues int, zone int64) {
	c := filter.Config{Orig: dev.orig, Size: dev.geo.Size, CBT: dev.cbt, Queues: queues, Counters: dev.counters.queues}
	switch {
	case dev.attached != nil:
		dev.uncovered = attachedUncovered
	case d.opts.Config.StateDir == "":
		dev.uncovered = "nothing is kept: state_dir is empty"
	case zone < 0:
		dev.uncovered = "intent_log is off"
	default:
		in, err := d.newIntent(dev, name, zone, dev.geo.Size)
		if err != nil {
			dev.uncovered = publicPaths(err.Error())
			d.opts.Log.Warn("a power failure will cost the history of changes", "name", name, "reason", dev.uncovered)
			break
		}
		in.log.Follow(dev.cbt)
		dev.intent, c.Intent = in, in.log
	}
	dev.filter = filter.New(c)
}

// begin begins the log under the map as it is now, before the first write is served, and
// looks after it from then on. If the state directory has not answered before, it is left
// for later.
func (in *intent) begin(ctx context.Context, answers bool) {
	timeout := in.d.opts.Config.DiskTimeout
	limited, cancel := context.WithTimeout(ctx, timeout/4)
	defer cancel()
	err := in.d.stateHangs()
	if answers {
		err = in.tryBegin(limited)
	}
	if err != nil {
		in.uncovered(err)
		in.log.GiveUp()
	}
	if err != nil && answers {
		limited, cancel := context.WithTimeout(ctx, timeout/8)
		defer cancel()
		_ = in.stopRecord(limited) // else it is tried again
	}
	looking, stop := context.WithCancel(context.Background())
	in.stop = stop
	in.d.watch.add(in)
	go in.look(looking)
}

// tryBegin begins the log, unless ctx ends before.
func (in *intent) tryBegin(ctx context.Context) error {
	return in.d.callState(ctx, func() error {
		in.state.Lock()
		defer in.state.Unlock()
		return in.beginLocked(ctx)
	})
}

// beginLocked needs state.
func (in *intent) beginLocked(ctx context.Context) error {
	if in.ended || ctx.Err() != nil {
		return errors.New("the device goes away")
	}
	if !in.log.Idle() {
		return errors.New("the log of before is still being written")
	}
	select {
	case old := <-in.failed: // of the log before
		in.d.opts.Log.Debug("a log that was given up has failed", "name", in.name, "error", old)
	default:
	}
	store, err := in.d.openState(in.dev, true)
	if err != nil {
		return err
	}
	defer store.Close()
	id := uuid.New()
	counts, err := in.beginAs(ctx, store, id)
	if err == nil {
		store.Tidy(in.identity, id)
		in.covered()
		return nil
	}
	if counts {
		err = errors.Join(err, in.stopLocked())
	} else {
		store.RemoveLog(in.identity, id)
	}
	in.log.GiveUp()
	return err
}

// beginAs begins the log under that ID, with a base, and then has its record count; needs
// state. counts: after an error the record may count.
func (in *intent) beginAs(ctx context.Context, store *cbtstate.Store, id uuid.UUID) (counts bool, err error) {
	if err := in.startLog(ctx, store, id); err != nil {
		return false, err
	}
	base, err := in.base()
	if err != nil {
		return false, err
	}
	if err := store.WriteBase(in.identity, id, base); err != nil {
		return false, err
	}
	r := cbtstate.Record{ID: id, Name: in.name, Path: in.dev.disk.DisplayPath(), Program: control.Version, Saved: time.Now()}
	r.Identity, r.Size, r.Machine = in.identity, in.dev.geo.Size, in.d.host.MachineID()
	if r.Boot, err = disk.BootID(); err != nil {
		return false, err
	}
	if r.Fingerprint, err = in.superblocks(ctx, nil); err != nil {
		return false, err
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	if err := store.Run(r); err != nil {
		return true, err
	}
	// What was kept at a clean end says the same, until the first write is served.
	if err := store.Use(in.identity); err != nil {
		return true, err
	}
	if err := in.log.Committed(base); err != nil {
		return true, err
	}
	in.record = r
	return true, nil
}

// startLog switches the log on, in a new file; needs state.
func (in *intent) startLog(ctx context.Context, store *cbtstate.Store, id uuid.UUID) error {
	f, err := store.NewLog(in.identity, id, int64(len(in.memory)))
	if err != nil {
		return err
	}
	err = unix.Dup3(int(f.Fd()), in.file.Fd(), unix.O_CLOEXEC)
	f.Close()
	if err == nil {
		started := make(chan error, 1)
		in.log.Start(id, func(err error) { started <- err })
		select {
		case err = <-started:
		case err = <-in.failed:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return fmt.Errorf("begin the log: %w", err)
	}
	return nil
}

// base is a new base, of the map as it is now.
func (in *intent) base() ([]byte, error) {
	release, err := in.dev.hold()
	if err != nil {
		return nil, err
	}
	defer release()
	return in.log.Base(in.dev.cbt)
}

// superblocks is the running fingerprint of the disk. Unless it is the known one, it is durable: what goes on record must
// not be lost with a write cache of the disk, or the disk would look as if somebody had written to it.
func (in *intent) superblocks(ctx context.Context, known []fingerprint.Place) ([]fingerprint.Place, error) {
	in.mu.Lock()
	fd, err := -1, errors.New("the device goes away")
	if !in.gone {
		fd, err = duplicate(in.dev)
	}
	in.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	r, err := fingerprint.OpenDirect(fd, in.dev.geo.LogicalBlock)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	now, err := fingerprint.Running(ctx, r, in.dev.geo.Size, in.dev.geo.LogicalBlock)
	if err != nil || slices.Equal(now, known) {
		return now, err
	}
	if err := unix.Fdatasync(fd); err != nil {
		return nil, fmt.Errorf("flush %s: %w", in.dev.disk.DisplayPath(), err)
	}
	return now, nil
}

// end is for a device that serves nobody any more: nobody looks after its log, and
// nothing changes in the state directory, once it has returned without an error. The
// record counts as before.
func (in *intent) end(ctx context.Context) error {
	in.mu.Lock()
	first := !in.gone
	in.gone = true
	in.mu.Unlock()
	if first && in.stop == nil {
		close(in.done)
	} else if first {
		in.stop()
	}
	err := in.d.callState(ctx, func() error {
		in.state.Lock()
		in.ended = true
		in.state.Unlock()
		<-in.done
		return nil
	})
	in.log.GiveUp()
	if first {
		go func() {
			<-in.done
			for !in.log.Idle() {
				time.Sleep(time.Second)
			}
			in.free()
		}()
	}
	return err
}

// powerFailure is what is told of a device.
func (dev *device) powerFailure() control.PowerFailure {
	in := dev.intent
	if in == nil {
		return control.PowerFailure{Reason: dev.uncovered}
	}
	s := in.log.Status()
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.reason != "" {
		return control.PowerFailure{Reason: in.reason}
	}
	return control.PowerFailure{Covered: true, ZoneSize: s.Zone, ZoneCount: s.Zones, Logged: s.Logged}
}
