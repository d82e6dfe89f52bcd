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

func cbtInfo(i cbtmap.Info) control.CBTInfo {
	return control.CBTInfo{
		DeviceCapacity: i.DeviceCapacity, BlockSize: i.BlockSize, BlockCount: i.BlockCount,
		GenerationID: i.GenerationID.String(), ChangesNumber: i.ChangesNumber, Take: takeOf(i),
	}
}

func takeOf(i cbtmap.Info) control.Take {
	return control.Take{Generation: i.GenerationID, Number: uint64(i.ChangesNumber)}
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
	i, err := dev.cbt.Info()
	if err != nil {
		return control.CBTInfo{}, cbtError(err, "change map of %s", ref)
	}
	return cbtInfo(i), nil
}

// mapPart is how many blocks of a map are read at a time for an answer.
const mapPart = 32 << 10

// CBTMap implements control.API.
func (d *Daemon) CBTMap(_ context.Context, ref string, w io.Writer) (control.CBTInfo, error) {
	dev, release, err := d.hold(ref)
	if err != nil {
		return control.CBTInfo{}, fail(err, "read the change map of %s", ref)
	}
	i, err := dev.cbt.Info()
	release()
	part := make([]byte, min(i.BlockCount, mapPart))
	for at := int64(0); err == nil && at < i.BlockCount; {
		if release, err = dev.hold(); err != nil {
			break
		}
		var n int
		n, err = dev.cbt.ReadMap(i.GenerationID, part, at)
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
	return cbtInfo(i), nil
}

// CBTChanges implements control.API.
func (d *Daemon) CBTChanges(_ context.Context, r control.ChangesRequest, each func(control.Range) error) (control.CBTInfo, error) {
	i, err := d.changes(r, each)
	if err != nil {
		return control.CBTInfo{}, cbtError(err, "changes of %s", r.Device)
	}
	return cbtInfo(i), nil
}

func (d *Daemon) changes(r control.ChangesRequest, each func(control.Range) error) (i cbtmap.Info, err error) {
	if r.Since == (control.Take{}) {
		return i, invalid("since which take?")
	}
	dev, release, err := d.hold(r.Device)
	if err != nil {
		return i, err
	}
	defer func() { release() }()
	seq, err := dev.cbt.Changes(r.Since.Generation, r.Since.Number)
	if err != nil {
		return i, err
	}
	// Before any is read, so that what is told is at least as new; and if it is of
	// another generation already, the sequence ends with that.
	if i, err = dev.cbt.Info(); err != nil {
		return i, err
	}
	for x, err := range seq {
		if err != nil {
			return i, err
		}
		// Whom this is for may be slow: nobody else is to wait for that.
		release()
		release = func() {}
		if err := each(control.Range{Sector: uint64(x.Offset / sector.Size), Count: uint64(x.Length / sector.Size)}); err != nil {
			return i, err
		}
		again, err := dev.hold()
		if err != nil {
			return i, err
		}
		release = again
	}
	return i, nil
}

// MarkDirty implements control.API.
func (d *Daemon) MarkDirty(_ context.Context, r control.MarkRequest) error {
	dev, release, err := d.hold(r.Device)
	if err != nil {
		return fail(err, "mark blocks of %s", r.Device)
	}
	defer release()
	ranges := make([]cbtmap.Sectors, len(r.Ranges))
	for i, x := range r.Ranges {
		ranges[i] = cbtmap.Sectors{First: x.Sector, Count: x.Count}
	}
	if err := dev.cbt.MarkDirty(ranges); err != nil {
		return cbtError(err, "mark blocks of %s", r.Device)
	}
	return nil
}
