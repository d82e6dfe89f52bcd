package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// AppendStorage implements control.API.
func (d *Daemon) AppendStorage(ctx context.Context, r control.StorageRequest) (control.Snapshot, error) {
	s, end, err := d.beginOnSnapshot(ctx, r.ID, "append storage to snapshot %s", r.ID)
	if err != nil {
		return control.Snapshot{}, err
	}
	defer end()
	r.Auto = false
	if err := d.appendTo(s, r.Storage); err != nil {
		return control.Snapshot{}, fail(err, "snapshot %s", s.id)
	}
	return d.describeSnapshot(s), nil
}

// appendTo needs opLock.
func (d *Daemon) appendTo(s *snapshot, st control.Storage) error {
	if !filepath.IsAbs(st.Path) {
		return invalid("storage %q: not an absolute path", st.Path)
	}
	if st.Limit < 0 || st.Limit > 0 && st.Limit < s.chunk {
		return invalid("storage %s: a limit of %s is less than one chunk of %s", st.Path, control.FormatSize(st.Limit), control.FormatSize(s.chunk))
	}
	if st.Reserve < 0 || st.Reserve > 99 {
		return invalid("storage %s: a reserve of %d%% is not within 1%% to 99%%", st.Path, st.Reserve)
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
	note, err := json.Marshal(st)
	if err != nil {
		return fail(err, "storage %s", st.Path)
	}
	var known disk.Identity
	if place.Kind() == unix.S_IFBLK {
		if on, err := d.host.ByNumber(place.Number()); err == nil {
			known, err = d.host.Identify(on)
			if err != nil {
				known = nil
				d.opts.Log.Warn("a loss of power would leave what a snapshot stores where it is, because the device cannot be known again",
					"snapshot", s.id, "storage", st.Path, "error", err)
			}
		}
	}
	if err := s.snap.Append(snapshots.StorageConfig{
		Note: note, Known: known,
		Place: place, RealPath: d.host.RealPath(place), Limit: st.Limit, Reserve: st.Reserve, Overwrite: overwrite, Probe: d.probe,
	}); err != nil {
		if hanging := s.snap.Returning(); len(hanging) > 0 {
			d.opts.Log.Warn("storage that was not appended does not answer: it is given back when it does", "snapshot", s.id, "storage", publicPaths(strings.Join(hanging, ", ")))
		}
		return snapshotError(err, "storage %s", st.Path)
	}
	d.mu.Lock()
	s.storage = append(s.storage, st)
	d.mu.Unlock()
	d.logStorage(s, st)
	return nil
}

// logStorage says how far the storage that was appended last can grow, above all if nobody has
// given it a limit.
func (d *Daemon) logStorage(s *snapshot, st control.Storage) {
	about := []any{"snapshot", s.called(), "storage", st.Path}
	if spaces := s.snap.Spaces(); len(spaces) > 0 {
		last := spaces[len(spaces)-1]
		if most := cmp.Or(last.Most, st.Limit); most != 0 {
			about = append(about, "at_most", control.HumanSize(most))
		}
		if last.Spare != 0 {
			about = append(about, "leaves_free", control.HumanSize(last.Spare))
		}
	}
	d.opts.Log.Info("a snapshot has storage", about...)
}

// probe says what a block device holds. It waits within the limit for storage,
// because the device may not answer.
func (d *Daemon) probe(dev *os.File) (string, error) {
	if d.opts.Prober == nil {
		return "", errors.New("the daemon could not start the process that asks blkid: ublk-blksnap daemon reload")
	}
	ctx, cancel := context.WithTimeout(context.Background(), d.opts.Config.StorageTimeout)
	defer cancel()
	return d.opts.Prober.Probe(ctx, dev)
}

// checkPlace refuses storage on a disk that has a filter. A write to such a storage
// might need a copy to the same storage first, and would wait for itself. warning
// says what could not be found out about the place.
func (d *Daemon) checkPlace(p *disk.Place) (warning string, err error) {
	for _, dev := range d.sortedDevices() {
		on, err := d.host.LiesOn(p, dev.disk.Num, d.lowerDisks)
		var doubt *disk.Error
		switch {
		case on && err == nil:
			return "", &control.Error{Code: control.Busy, Errno: unix.EBUSY, Fix: "choose a place on another disk",
				Message: fmt.Sprintf("lies on %s, which has the filter %s", dev.Original, dev.Name)}
		case on && errors.As(err, &doubt):
			return "", &control.Error{Code: control.Busy, Errno: unix.EBUSY, Fix: "choose a place on another disk",
				Message: fmt.Sprintf("perhaps lies on %s, which has the filter %s: it %s", dev.Original, dev.Name, doubt.What)}
		case errors.Is(err, disk.ErrUnknown) && errors.As(err, &doubt):
			warning = "nobody can tell on which disk it lies, and that must not be a disk with a filter: " + doubt.What
		case err != nil:
			return "", err
		}
	}
	if warning != "" {
		d.opts.Log.Warn("nobody can tell on which disk the storage lies", "storage", p.Path, "warning", warning)
	}
	return warning, nil
}
