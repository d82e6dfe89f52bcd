package daemon

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// outdated is what is kept of a disk in a state directory, and must not be believed any
// more: the disk is written to past it. It could not be used up when that began, because
// the directory was not to be had. It is tried again until it can, and is on record in
// state/outdated, so that a daemon that begins does what a dead one owed.
type outdated struct {
	Identity disk.Identity `json:"identity"`
	StateDir string        `json:"state_dir"`
}

const outdatedKind, outdatedFormat = "outdated", 1

func (d *Daemon) outdatedFile() string { return filepath.Join(d.opts.Dir.State(), outdatedKind) }

func (o outdated) is(other outdated) bool {
	return o.StateDir == other.StateDir && slices.Equal(o.Identity, other.Identity)
}

// here is what is kept of a disk in the state directory of this daemon.
func (d *Daemon) here(id disk.Identity) outdated { return outdated{id, d.opts.Config.StateDir} }

// useAgain is how long to wait before the state of a disk is used up that could not
// be before; it doubles up to useAgainLimit.
const (
	useAgain      = 5 * time.Second
	useAgainLimit = 10 * time.Minute
)

// openOutdated is for a daemon that begins: it owes what the one before did.
func (d *Daemon) openOutdated() {
	err := statefile.Load(d.outdatedFile(), outdatedKind, outdatedFormat, &d.outdated)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		d.opts.Log.Error("it is not known which change maps of before must not be believed: none is until the machine boots; remove those of disks that have no filter then",
			"directory", d.opts.Config.StateDir, "error", err)
		d.outdatedDamaged = err
		return
	}
	d.retryUse(useAgain)
}

// saveOutdated needs opLock.
func (d *Daemon) saveOutdated() {
	if d.outdatedDamaged != nil {
		return // the file stays as it is, so that the next daemon believes nothing either
	}
	var err error
	if len(d.outdated) > 0 {
		err = statefile.Write(d.outdatedFile(), outdatedKind, outdatedFormat, d.outdated)
	} else if err = os.Remove(d.outdatedFile()); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		d.opts.Log.Warn("the next daemon will not know which change maps must not be believed", "error", err)
	}
}

// useLater uses up what is kept of a disk as soon as the state directory can be had.
// When it returns, that outlives this daemon. Needs opLock.
func (d *Daemon) useLater(o outdated) {
	if o.Identity == nil || o.StateDir == "" {
		return
	}
	if !slices.ContainsFunc(d.outdated, o.is) {
		d.outdated = append(d.outdated, o)
		d.saveOutdated()
	}
	d.retryUse(useAgain)
}

// usedUp notes that what was to be used up is not there any more; needs opLock.
func (d *Daemon) usedUp(o outdated) {
	if slices.ContainsFunc(d.outdated, o.is) {
		d.outdated = slices.DeleteFunc(d.outdated, o.is)
		d.saveOutdated()
	}
}

func (d *Daemon) retryUse(after time.Duration) {
	time.AfterFunc(after, func() {
		end, err := d.begin(context.Background(), "use up old change maps")
		if err != nil {
			return
		}
		defer end()
		if d.useOutdated(); len(d.outdated) > 0 {
			d.retryUse(min(2*after, useAgainLimit))
		}
	})
}

// useOutdated needs opLock.
func (d *Daemon) useOutdated() {
	for _, o := range slices.Clone(d.outdated) {
		ctx, cancel := d.withDiskTimeout(context.Background())
		err := d.callState(ctx, func() error { return d.useUp(o) })
		cancel()
		if err == nil {
			d.usedUp(o)
		}
	}
}

// useUp uses up what is kept of a disk, now, also if the directory lies on a disk with a
// filter, for which openState would not do it. It may hang.
func (d *Daemon) useUp(o outdated) error {
	if o.StateDir == d.opts.Config.StateDir {
		d.giveUpSame(nil, o.Identity)
	}
	store, err := d.openDir(o.StateDir, false)
	return ifKept(store, err, func() error { return errors.Join(store.Stop(o.Identity), store.Use(o.Identity)) })
}
