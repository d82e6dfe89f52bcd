package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// deviceRecord is what the next daemon has to know of a filter, in
// state/devices/NAME.json. It is written before the kernel makes the device, and
// removed last of all of it. So whether there is such a device the driver knows: it
// has one of that number with that very tag, or the record is of one that was never
// made, or is gone.
type deviceRecord struct {
	Name     string         `json:"name"`
	ID       int            `json:"id"`  // N in /dev/ublkbN
	Tag      uint64         `json:"tag"` // see ublk.NewTag
	Original originalRecord `json:"original"`
	Geometry ublk.Geometry  `json:"geometry"`
	Added    time.Time      `json:"added"`
	// History is what became of the changes known before, to be told on.
	History control.History `json:"history"`
	// Identity is that of the disk if the device has a write-intent log, IntentLogZone the
	// zone that was asked for, StateDir where it is.
	Identity      disk.Identity `json:"identity,omitempty"`
	IntentLogZone int64         `json:"intent_log_zone,omitempty"`
	StateDir      string        `json:"state_dir,omitempty"`
	// ClaimedByOther: a daemon that was to take the device over found that somebody else had
	// the disk. He may have written to it, and may have let go since.
	ClaimedByOther bool `json:"claimed_by_other,omitempty"`
	// Ending is what the disk was like just before a removal that is under way, or an
	// addition: then nobody writes to it unless the device comes to be.
	Ending *cbtstate.Disk `json:"ending,omitempty"`
	// GrownFrom is the size that the disk had, in bytes, while its filter becomes one for the
	// size in Geometry; 0: that is done.
	GrownFrom int64 `json:"grown_from,omitempty"`
	// Attached is what the device has if it came under one in use.
	Attached *attachRecord `json:"attached,omitempty"`
	// Unpartitioned: the device does not show the partitions of its disk yet. See
	// Daemon.addPartitions.
	Unpartitioned bool `json:"unpartitioned,omitempty"`
}

// zone is what the device's log is made with: negative if it has none.
func (r deviceRecord) zone() int64 {
	if r.Identity == nil {
		return -1
	}
	return r.IntentLogZone
}

// shown is the disk by which people know the device.
func (r deviceRecord) shown() originalRecord {
	if r.Attached != nil {
		return r.Attached.Public
	}
	return r.Original
}

// kept is what is kept of the disk in a state directory, of a device that has a log.
func (r deviceRecord) kept() outdated { return outdated{r.Identity, r.StateDir} }

// originalRecord tells a disk from any other.
type originalRecord struct {
	Path     string `json:"path"`   // that a person knows it by
	Name     string `json:"name"`   // the kernel's
	Number   string `json:"number"` // major:minor
	Sequence uint64 `json:"sequence,omitempty"`
}

func originalOf(d *disk.Disk) originalRecord {
	return originalRecord{Path: d.DisplayPath(), Name: d.Name, Number: d.Num.String(), Sequence: d.Sequence}
}

// find is the disk that is on record, if it is still there.
func (o originalRecord) find(h *disk.Host) (*disk.Disk, error) {
	n, err := disk.ParseNum(o.Number)
	if err != nil {
		return nil, err
	}
	bdev, err := h.ByNumber(n)
	if err != nil {
		return nil, err
	}
	if bdev.Sequence != o.Sequence {
		return nil, fmt.Errorf("another disk is %s now", bdev.DisplayPath())
	}
	bdev.Path = o.Path
	return bdev, nil
}

const (
	countersName = "counters"
	recordSuffix = ".json"

	deviceKind = "device" // of the statefile
	// In format 2 is a record that says ClaimedByOther: a program of format 1 would go on
	// with the map. In format 3 is one that says Ending, in format 4 one that says
	// Unpartitioned, in format 5 one that says GrownFrom, in format 6 one that
	// says Attached.
	deviceFormat = 6
)

func (d *Daemon) cbtFile(name string) string      { return filepath.Join(d.cbtDir(), name) }
func (d *Daemon) countersFile(name string) string { return filepath.Join(d.countersDir(), name) }

func (d *Daemon) devicesDir() string  { return filepath.Join(d.opts.Dir.State(), devicesName) }
func (d *Daemon) countersDir() string { return filepath.Join(d.opts.Dir.State(), countersName) }
func (d *Daemon) deviceRecordFile(name string) string {
	return filepath.Join(d.devicesDir(), name+recordSuffix)
}

// writeDeviceRecord puts a device on record: whole, or not at all.
func (d *Daemon) writeDeviceRecord(r deviceRecord) error {
	format := 1
	switch {
	case r.Attached != nil:
		format = deviceFormat
	case r.GrownFrom != 0:
		format = 5
	case r.Unpartitioned:
		format = 4
	case r.Ending != nil:
		format = 3
	case r.ClaimedByOther:
		format = 2
	}
	if err := statefile.Write(d.deviceRecordFile(r.Name), deviceKind, format, r); err != nil {
		return fmt.Errorf("put it on record: %w", err)
	}
	return nil
}

// changeDeviceRecord replaces a record by what it is now.
func (d *Daemon) changeDeviceRecord(r deviceRecord) {
	if err := d.writeDeviceRecord(r); err != nil {
		d.opts.Log.Error("not all of a device is on record", "name", r.Name, "error", err)
	}
	deathpoint.Point()
}

func (d *Daemon) removeDeviceRecord(name string) {
	deathpoint.Point()
	if err := os.Remove(d.deviceRecordFile(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.opts.Log.Warn("the record of a device stays", "name", name, "error", err)
	}
	deathpoint.Point()
}

// readDeviceRecord reads and checks the record of the device of that name.
func (d *Daemon) readDeviceRecord(name string) (r deviceRecord, err error) {
	path := d.deviceRecordFile(name)
	if err := statefile.Load(path, deviceKind, deviceFormat, &r); err != nil {
		return r, err
	}
	kind, ours := ublk.IsOurs(r.Tag)
	_, err = disk.ParseNum(r.Original.Number)
	if err == nil && r.Attached != nil {
		_, err = disk.ParseNum(r.Attached.Public.Number)
	}
	if err != nil || r.Name != name || checkName(name) != nil || !ours || kind != filterKind || r.ID < 0 || r.Geometry.Size <= 0 || r.Geometry.LogicalBlock <= 0 {
		return r, fmt.Errorf("%s: it describes no filter of this name", path)
	}
	return r, nil
}

// deviceRecords reads what is on record. What cannot be trusted is left as it is, and
// told by its name.
func (d *Daemon) deviceRecords() (records []deviceRecord, damaged []control.LostDevice) {
	dir := d.devicesDir()
	files, err := os.ReadDir(dir)
	if err != nil {
		d.opts.Log.Error("cannot read what is on record", "error", err)
	}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), recordSuffix)
		if !ok {
			_ = os.Remove(filepath.Join(dir, f.Name())) // a record that was never whole
			continue
		}
		r, err := d.readDeviceRecord(name)
		if err != nil {
			reason := fmt.Sprintf("its record cannot be trusted: %v", err)
			d.opts.Log.Error("a filter is not taken over", "name", name, "reason", reason)
			damaged = append(damaged, control.LostDevice{Name: name, Reason: reason})
			continue
		}
		records = append(records, r)
	}
	return records, damaged
}
