package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// record is what a daemon keeps in its run directory about itself while it
// lives, so that after its death it can be told what waits for the next one. The next
// one itself does not go by it.
type record struct {
	Version      int    `json:"version"` // recordVersion
	Process      string `json:"birth"`   // tells the process from another of its number
	control.Lost        // what will wait for the next one, if it dies
	// Before is what this one could not take over of the one before it.
	Before *control.Lost `json:"before,omitempty"`
}

const recordVersion = 1

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

// lost is what the last daemon of the directory had, if it died. It is nil if the
// daemon lives or ended as it should, and if the record cannot be read.
func (d RunDir) lost() *control.Lost {
	r, ok := d.lastRecord()
	if !ok || processIdentity(r.PID) == r.Process {
		return nil
	}
	if r.Before != nil {
		r.Devices = append(r.Devices, r.Before.Devices...)
		r.Snapshots = append(r.Snapshots, r.Before.Snapshots...)
	}
	return &r.Lost
}

// lastRecord is the record of the last daemon of the directory.
func (d RunDir) lastRecord() (r record, ok bool) {
	f, err := d.file(recordName, os.O_RDONLY, 0)
	if err != nil {
		return r, false
	}
	defer f.Close()
	err = json.NewDecoder(io.LimitReader(f, 16<<20)).Decode(&r)
	return r, err == nil && r.Version == recordVersion
}

// saveRecord writes the record if it has changed; needs opLock.
func (d *Daemon) saveRecord() {
	if !d.recorded {
		return
	}
	r := record{Version: recordVersion, Process: processIdentity(os.Getpid()), Lost: control.Lost{PID: os.Getpid()}}
	for _, dev := range d.sortedDevices() {
		r.Devices = append(r.Devices, control.LostDevice{Name: dev.Name, Original: dev.Original, Path: dev.Path, Waits: true})
	}
	for _, s := range d.sortedSnapshots() {
		lost := control.LostSnapshot{ID: s.id}
		d.mu.Lock()
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
		err = d.opts.Dir.replace(recordName, text)
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

func (d *Daemon) explainSnapshot(e *control.Error, id string) *control.Error {
	return d.explain(e, func(l *control.Lost) (reason, fix string, ok bool) {
		for _, s := range l.Snapshots {
			if s.ID == id {
				return s.Reason, "take another", true
			}
		}
		return "", "", false
	})
}

// replace replaces a file in the directory by a new one that holds text.
func (d RunDir) replace(name string, text []byte) error {
	fresh := name + ".new"
	err := d.remove(fresh)
	if err == nil {
		err = d.write(fresh, text, 0o600)
	}
	if err == nil {
		err = os.Rename(d.path(fresh), d.path(name))
	}
	return err
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
