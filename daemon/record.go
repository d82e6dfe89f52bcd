package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// record is what a daemon keeps in its run directory about itself while it
// lives, so that after its death it can be told what waits for the next one. The next
// one itself does not go by it.
type record struct {
	Process      string `json:"birth"` // tells the process from another of its number
	control.Lost        // what will wait for the next one, if it dies
	// Before is what this one could not take over of the one before it.
	Before *control.Lost `json:"before,omitempty"`
}

const recordKind, recordFormat = "daemon", 1

// processIdentity tells a process from all others that have or had its number, by
// the boot and the time when the process began. It is empty if there is no such
// process.
func processIdentity(pid int) string {
	identity, state := processStat(pid)
	if state == "Z" || state == "X" {
		return ""
	}
	return identity
}

// processStat is the identity of a process, dead or alive, and the state of its main
// thread; both are empty if there is none.
func processStat(pid int) (identity, state string) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", ""
	}
	// The name is in parentheses and may hold anything; the state follows it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return "", ""
	}
	boot, _ := disk.BootID()
	return boot + " " + fields[19], fields[0] // when it began, in ticks
}

// processStart is when this process began, to the hundredth of a second.
func processStart() time.Time {
	now := time.Now()
	identity, _ := processStat(os.Getpid())
	_, ticks, _ := strings.Cut(identity, " ")
	n, err := strconv.ParseInt(ticks, 10, 64)
	var up unix.Timespec
	if err = errors.Join(err, unix.ClockGettime(unix.CLOCK_BOOTTIME, &up)); err != nil {
		return now
	}
	const tick = time.Second / 100 // see proc(5); it is the same on all machines that Go knows
	return now.Add(-max(time.Duration(up.Nano())-time.Duration(n)*tick, 0))
}

// lost is what the last daemon of the directory had, if it died. It is nil if the
// daemon lives or ended as it should. The error says that its record cannot be trusted.
func (d RunDir) lost() (*control.Lost, error) {
	r, err := d.lastRecord()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil || processIdentity(r.PID) == r.Process {
		return nil, err
	}
	if r.Before != nil {
		r.Devices = append(r.Devices, r.Before.Devices...)
		r.Snapshots = append(r.Snapshots, r.Before.Snapshots...)
	}
	return &r.Lost, nil
}

// lastRecord is the record of the last daemon of the directory; fs.ErrNotExist if there is
// none.
func (d RunDir) lastRecord() (r record, err error) {
	text, _, err := statefile.Read(d.path(recordName), recordKind, recordFormat)
	if errors.Is(err, statefile.ErrDamaged) {
		if old, ok := d.bareRecord(); ok {
			return old, nil
		}
	}
	if err == nil {
		// It is for people: a program that does not know a field here goes on without it.
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

// bareRecord is lastRecord of a program whose records had no heading, but a version in them.
func (d RunDir) bareRecord() (record, bool) {
	f, err := d.file(recordName, os.O_RDONLY, 0)
	if err != nil {
		return record{}, false
	}
	defer f.Close()
	var r struct {
		Version int `json:"version"`
		record
	}
	text, err := io.ReadAll(io.LimitReader(f, 16<<20))
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	return r.record, err == nil && r.Version == 1 && r.Process != "" && r.PID > 0
}

// saveRecord writes the record if it has changed; needs opLock.
func (d *Daemon) saveRecord() {
	if !d.recorded {
		return
	}
	r := record{Process: processIdentity(os.Getpid()), Lost: control.Lost{PID: os.Getpid()}}
	for _, dev := range d.sortedDevices() {
		r.Devices = append(r.Devices, control.LostDevice{Name: dev.Name, Original: dev.Original, Path: dev.Path, Waits: true})
	}
	for _, s := range d.sortedSnapshots() {
		lost := control.LostSnapshot{ID: s.id}
		d.mu.Lock()
		lost.Name = s.note.Name
		if s.releasing { // was destroyed: nobody will miss it
			d.mu.Unlock()
			continue
		}
		for _, im := range s.images {
			lost.Devices = append(lost.Devices, im.device.Name)
		}
		for _, st := range s.storage {
			lost.Storage = append(lost.Storage, st.Path)
		}
		d.mu.Unlock()
		r.Snapshots = append(r.Snapshots, lost)
	}
	r.Before = d.notTakenOver()
	d.mu.Lock()
	d.lost = r.Before
	d.mu.Unlock()
	text, err := json.Marshal(r)
	if err == nil && !bytes.Equal(text, d.onRecord) {
		err = statefile.Write(d.opts.Dir.path(recordName), recordKind, recordFormat, r)
		d.onRecord = text
	}
	if err != nil {
		d.opts.Log.Warn("cannot write the record of filters and snapshots", "error", err)
	}
}

// notTakenOver is what this daemon could not take over, or not yet; nil if there is
// nothing; needs opLock.
func (d *Daemon) notTakenOver() *control.Lost {
	l := &control.Lost{PID: d.predecessor, Devices: slices.Clone(d.damaged), Snapshots: slices.Concat(d.ended, d.lostSnapshots)}
	for _, s := range d.sortedWaiting() {
		l.Devices = append(l.Devices, s.lost())
	}
	if len(l.Devices)+len(l.Snapshots) == 0 {
		return nil
	}
	return l
}

// startRecord puts this daemon on record.
func (d *Daemon) startRecord() {
	if l := d.notTakenOver(); l != nil {
		d.opts.Log.Error(l.String())
	}
	d.recorded = true
	d.saveRecord()
}

// explain adds to an error about what is not found why it was not taken over.
func (d *Daemon) explain(e *control.Error, has func(*control.Lost) (reason, fix string, ok bool)) *control.Error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost == nil {
		return e
	}
	if reason, fix, ok := has(d.lost); ok && d.lost.PID == 0 {
		e.Message += ": " + reason
		e.Fix = fix
	} else if ok {
		e.Message += ": not taken over from the daemon before, process " + strconv.Itoa(d.lost.PID) + ", which died: " + reason
		e.Fix = fix
	}
	return e
}

func (d *Daemon) explainDevice(e *control.Error, ref string) *control.Error {
	return d.explain(e, func(l *control.Lost) (reason, fix string, ok bool) {
		for _, dev := range l.Devices {
			if ref != "" && (ref == dev.Name || ref == dev.Original || ref == dev.Path || ref == linkDir+"/"+dev.Name) {
				return dev.Reason, "let its I/O fail and remove it: ublk-blksnap remove --force " + dev.Name, true
			}
		}
		return "", "", false
	})
}

// explainSnapshot says what became of the snapshot that ref, a UUID or a name, stood for.
func (d *Daemon) explainSnapshot(e *control.Error, ref string) *control.Error {
	return d.explain(e, func(l *control.Lost) (reason, fix string, ok bool) {
		for _, s := range l.Snapshots {
			if ref != "" && (s.ID == ref || s.Name == ref) {
				return s.Reason, "take another", true
			}
		}
		return "", "", false
	})
}

// has says whether there is something of that name in the directory.
func (d RunDir) has(name string) bool {
	_, err := os.Lstat(d.path(name))
	return err == nil
}

func (d RunDir) remove(name string) error {
	if err := os.Remove(d.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
