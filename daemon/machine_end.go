package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// The end of the machine. systemd tells of it by a signal of its own, SIGPWR (KillSignal
// in the unit), because the unit refuses any other stop before it begins. A stop that
// somebody asks for removes all filters or none. This one removes each as soon as nobody
// uses it, and destroys the snapshots, which no restart survives:
//
//	SIGPWR ──> no more additions ──> snapshots ──> each free filter, its map saved ──┐
//	                                     ^                                           │
//	                                     └── some are in use: again, a moment later ─┴──> the end
//
// What is stacked on a filter (swap, logical volumes, arrays) ends beside this or after
// it: systemd-shutdown takes that apart when it has killed all processes. It spares this
// one, which therefore serves to the end. A script that it runs last of all waits for this
// process (dist/ublk-blksnap.shutdown).

// ending is how far the end of the machine is.
type ending struct {
	begun atomic.Bool
	// untilEnd ends then.
	untilEnd context.Context
	end      context.CancelFunc
	// failed are the filters that nobody seemed to use, and that could not be removed all
	// the same, because their disks do not answer or for another reason: they come after
	// the others, and systemd is not asked again to wait for them; under Daemon.opLock.
	failed map[string]bool
}

// endRetry is how often the end is tried again while filters are in use.
const endRetry = 250 * time.Millisecond

func (e *ending) begin() {
	e.begun.Store(true)
	if e.end != nil {
		e.end()
	}
}

// beginNew is begin for what adds something, which the end of the machine refuses.
func (d *Daemon) beginNew(ctx context.Context, format string, args ...any) (end func(), err error) {
	end, err = d.begin(ctx, format, args...)
	if err == nil && d.ending.begun.Load() {
		end()
		return nil, fail(&control.Error{Code: control.Busy, Errno: unix.ESHUTDOWN, Message: "the machine is being stopped"}, format, args...)
	}
	return end, err
}

// EndWithMachine implements stopper.
func (d *Daemon) EndWithMachine(ctx context.Context) (err error) {
	d.ending.begin()
	end, err := d.begin(ctx, "end with the machine")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	var used []string
	note := func(name string, err error) { used = append(used, name+": "+err.Error()) }
	stop := func() {}
	for _, s := range d.sortedSnapshots() {
		if !s.destroying { // once: if it takes too long, nobody waits for it
			stop()
			stop = extendStop()
			d.opts.Log.Warn("the machine ends, and a held snapshot with it", "snapshot", s.id)
			s.snap.StayNoted()
		}
		if err := d.startDestroy(s); err != nil {
			note("snapshot "+s.id, err)
		}
	}
	d.awaitReleased(settleLimit)
	stop()
	all := d.sortedDevices()
	slices.SortStableFunc(all, func(a, b *device) int { return order(d.ending.failed[a.Name]) - order(d.ending.failed[b.Name]) })
	for _, dev := range all {
		if err := d.endDevice(ctx, dev); err != nil {
			note(dev.Name, err)
		}
	}
	for _, w := range d.sortedWaiting() { // its disk may be back
		d.tryAgain(ctx, w)
	}
	for _, w := range d.sortedWaiting() {
		note(w.record.Name, w.reason)
	}
	if left := len(d.sortedDevices()); len(used) == 0 && left > 0 {
		note("filters", fmt.Errorf("%d are served again", left))
	}
	if len(used) > 0 {
		return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: publicPaths(strings.Join(used, "; "))}
	}
	defer extendStop()()
	d.awaitReleased(d.opts.Config.StorageTimeout)
	for _, s := range d.sortedSnapshots() {
		d.opts.Log.Warn("storage of a snapshot is not given back: the next boot does that", "snapshot", s.id)
	}
	d.finishStop()
	return nil
}

func order(last bool) int {
	if last {
		return 1
	}
	return 0
}

// endDevice removes a filter that nobody uses.
func (d *Daemon) endDevice(ctx context.Context, dev *device) error {
	if err := d.checkIdle(dev); err != nil {
		return err
	}
	if !d.ending.failed[dev.Name] {
		defer extendStop()()
	}
	err := d.removeIdle(ctx, dev)
	if err == nil {
		d.opts.Log.Info("removed, because the machine ends", "name", dev.Name, "disk", dev.Original)
	} else {
		if d.ending.failed == nil {
			d.ending.failed = map[string]bool{}
		}
		d.ending.failed[dev.Name] = true
	}
	return err
}

// awaitReleased waits until nothing is left of the snapshots that are being destroyed.
func (d *Daemon) awaitReleased(limit time.Duration) {
	late := time.After(limit)
	for _, s := range d.sortedSnapshots() {
		select {
		case <-s.destroyed:
		case <-late:
			return
		}
	}
}

// endWithMachine tries until the daemon has ended.
func (o *Options) endWithMachine(ctx context.Context, api notifier) {
	if err := spareAtEnd(); err != nil {
		o.Log.Warn("a filter that is in use to the end of the machine may be cut from its disk", "error", err)
	}
	said := ""
	for ctx.Err() == nil {
		err := api.EndWithMachine(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		if said == "" && o.Prober != nil {
			o.Prober.Close() // which ignores SIGTERM, so systemd-shutdown would wait for it
		}
		if err.Error() != said {
			said = err.Error()
			o.Log.Warn("the machine ends, and filters are in use: they are served until they are not", "filters", said)
		}
		select {
		case <-ctx.Done():
		case <-time.After(endRetry):
		}
	}
}

// spareAtEnd has systemd-shutdown spare this process when it kills all others: it does so
// if the first argument begins with "@". The kernel reads the arguments from the
// process's memory.
func spareAtEnd() error { return setFirstArgument('@') }

// setFirstArgument changes the first character of the process's arguments.
func setFirstArgument(c byte) error {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return err
	}
	// After the name, which may hold anything, come fields 3 and on; 48 is arg_start.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 48-2 {
		return fmt.Errorf("/proc/self/stat has %d fields", len(fields)+2)
	}
	at, err := strconv.ParseInt(fields[48-3], 10, 64)
	if err != nil {
		return err
	}
	memory, err := os.OpenFile("/proc/self/mem", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = memory.WriteAt([]byte{c}, at)
	return errors.Join(err, memory.Close())
}
