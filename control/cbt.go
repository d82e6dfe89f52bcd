package control

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
)

func cbtInfo(i cbtmap.Info) CBTInfo {
	return CBTInfo{
		DeviceCapacity: i.DeviceCapacity, BlockSize: i.BlockSize, BlockCount: i.BlockCount,
		GenerationID: i.GenerationID.String(), ChangesNumber: i.ChangesNumber, Take: takeOf(i),
	}
}

func takeOf(i cbtmap.Info) Take { return Take{i.GenerationID, uint64(i.ChangesNumber)} }

// cbtError gives the change map's errors their codes.
func cbtError(err error, format string, args ...any) error {
	e := fail(err, format, args...)
	switch {
	case errors.Is(err, cbtmap.ErrCorrupted):
		e.Code, e.Errno, e.Fix = Corrupted, unix.EFAULT, "copy the whole device: the next take begins anew"
	case errors.Is(err, cbtmap.ErrGeneration):
		e.Code, e.Errno, e.Fix = GenerationEnded, unix.ESTALE, "copy the whole device"
	case errors.Is(err, cbtmap.ErrNotTaken):
		e.Code, e.Errno = NotFound, unix.ENOENT
	case errors.Is(err, cbtmap.ErrRange):
		e.Code, e.Errno = Invalid, unix.ERANGE
	}
	return e
}

// CBTInfo implements API.
func (d *Daemon) CBTInfo(_ context.Context, ref string) (CBTInfo, error) {
	v, release, err := d.hold(ref)
	if err != nil {
		return CBTInfo{}, fail(err, "change map of %s", ref)
	}
	defer release()
	i, err := v.cbt.Info()
	if err != nil {
		return CBTInfo{}, cbtError(err, "change map of %s", ref)
	}
	return cbtInfo(i), nil
}

// CBTMap implements API.
func (d *Daemon) CBTMap(_ context.Context, ref string) ([]byte, error) {
	v, release, err := d.hold(ref)
	if err != nil {
		return nil, fail(err, "read the change map of %s", ref)
	}
	defer release()
	for {
		i, err := v.cbt.Info()
		if err != nil {
			return nil, cbtError(err, "read the change map of %s", ref)
		}
		m := make([]byte, i.BlockCount)
		n, err := v.cbt.ReadMap(i.GenerationID, m, 0)
		if errors.Is(err, cbtmap.ErrGeneration) {
			continue // a take in between began a new one
		}
		if int64(n) < i.BlockCount && err != nil {
			return nil, cbtError(err, "read the change map of %s", ref)
		}
		return m[:n], nil
	}
}

// CBTChanges implements API.
func (d *Daemon) CBTChanges(_ context.Context, r ChangesRequest) (Changes, error) {
	if r.Since == (Take{}) {
		return Changes{}, invalid("changes of %s: since which take?", r.Device)
	}
	v, release, err := d.hold(r.Device)
	if err != nil {
		return Changes{}, fail(err, "changes of %s", r.Device)
	}
	defer release()
	i, err := v.cbt.Info()
	if err != nil {
		return Changes{}, cbtError(err, "changes of %s", r.Device)
	}
	seq, err := v.cbt.Changes(r.Since.Generation, r.Since.Number)
	if err != nil {
		return Changes{}, cbtError(err, "changes of %s", r.Device)
	}
	out := Changes{CBTInfo: cbtInfo(i), Since: r.Since, Ranges: []Range{}}
	for x, err := range seq {
		if err != nil {
			return Changes{}, cbtError(err, "changes of %s", r.Device)
		}
		out.Ranges = append(out.Ranges, Range{uint64(x.Offset / cbtmap.SectorSize), uint64(x.Length / cbtmap.SectorSize)})
	}
	return out, nil
}

// MarkDirty implements API.
func (d *Daemon) MarkDirty(_ context.Context, r MarkRequest) error {
	v, release, err := d.hold(r.Device)
	if err != nil {
		return fail(err, "mark blocks of %s", r.Device)
	}
	defer release()
	ranges := make([]cbtmap.Sectors, len(r.Ranges))
	for i, x := range r.Ranges {
		ranges[i] = cbtmap.Sectors{First: x.Sector, Count: x.Count}
	}
	if err := v.cbt.MarkDirty(ranges); err != nil {
		return cbtError(err, "mark blocks of %s", r.Device)
	}
	return nil
}
