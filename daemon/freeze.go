package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// frozenRecord is what a take is about to freeze, in state/frozen.
type frozenRecord struct {
	Points []string `json:"points"` // mount points
	// PID and Process are who freezes.
	PID     int    `json:"pid"`
	Process string `json:"process"` // see processIdentity
}

const frozenKind, frozenFormat = "frozen", 2 // format 1 had the points alone

func (d *Daemon) frozenFile() string { return filepath.Join(d.opts.Dir.State(), frozenKind) }

// rememberFrozen puts on record what is about to be frozen; needs opLock.
func (d *Daemon) rememberFrozen(mounts []*os.File) error {
	if len(mounts) == 0 {
		return nil
	}
	if d.thawed != nil {
		select {
		case <-d.thawed:
		default:
			return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "what a daemon that died was freezing has not been thawed yet", Fix: "try again when its disk answers, or take without freezing"}
		}
	}
	return d.changeFrozen(func(frozen []string) []string { return append(frozen, pointsOf(mounts)...) })
}

// afterFreeze takes off the record what a take has frozen and thawed again, or was late to
// freeze; needs opLock.
func (d *Daemon) afterFreeze(mounts []*os.File) {
	late, points := d.lateFreeze, pointsOf(mounts)
	d.lateFreeze = nil
	if len(points) == 0 {
		return
	}
	forget := func() {
		if err := d.changeFrozen(func(frozen []string) []string { return without(frozen, points) }); err != nil {
			d.opts.Log.Error("what is frozen is not on record", "error", err)
		}
	}
	if late == nil {
		forget()
		return
	}
	go func() {
		<-late
		d.thawPoints(points, map[string]bool{}) // the prober has died if there is anything to do
		forget()
	}()
}

// changeFrozen puts on record what this daemon may have frozen.
func (d *Daemon) changeFrozen(change func(points []string) []string) error {
	d.frozen.Lock()
	defer d.frozen.Unlock()
	r := frozenRecord{Points: change(slices.Clone(d.frozen.points)), PID: os.Getpid()}
	if len(r.Points) == 0 {
		d.frozen.points = nil
		d.forgetFrozen()
		return nil
	}
	if d.opts.Prober != nil {
		r.PID = d.opts.Prober.PID()
	}
	r.Process = processIdentity(r.PID)
	err := statefile.Write(d.frozenFile(), frozenKind, frozenFormat, r)
	if err == nil {
		d.frozen.points = r.Points
	}
	return err
}

func pointsOf(mounts []*os.File) (points []string) {
	for _, m := range mounts {
		points = append(points, m.Name())
	}
	return points
}

// without is list without one of each of those in less.
func without(list, less []string) []string {
	for _, s := range less {
		if i := slices.Index(list, s); i >= 0 {
			list = slices.Delete(list, i, i+1)
		}
	}
	return list
}

func (d *Daemon) forgetFrozen() { _ = os.Remove(d.frozenFile()) }

// freeze is the snapshots.Freezer of a daemon; needs opLock. If there is no prober, it asks
// itself.
func (d *Daemon) freeze(ctx context.Context, dir *os.File) (thaw func(context.Context) error, err error) {
	if d.opts.Prober == nil {
		return snapshots.Freeze(ctx, dir)
	}
	frozen, err := d.opts.Prober.Freeze(ctx, dir)
	if errors.Is(err, disk.ErrGone) {
		return snapshots.Freeze(ctx, dir)
	}
	if err != nil {
		var late *disk.Late
		if errors.As(err, &late) {
			d.lateFreeze = late.Ended
		}
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

// thawLeftover thaws what a dead daemon had frozen or was about to freeze. That may take
// until its filters are served.
func (d *Daemon) thawLeftover() {
	r, err := d.leftFrozen()
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		d.opts.Log.Error("what a dead daemon has frozen is not known", "error", err)
		return
	}
	told := map[string]bool{}
	for last := false; !last; {
		last = processEnded(r.PID, r.Process)
		d.thawPoints(r.Points, told)
		if !last {
			time.Sleep(20 * time.Millisecond)
		}
	}
	d.forgetFrozen()
}

// thawPoints thaws what was left frozen, and tells once of what it cannot thaw.
func (d *Daemon) thawPoints(points []string, told map[string]bool) {
	for _, point := range slices.Backward(points) {
		ctx, cancel := context.WithTimeout(context.Background(), d.opts.Config.FreezeTimeout)
		err := d.thaw(ctx, point)
		cancel()
		switch {
		case err == nil:
			d.opts.Log.Warn("a filesystem that was left frozen goes on", "filesystem", point)
		case !errors.Is(err, unix.EINVAL) && !told[point]:
			told[point] = true
			d.opts.Log.Warn("cannot thaw what was left frozen", "filesystem", point, "error", err)
		}
	}
}

// leftFrozen is what a dead daemon had on record.
func (d *Daemon) leftFrozen() (r frozenRecord, err error) {
	text, format, err := statefile.Read(d.frozenFile(), frozenKind, frozenFormat)
	if err == nil && format == 1 {
		err = statefile.Unmarshal(d.frozenFile(), text, &r.Points)
	} else if err == nil {
		err = statefile.Unmarshal(d.frozenFile(), text, &r)
	}
	return r, err
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
