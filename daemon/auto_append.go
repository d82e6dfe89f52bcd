package daemon

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A snapshot may get more storage by itself when it runs low: one file in a directory,
// which grows as long as so much of its filesystem stays free. That the snapshot shall have
// it is on record with it, and so is the storage once it is appended. Nothing tells of the
// time between: whoever serves the snapshot looks whether it is low, and has none.

// autoRetry is how long after a failure the next try comes: others may make room.
const autoRetry = 10 * time.Second

// autoAppend is what the daemon does about it for one snapshot, of forwardEvents alone.
type autoAppend struct {
	done chan error // of the try that is under way; nil: there is none
	next time.Time  // the next try comes after that
	told string     // why the last one failed
	over bool       // no try comes any more
}

// autoAppendOf is what a new snapshot has, as it was asked for or is configured. A
// configuration that does not fit this snapshot keeps nobody from having one.
func (d *Daemon) autoAppendOf(asked *control.AutoAppend) (*control.AutoAppend, error) {
	if asked != nil {
		return d.checkAutoAppend(*asked)
	}
	a, err := d.checkAutoAppend(control.AutoAppend{Path: d.opts.Config.AutoAppend})
	if err != nil {
		d.opts.Log.Warn("a snapshot will get no more storage by itself: see auto_append in the configuration", "error", err)
	}
	return a, nil
}

func (d *Daemon) checkAutoAppend(a control.AutoAppend) (*control.AutoAppend, error) {
	if a.Path == "" {
		if a.Reserve != 0 {
			return nil, invalid("a reserve of %d%%, and no directory for storage to append", a.Reserve)
		}
		return nil, nil
	}
	if a.Reserve == 0 {
		a.Reserve = int(d.opts.Config.AutoAppendReserve)
	}
	if !strings.HasPrefix(a.Path, "/") {
		return nil, invalid("storage to append in %q: not an absolute path", a.Path)
	}
	if a.Reserve < 1 || a.Reserve > 99 {
		return nil, invalid("a reserve of %d%% is not within 1%% to 99%%", a.Reserve)
	}
	place, err := d.host.OpenPlace(a.Path)
	if err != nil {
		return nil, fail(err, "storage to append in %s", a.Path)
	}
	defer place.Close()
	if place.Kind() != unix.S_IFDIR {
		return nil, &control.Error{Code: control.Invalid, Errno: unix.ENOTDIR, Message: "storage to append in " + a.Path + ": not a directory"}
	}
	if _, err := d.checkPlace(place); err != nil {
		return nil, fail(err, "storage to append in %s", a.Path)
	}
	return &a, nil
}

// low says whether a snapshot needs more storage than there will be, and has used four
// fifths of that: as diffarea tells it.
func (s *snapshot) low() bool {
	u := s.snap.Usage()
	return u.Limit >= 0 && u.Need > u.Limit && 5*u.Regions >= 4*u.Limit
}

// lookAfter begins to append storage if the snapshot needs it now.
func (a *autoAppend) lookAfter(d *Daemon, s *snapshot, now time.Time) {
	d.mu.Lock()
	wanted := s.note.AutoAppend
	has := slices.ContainsFunc(s.storage, func(st control.Storage) bool { return st.Auto })
	early := s.destroying || s.taken == nil
	d.mu.Unlock()
	if wanted == nil || has || early || a.over || a.done != nil || now.Before(a.next) || s.snap.Err() != 0 || !s.low() {
		return
	}
	a.done = make(chan error, 1)
	go func() { a.done <- d.appendItself(s, *wanted) }()
}

// ended tells what came of a try.
func (a *autoAppend) ended(d *Daemon, s *snapshot, err error, now time.Time) {
	a.done, a.next = nil, now.Add(autoRetry)
	if err == nil {
		return
	}
	a.over = control.CodeOf(err) == control.Timeout // it may be appended yet, when it answers
	if text := err.Error(); text != a.told {
		a.told = text
		d.opts.Log.Warn("a snapshot that runs low gets no more storage", "snapshot", s.called(), "error", text)
		d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventNotAppended, Text: text})
	}
}

// appendItself appends the storage.
func (d *Daemon) appendItself(s *snapshot, a control.AutoAppend) error {
	end, err := d.begin(context.Background(), "append storage to snapshot %s, which runs low", s.id)
	if err != nil {
		return err
	}
	defer end()
	if _, err := d.usable(s.id); err != nil {
		return err
	}
	if err := d.appendTo(s, control.Storage{Path: a.Path, Reserve: a.Reserve, Auto: true}); err != nil {
		return err
	}
	d.opts.Log.Info("storage was appended to a snapshot that ran low", "snapshot", s.called(), "storage", a.Path)
	d.events.emit(control.Event{Snapshot: s.id, Kind: control.EventAppended,
		Text: fmt.Sprintf("storage in %s, of whose filesystem %d%% stay free", a.Path, a.Reserve)})
	return nil
}

// percentage is a parameter that holds so many percent, from 1 to 99.
type percentage struct{ v *int64 }

func (p percentage) String() string { return strconv.FormatInt(*p.v, 10) + "%" }
func (p percentage) Type() string   { return "percentage" }
func (p percentage) Set(s string) error {
	v, err := control.ParsePercent(s)
	if err == nil {
		*p.v = int64(v)
	}
	return err
}
