package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A device of a dead daemon waits, with its I/O, while this one cannot have its disk.

// wait keeps a device that cannot be served yet.
func (d *Daemon) wait(s *survivor) {
	d.opts.Log.Error("a filter cannot be taken over yet: its I/O waits", "name", s.record.Name, "disk", s.record.Original.Path, "reason", s.reason)
	d.stopIfClaimed(s)
	d.mu.Lock()
	d.waiting[s.record.Name] = s
	d.mu.Unlock()
}

// stopIfClaimed has nothing believed of a disk that somebody else has, who may write to
// it; needs opLock, or to be the only one.
func (d *Daemon) stopIfClaimed(s *survivor) {
	if s.record.ClaimedByOther {
		d.stopIdentity(nil, s.record.kept())
	}
}

// lost is what is told of a device that waits.
func (s *survivor) lost() control.LostDevice {
	return control.LostDevice{Name: s.record.Name, Original: s.record.Original.Path, Path: "/dev/" + diskName(s.record.ID), Waits: true, Reason: publicPaths(s.reason.Error())}
}

// retry tries the waiting devices again until none is left or ctx ends.
func (d *Daemon) retry(ctx context.Context) {
	for len(d.sortedWaiting()) > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryInterval):
		}
		end, err := d.begin(ctx, "look for the disks of waiting devices")
		if err != nil {
			return
		}
		for _, s := range d.sortedWaiting() {
			d.tryAgain(ctx, s)
		}
		end()
	}
}

// tryAgain needs opLock.
func (d *Daemon) tryAgain(ctx context.Context, s *survivor) {
	// What is in the table never changes, because whoever looks reads it without opLock.
	try := *s
	try.reason = nil
	claiming, cancel := context.WithTimeout(ctx, retryInterval)
	gone := d.claim(claiming, &try)
	cancel()
	if gone {
		d.forget(ctx, s.record)
	} else if try.reason == nil {
		try.dev, try.reason = d.reopen(ctx, &try)
	}
	d.mu.Lock()
	if gone || try.reason == nil {
		delete(d.waiting, s.record.Name)
	} else {
		d.waiting[s.record.Name] = &try
	}
	d.mu.Unlock()
	switch {
	case gone:
	case try.reason == nil:
		d.leaveKept(&try)
		d.beginIntent(ctx, &try)
		d.resume(ctx, &try)
		d.nameAgain(ctx, &try)
	default:
		if !s.record.ClaimedByOther {
			d.stopIfClaimed(&try)
		}
		if try.reason.Error() == s.reason.Error() {
			return
		}
		d.opts.Log.Error("a filter cannot be taken over yet: its I/O waits", "name", s.record.Name, "disk", s.record.Original.Path, "reason", try.reason)
	}
}

func (d *Daemon) sortedWaiting() []*survivor {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*survivor, 0, len(d.waiting))
	for _, s := range d.waiting {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *survivor) int { return strings.Compare(a.record.Name, b.record.Name) })
	return out
}

// findWaiting is the waiting device that ref names, nil if there is none.
func (d *Daemon) findWaiting(ref string) *survivor {
	for _, s := range d.sortedWaiting() {
		path := "/dev/" + diskName(s.record.ID)
		if slices.Contains([]string{s.record.Name, s.record.shown().Path, path, filepath.Join(linkDir, s.record.Name)}, ref) {
			return s
		}
	}
	return nil
}

// removeWaiting lets the I/O of a waiting device fail; needs opLock.
func (d *Daemon) removeWaiting(ctx context.Context, s *survivor) error {
	over, filter := d.attachmentOver(s.record.ID)
	if err := d.ctl.DeleteDevice(ctx, s.record.ID); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	d.giveBackForced(ctx, over, filter)
	r := s.record
	r.Ending = nil // by force
	d.forget(ctx, r)
	d.mu.Lock()
	delete(d.waiting, s.record.Name)
	d.mu.Unlock()
	return nil
}

// waitingError refuses what a waiting device cannot do.
func (s *survivor) waitingError(what string) error {
	return &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: fmt.Sprintf("%s: its filter waits to be taken over from a daemon that died: %s", what, publicPaths(s.reason.Error())),
		Fix: "mend that, or let its I/O fail and remove it: ublk-blksnap remove --force " + s.record.Name}
}
