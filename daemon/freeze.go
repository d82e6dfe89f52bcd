package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Around a take the prober freezes the filesystems, and thaws them if this daemon dies. If
// it dies too, the next daemon thaws what is on record. The prober may have to write to a
// filter before it can end, with the filesystem frozen. So that daemon thaws again until
// the prober has ended. What has not been frozen in time for its take may be frozen later, and
// is on record until it is thawed again.

// frozenPoint is the mount point of a filesystem that may be frozen.
type frozenPoint struct {
	Point string `json:"point"`
	// Device tells filesystems apart that have the same point in several mount namespaces.
	Device uint64 `json:"device,omitempty"`
	// PID and Process are who freezes.
	PID     int    `json:"pid"`
	Process string `json:"process"` // see processIdentity
}

// frozenRecord is in state/frozen.
type frozenRecord struct {
	Frozen []frozenPoint `json:"frozen"`
}

// Format 1 had the names of the points alone, format 2 one process for all of them.
const frozenKind, frozenFormat = "frozen", 3

func (d *Daemon) frozenFile() string { return filepath.Join(d.opts.Dir.State(), frozenKind) }

// lateFreeze is a freeze that a take could not wait for.
type lateFreeze struct {
	dir  *os.File
	died func() bool // of disk.Late
}

// rememberFrozen puts on record what is about to be frozen; needs opLock.
// Of each there is one point, in their order.
func (d *Daemon) rememberFrozen(mounts []*os.File) (points []frozenPoint, err error) {
	if len(mounts) == 0 {
		return nil, nil
	}
	pid := os.Getpid()
	if d.opts.Prober != nil {
		pid = d.opts.Prober.PID()
	}
	process := processIdentity(pid)
	for _, m := range mounts {
		var st unix.Stat_t
		if err := unix.Fstat(int(m.Fd()), &st); err != nil {
			return nil, fmt.Errorf("look at %s: %w", m.Name(), err)
		}
		points = append(points, frozenPoint{m.Name(), st.Dev, pid, process})
	}
	return points, d.changeFrozen(func(frozen []frozenPoint) ([]frozenPoint, error) {
		for _, p := range points {
			if slices.ContainsFunc(frozen, func(f frozenPoint) bool { return f.Point == p.Point && f.Device == p.Device }) {
				return nil, &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: p.Point + ": an earlier take had it frozen, or was about to, and it has not been thawed yet",
					Fix: "try again when its disk answers, or take without freezing"}
			}
		}
		return append(frozen, points...), nil
	})
}

// afterFreeze takes off the record what a take has frozen and thawed again; needs opLock. What
// it was late to freeze goes when that has been thawed.
func (d *Daemon) afterFreeze(mounts []*os.File, points []frozenPoint) {
	late := d.lateFreeze
	d.lateFreeze = nil
	for i, p := range points {
		if late == nil || mounts[i] != late.dir {
			d.forgetFrozen(p)
			continue
		}
		go func() {
			if late.died() {
				d.thawUntil(p.Point, func() bool { return true })
			}
			d.forgetFrozen(p)
		}()
	}
}

func (d *Daemon) forgetFrozen(p frozenPoint) {
	err := d.changeFrozen(func(frozen []frozenPoint) ([]frozenPoint, error) {
		return slices.DeleteFunc(frozen, func(f frozenPoint) bool { return f == p }), nil
	})
	if err != nil {
		d.opts.Log.Error("it is on record that a filesystem may be frozen, which is not so any more", "filesystem", p.Point, "error", err)
	}
}

// changeFrozen changes what is on record.
func (d *Daemon) changeFrozen(change func([]frozenPoint) ([]frozenPoint, error)) error {
	d.frozen.Lock()
	defer d.frozen.Unlock()
	points, err := change(slices.Clone(d.frozen.points))
	if err != nil {
		return err
	}
	if len(points) > 0 {
		err = statefile.Write(d.frozenFile(), frozenKind, frozenFormat, frozenRecord{points})
	} else if err = os.Remove(d.frozenFile()); errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err == nil {
		d.frozen.points = points
	}
	return err
}

