package daemon

import (
	"context"
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

func cbtInfo(info cbtmap.Info) control.CBTInfo {
	return control.CBTInfo{
		DeviceCapacity: info.DeviceCapacity, BlockSize: info.BlockSize, BlockCount: info.BlockCount,
		GenerationID: info.GenerationID.String(), ChangesNumber: info.ChangesNumber, Take: takeOf(info),
	}
}

func takeOf(info cbtmap.Info) control.Take {
	return control.Take{Generation: info.GenerationID, Number: uint64(info.ChangesNumber)}
}

// cbtError gives the change map's errors their codes.
func cbtError(err error, format string, args ...any) error {
	e := fail(err, format, args...)
	switch {
	case errors.Is(err, cbtmap.ErrCorrupted):
		e.Code, e.Errno, e.Fix = control.Corrupted, unix.EFAULT, "copy the whole device: the next take begins anew"
	case errors.Is(err, cbtmap.ErrGeneration):
		e.Code, e.Errno, e.Fix = control.GenerationEnded, unix.ESTALE, "copy the whole device"
	case errors.Is(err, cbtmap.ErrNotTaken):
		e.Code, e.Errno = control.NotFound, unix.ENOENT
	case errors.Is(err, cbtmap.ErrRange):
		e.Code, e.Errno = control.Invalid, unix.ERANGE
	}
	return e
}

// CBTInfo implements control.API.
func (d *Daemon) CBTInfo(_ context.Context, ref string) (control.CBTInfo, error) {
	dev, release, err := d.hold(ref)
	if err != nil {
		return control.CBTInfo{}, fail(err, "change map of %s", ref)
	}
	defer release()
	_ = d.checkTable(dev) // a map that is passed by has a new generation then
	info, err := dev.cbt.Info()
	if err != nil {
		return control.CBTInfo{}, cbtError(err, "change map of %s", ref)
	}
	answer := cbtInfo(info)
	answer.History, answer.PowerFailure = d.history(dev), dev.powerFailure()
	return answer, nil
}

// mapPart is how many blocks of a map are read at a time for an answer.
const mapPart = 32 << 10

// CBTMap implements control.API.
func (d *Daemon) CBTMap(_ context.Context, ref string, w io.Writer) (control.CBTInfo, error) {
	dev, release, err := d.hold(ref)
	if err != nil {
		return control.CBTInfo{}, fail(err, "read the change map of %s", ref)
	}
	err = d.checkTable(dev)
	var info cbtmap.Info
	if err == nil {
		info, err = dev.cbt.Info()
	}
	release()
	part := make([]byte, min(info.BlockCount, mapPart))
	for at := int64(0); err == nil && at < info.BlockCount; {
		if release, err = dev.hold(); err != nil {
			break
		}
		var n int
		n, err = dev.cbt.ReadMap(info.GenerationID, part, at)
		release()
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if err == nil {
			at += int64(n)
			_, err = w.Write(part[:n])
		}
	}
	if err != nil {
		return control.CBTInfo{}, cbtError(err, "read the change map of %s", ref)
	}
	return cbtInfo(info), nil
}

// CBTChanges implements control.API.
func (d *Daemon) CBTChanges(_ context.Context, r control.ChangesRequest, each func(control.Range) error) (control.CBTInfo, error) {
	info, err := d.changes(r, each)
	if err != nil {
		return control.CBTInfo{}, cbtError(err, "changes of %s", r.Device)
	}
	return cbtInfo(info), nil
}

func (d *Daemon) changes(r control.ChangesRequest, each func(control.Range) error) (info cbtmap.Info, err error) {
	if r.Since == (control.Take{}) {
		return info, invalid("no take is given: since which take?")
	}
	dev, release, err := d.hold(r.Device)
	if err != nil {
		return info, err
	}
	defer func() { release() }()
	if err := d.checkTable(dev); err != nil {
		return info, err
	}
	seq, err := dev.cbt.Changes(r.Since.Generation, r.Since.Number)
	if err != nil {
		return info, err
	}
	// Info comes before the first range is read, so that the ranges are at least as
	// new as it. If it is of another generation already, the sequence ends with that
	// error.
	if info, err = dev.cbt.Info(); err != nil {
		return info, err
	}
	for changed, err := range seq {
		if err != nil {
			return info, err
		}
		// The caller may be slow. Nobody else shall wait for him.
		release()
		release = func() {}
		if err := each(control.Range{Sector: uint64(changed.Offset / sector.Size), Count: uint64(changed.Length / sector.Size)}); err != nil {
			return info, err
		}
		again, err := dev.hold()
		if err != nil {
			return info, err
		}
		release = again
	}
	return info, nil
}

// MarkDirty implements control.API.
func (d *Daemon) MarkDirty(_ context.Context, r control.MarkRequest) error {
	dev, release, err := d.hold(r.Device)
	if err != nil {
		return fail(err, "mark blocks of %s", r.Device)
	}
	defer release()
	ranges := make([]cbtmap.Sectors, len(r.Ranges))
	for n, r := range r.Ranges {
		ranges[n] = cbtmap.Sectors{First: r.Sector, Count: r.Count}
	}
	if err := dev.cbt.MarkDirty(ranges); err != nil {
		return cbtError(err, "mark blocks of %s", r.Device)
	}
	if dev.intent != nil {
		dev.intent.hold(ranges)
	}
	return nil
}
