package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// A loss of power, or a restart, ends snapshots. A note of each is in the state
// directory while it has storage (snapshots/note.go). The first daemon of the next boot
// tells of them, and clears what they stored, or does so when that is there.

// notesDir is where the notes are, one file for each snapshot.
func notesDir(stateDir string) string { return filepath.Join(stateDir, "snapshots") }

const noteSuffix = ".note"

// errNoStateDir: there is no place for notes.
var errNoStateDir = errors.New("state_dir is empty")

// keepNote is snapshots.Config.Keep.
func (d *Daemon) keepNote(id uuid.UUID, note []byte) error {
	err := errNoStateDir
	if d.opts.Config.StateDir != "" {
		ctx, cancel := d.withDiskTimeout(context.Background())
		defer cancel()
		err = d.callState(ctx, func() error { return d.writeNote(id.String()+noteSuffix, note) })
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if note == nil {
		delete(d.unnoted, id)
	} else if err != nil && !d.unnoted[id] {
		d.unnoted[id] = true // and said once
		d.opts.Log.Warn("a loss of power would leave what a snapshot stores where it is, because that is not on record",
			"snapshot", id.String(), "directory", d.opts.Config.StateDir, "error", err)
	}
	return err
}

// writeNote replaces a note, or removes it if it is nil.
func (d *Daemon) writeNote(name string, note []byte) error {
	if note == nil {
		notes, err := d.openNotes(false)
		return ifKept(notes, err, func() error { return notes.Remove(name) })
	}
	notes, err := d.openNotes(true)
	if err != nil {
		return err
	}
	defer notes.Close()
	return notes.Put(name, note)
}

// lostBefore reads the notes of other boots. Files that cannot be read are said.
func (d *Daemon) lostBefore() (lost []*snapshots.Lost, err error) {
	notes, err := d.openNotes(false)
	err = ifKept(notes, err, func() error {
		names, err := notes.Names()
		slices.Sort(names)
		for _, name := range names {
			if !strings.HasSuffix(name, noteSuffix) {
				continue
			}
			text, e := notes.Get(name)
			var l *snapshots.Lost
			if e == nil {
				l, e = snapshots.ReadNote(filepath.Join(notesDir(d.opts.Config.StateDir), name), text, d.host.MachineID())
			}
			if e != nil {
				err = errors.Join(err, e)
			} else if l != nil {
				lost = append(lost, l)
			}
		}
		return err
	})
	return lost, err
}

// findLost looks for the snapshots of another boot, and has them cleared beside all
// other work. It is called once, at the start; needs opLock.
func (d *Daemon) findLost(ctx context.Context) {
	if d.opts.Config.StateDir == "" {
		return
	}
	type found struct {
		lost []*snapshots.Lost
		err  error
	}
	limited, cancel := d.withDiskTimeout(ctx)
	f, late := bounded.Call(limited, func() (f found) {
		f.lost, f.err = d.lostBefore()
		return f
	}, func(found) {})
	cancel()
	if late != nil {
		f.err = d.stateHangs()
	}
	known := map[uuid.UUID]bool{}
	f.lost = d.tellFound(f.lost, known, f.err == nil)
	if f.err != nil {
		d.opts.Log.Warn("cannot tell which snapshots were lost in a restart or a loss of power: tried again", "directory", d.opts.Config.StateDir, "error", f.err)
	}
	if len(f.lost) > 0 || f.err != nil {
		go d.clearLost(ctx, f.lost, known, f.err != nil)
	}
}

// tellFound tells of the snapshots of other boots that are not known yet, and returns
// those of this machine; needs opLock. whole: there are no others.
func (d *Daemon) tellFound(found []*snapshots.Lost, known map[uuid.UUID]bool, whole bool) (lost []*snapshots.Lost) {
	dir := notesDir(d.opts.Config.StateDir)
	for _, l := range found {
		id := l.ID.String()
		switch {
		case known[l.ID]:
			continue
		case l.Foreign:
			d.opts.Log.Warn(foreignNote, "snapshot", id, "created", l.Created, "directory", dir)
		default:
			lost = append(lost, l)
			d.opts.Log.Error("a snapshot is lost in a restart or a loss of power", "snapshot", id, "devices", devicesOf(l), "created", l.Created)
			if !d.events.has(id, control.EventLost) { // which a daemon before has told
				d.events.emit(control.Event{Snapshot: id, Kind: control.EventLost, Text: lostText(l)})
			}
			d.lostSnapshots = append(d.lostSnapshots, lostSnapshot(l))
		}
		known[l.ID] = true
	}
	if !whole {
		return lost
	}
	for _, id := range d.events.lostIDs() {
		if !slices.ContainsFunc(found, func(l *snapshots.Lost) bool { return l.ID.String() == id }) {
			// A daemon that died had cleared it, all but saying so.
			d.events.emit(control.Event{Snapshot: id, Kind: control.EventDestroyed, Text: "there is no note of it any more in " + dir})
		}
	}
	return lost
}

// foreignNote is said of a note that a copy of a machine finds.
const foreignNote = "a note is of another machine's snapshot, which this machine leaves alone: remove the note if that machine is no more"

// retryLost is how often storage that is not there is looked for.
const retryLost = 10 * time.Second

// clearLost clears the storage of lost snapshots until nothing is left to be done, or
// ctx ends. again: some could not be read, so that not all are known.
func (d *Daemon) clearLost(ctx context.Context, lost []*snapshots.Lost, known map[uuid.UUID]bool, again bool) {
	m := snapshots.Machine{Root: d.host.Root, Find: d.host.Find, Probe: d.probe, Started: disk.Started()}
	for {
		var left []*snapshots.Lost
		for _, l := range lost {
			done := l.Clear(m)
			if done {
				done = d.keepNote(l.ID, nil) == nil
			}
			if !done {
				left = append(left, l)
			}
			end, err := d.begin(ctx, "clear what lost snapshots stored")
			if err != nil {
				return
			}
			d.tellLost(l, done)
			end()
		}
		if len(left) == 0 && !again {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryLost):
		}
		if again { // what is known of those that are left stays
			found, err := d.lostBefore()
			again = err != nil
			end, err := d.begin(ctx, "look for lost snapshots")
			if err != nil {
				return
			}
			left = append(left, d.tellFound(found, known, !again)...)
			end()
		}
		lost = left
	}
}