// freeze is the snapshots.Freezer of a daemon; needs opLock. If there is no prober, it asks
// itself.
func (d *Daemon) freeze(ctx context.Context, dir *os.File) (thaw func(context.Context) error, err error) {
	if d.opts.Prober == nil {
		return snapshots.Freeze(ctx, dir)
	}
	frozen, err := d.opts.Prober.Freeze(ctx, dir)
	var late *disk.Late
	switch {
	case errors.As(err, &late):
		d.lateFreeze = &lateFreeze{dir, late.Died}
		return nil, err
	case errors.Is(err, disk.ErrGone):
		thaw, itself := snapshots.Freeze(ctx, dir)
		if errors.Is(itself, unix.EBUSY) && errors.Is(err, io.EOF) { // it died when it had frozen it
			d.lateFreeze = &lateFreeze{dir, func() bool { return true }}
		}
		return thaw, itself
	case err != nil:
		return nil, err
	}
	return func(ctx context.Context) error {
		if err := frozen.Thaw(ctx); !errors.Is(err, disk.ErrGone) {
			return err
		}
		return snapshots.Thaw(ctx, dir)
	}, nil
}

// claimDisk is the ublk.Config.Claim of a daemon, for the same reason.
func (d *Daemon) claimDisk(path string) (ublk.Claimant, error) {
	if d.opts.Prober != nil {
		claim, err := d.opts.Prober.Claim(context.Background(), path)
		if err == nil {
			return ublk.Claimant{Held: claim.Held, Release: func() {
				ctx, cancel := context.WithTimeout(context.Background(), settleLimit)
				defer cancel()
				_ = claim.Release(ctx)
			}}, nil
		}
		if !errors.Is(err, disk.ErrGone) {
			return ublk.Claimant{}, err
		}
	}
	return ublk.ClaimDisk(path)
}

// thaw thaws what this daemon did not freeze.
func (d *Daemon) thaw(ctx context.Context, point string) error {
	f, err := d.host.Open(point, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if d.opts.Prober != nil {
		if err = d.opts.Prober.Thaw(ctx, f); !errors.Is(err, disk.ErrGone) {
			return err
		}
	}
	return snapshots.Thaw(ctx, f)
}

// readFrozen reads what a dead daemon had frozen or was about to freeze.
func (d *Daemon) readFrozen() {
	points, err := d.leftFrozen()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.opts.Log.Error("what a dead daemon has frozen is not known", "error", err)
	}
	d.frozen.points = points
}

// thawLeftover thaws all that is on record, which a dead daemon had frozen. That may take until
// the filters are served, and as long as a disk does not answer.
func (d *Daemon) thawLeftover() {
	d.frozen.Lock()
	left := slices.Clone(d.frozen.points)
	d.frozen.Unlock()
	var all sync.WaitGroup
	for _, f := range slices.Backward(left) {
		all.Add(1)
		go func() {
			defer all.Done()
			d.thawUntil(f.Point, func() bool { return processEnded(f.PID, f.Process) })
			d.forgetFrozen(f)
		}()
	}
	all.Wait()
}

// thawUntil thaws a filesystem whenever it is frozen, until whoever froze it has ended. It waits
// as long as the disk does not answer, because to ask once more would be one more who waits.
func (d *Daemon) thawUntil(point string, ended func() bool) {
	told := false
	for last := false; !last; {
		last = ended()
		err := d.thaw(context.Background(), point)
		switch {
		case err == nil:
			d.opts.Log.Warn("a filesystem that was left frozen goes on", "filesystem", point)
		case errors.Is(err, unix.EINVAL): // it is not frozen
		case errors.Is(err, disk.ErrGone):
			last = false // to the next daemon, which comes soon because there is no prober
		case !told:
			told = true
			d.opts.Log.Warn("cannot thaw what was left frozen", "filesystem", point, "error", err)
		}
		if !last {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// leftFrozen is what a dead daemon had on record.
func (d *Daemon) leftFrozen() ([]frozenPoint, error) {
	text, format, err := statefile.Read(d.frozenFile(), frozenKind, frozenFormat)
	if err != nil {
		return nil, err
	}
	var r frozenRecord
	var old struct {
		Points  []string `json:"points"`
		PID     int      `json:"pid"`
		Process string   `json:"process"`
	}
	switch format {
	case 1:
		err = statefile.Unmarshal(d.frozenFile(), text, &old.Points)
	case 2:
		err = statefile.Unmarshal(d.frozenFile(), text, &old)
	default:
		err = statefile.Unmarshal(d.frozenFile(), text, &r)
	}
	for _, point := range old.Points {
		r.Frozen = append(r.Frozen, frozenPoint{point, 0, old.PID, old.Process})
	}
	return r.Frozen, err
}

// processEnded says whether a process, by its identity, has ended with all its threads. One
// thread may be in the kernel after the others have been killed.
func processEnded(pid int, identity string) bool {
	if identity == "" {
		return true
	}
	now, state := processStat(pid)
	if now != identity {
		return true
	}
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return len(threads) <= 1 && bytes.ContainsAny([]byte(state), "ZX")
}
