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
)

// record is what a daemon keeps in its run directory about itself while it lives.
// After its death the record tells what was lost.
type record struct {
	Version      int    `json:"version"` // recordVersion
	Process      string `json:"birth"`   // tells the process from another of its number
	control.Lost        // what will be, if it dies
	// Before is what was lost already, and has not been made again.
	Before *control.Lost `json:"before,omitempty"`
}

const recordVersion = 1

// processIdentity tells a process from all others that have or had its number, by
// the boot and the time when the process began. It is empty if there is no such
// process.
func processIdentity(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The name is in parentheses and may hold anything; the state follows it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return ""
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(boot)) + " " + fields[19] // when it began, in ticks
}

// lost is what the last daemon of the directory had, if it died. It is nil if the
// daemon lives or ended as it should, and if the record cannot be read.
func (d RunDir) lost() *control.Lost {
	f, err := d.file(recordName, os.O_RDONLY, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	var r record
	if json.NewDecoder(io.LimitReader(f, 16<<20)).Decode(&r) != nil || r.Version != recordVersion || processIdentity(r.PID) == r.Process {
		return nil
	}
	if r.Before != nil {
		r.Devices = append(r.Devices, r.Before.Devices...)
		r.Snapshots = append(r.Snapshots, r.Before.Snapshots...)
	}
	return &r.Lost
}

// saveRecord writes the record if it has changed; needs opLock.
func (d *Daemon) saveRecord() {
	if !d.recorded {
		return
	}
	r := record{Version: recordVersion, Process: processIdentity(os.Getpid()), Lost: control.Lost{PID: os.Getpid()}}
	for _, dev := range d.sortedDevices() {
		r.Devices = append(r.Devices, control.LostDevice{Name: dev.Name, Original: dev.Original, Path: dev.Path, Waits: dev.Recovery})
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
	d.mu.Lock()
	d.lost = stillLost(d.lost, r.Devices)
	r.Before = d.lost
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

// stillLost is what is still lost when there are these devices again. When all
// filters are back, nothing counts as lost any more, not even the snapshots.
func stillLost(l *control.Lost, there []control.LostDevice) *control.Lost {
	if l == nil {
		return nil
	}
	rest := *l
	rest.Devices = slices.DeleteFunc(slices.Clone(l.Devices), func(lost control.LostDevice) bool {
		return slices.ContainsFunc(there, func(dev control.LostDevice) bool { return dev.Name == lost.Name || dev.Original == lost.Original })
	})
	if len(rest.Devices) == 0 && len(there) > 0 {
		return nil
	}
	return &rest
}

// waitEnded is l after the I/O of the ublk device at path has ended its wait.
func waitEnded(l *control.Lost, path string) *control.Lost {
	if l == nil {
		return nil
	}
	rest := *l
	rest.Devices = slices.Clone(l.Devices)
	for i := range rest.Devices {
		if rest.Devices[i].Path == path {
			rest.Devices[i].Waits = false
		}
	}
	return &rest
}

// reportLost says what a daemon before this one lost, and puts this one on record.
func (d *Daemon) reportLost() {
	if l := d.opts.Dir.lost(); l != nil {
		for _, dev := range l.Devices {
			d.opts.Log.Warn("lost with a daemon that died: a filter", "pid", l.PID, "name", dev.Name, "disk", dev.Original, "device", dev.Path, "waits", dev.Waits)
		}
		for _, s := range l.Snapshots {
			d.opts.Log.Warn("lost with a daemon that died: a snapshot", "pid", l.PID, "snapshot", s.ID, "devices", s.Devices, "storage", s.Storage)
		}
		if len(l.Devices)+len(l.Snapshots) > 0 {
			d.lost = l
		}
	}
	d.recorded = true
	d.saveRecord()
}

// explain adds to an error about something that is not found, that it was lost with
// a daemon that died.
func (d *Daemon) explain(e *control.Error, has func(*control.Lost) (fix string, ok bool)) *control.Error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost == nil {
		return e
	}
	if fix, ok := has(d.lost); ok {
		e.Message += ": lost with the daemon before, process " + strconv.Itoa(d.lost.PID) + ", which died"
		e.Fix = fix
	}
	return e
}

func (d *Daemon) explainDevice(e *control.Error, ref string) *control.Error {
	return d.explain(e, func(l *control.Lost) (string, bool) {
		for _, dev := range l.Devices {
			if ref == dev.Name || ref == dev.Original || ref == dev.Path || ref == linkDir+"/"+dev.Name {
				return fmt.Sprintf("add it again: ublk-blksnap add %s --name %s", dev.Original, dev.Name), true
			}
		}
		return "", false
	})
}

func (d *Daemon) explainSnapshot(e *control.Error, id string) *control.Error {
	return d.explain(e, func(l *control.Lost) (string, bool) {
		return "", slices.ContainsFunc(l.Snapshots, func(s control.LostSnapshot) bool { return s.ID == id })
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

func (d RunDir) remove(name string) error {
	if err := os.Remove(d.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