// tellLost says how far the clearing of a lost snapshot is; needs opLock.
func (d *Daemon) tellLost(l *snapshots.Lost, done bool) {
	now := lostSnapshot(l)
	at := slices.IndexFunc(d.lostSnapshots, func(k control.LostSnapshot) bool { return k.ID == now.ID })
	if at < 0 {
		d.lostSnapshots = append(d.lostSnapshots, now)
		at = len(d.lostSnapshots) - 1
	} else if d.lostSnapshots[at].Reason == now.Reason && !done {
		return
	}
	d.lostSnapshots[at] = now
	d.cleared[now.ID] = done
	for _, st := range l.Storage {
		if st.Done {
			d.opts.Log.Info("storage of a lost snapshot", "snapshot", now.ID, "storage", st.Path, "result", st.Text)
		} else {
			d.opts.Log.Warn("storage of a lost snapshot cannot be cleared yet", "snapshot", now.ID, "storage", st.Path, "reason", publicPaths(st.Text))
		}
	}
	if done {
		d.events.emit(control.Event{Snapshot: now.ID, Kind: control.EventDestroyed, Text: lostText(l)})
	}
}

// forgetCleared forgets the lost snapshots of which nothing is left: who takes another
// knows of them; needs opLock.
func (d *Daemon) forgetCleared() {
	d.lostSnapshots = slices.DeleteFunc(d.lostSnapshots, func(l control.LostSnapshot) bool { return d.cleared[l.ID] })
}

func devicesOf(l *snapshots.Lost) (names []string) {
	for _, dev := range l.Devices {
		names = append(names, dev.Name)
	}
	return names
}

// lostText names a lost snapshot's devices, and says what became of its storage.
func lostText(l *snapshots.Lost) string {
	var devices, storage []string
	for _, dev := range l.Devices {
		devices = append(devices, dev.Name+" ("+dev.Path+")")
	}
	for _, st := range l.Storage {
		if st.Text != "" {
			storage = append(storage, st.Path+": "+publicPaths(st.Text))
		}
	}
	text := "lost in a restart or a loss of power, of " + strings.Join(devices, ", ")
	if len(storage) > 0 {
		text += "; " + strings.Join(storage, "; ")
	}
	return text
}

// lostSnapshot is what is told of a lost snapshot.
func lostSnapshot(l *snapshots.Lost) control.LostSnapshot {
	lost := control.LostSnapshot{ID: l.ID.String(), Devices: devicesOf(l), Reason: lostText(l)}
	for _, st := range l.Storage {
		lost.Storage = append(lost.Storage, st.Path)
	}
	return lost
}

// examineLost looks at the storage that snapshots of other boots have left.
func examineLost(c Config) []Check {
	if c.StateDir == "" {
		return nil
	}
	d := &Daemon{host: host(c.DiskTimeout), opts: Options{Config: c}}
	lost, err := d.lostBefore()
	var out []Check
	if err != nil {
		out = append(out, Check{"lost snapshots", Note, err.Error(), ""})
	}
	for _, l := range lost {
		if l.Foreign {
			out = append(out, Check{"lost snapshot", Note, l.ID.String() + ": " + foreignNote, ""})
			continue
		}
		out = append(out, Check{"lost snapshot", Note, l.ID.String() + " was " + lostText(l) + ": what it stored may remain", "start the daemon with its storage there"})
	}
	return out
}
