package daemon

import (
	"context"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
)

func TestNotMounted(t *testing.T) {
	const fstab = "# a comment /var x\nUUID=1 / ext4 defaults 0 1\nUUID=2 /var/ ext4 noauto 0 2\nUUID=3 /srv/a\\040b xfs nofail 0 2\nnone none swap sw 0 0\n/dev/x /home ext4 defaults 0 2\n"
	mounts := func(points ...string) (s string) {
		for _, p := range points {
			s += "36 1 8:1 / " + p + " rw - ext4 /dev/sda1 rw\n"
		}
		return s
	}
	for _, c := range []struct{ path, mounts, want string }{
		{"/var/lib/x", mounts("/", "/var"), ""},
		{"/var/lib/x", mounts("/"), "/var"},
		{"/variable/x", mounts("/"), ""},
		{"/srv/a b/x", mounts("/"), "/srv/a b"},
		{"/srv/a b/x", mounts("/", `/srv/a\040b`), ""},
		{"/home", mounts("/"), "/home"},
		{"/etc/x", mounts("/"), ""},
	} {
		if got := notMounted(c.path, fstab, c.mounts); got != c.want {
			t.Errorf("%s: %q, want %q", c.path, got, c.want)
		}
	}
}

// TestHistoryReasons: the API has the words of package cbtstate, which it cannot
// import.
func TestHistoryReasons(t *testing.T) {
	for api, state := range map[string]string{
		control.HistoryNone: cbtstate.NoState, control.HistoryUnclean: cbtstate.Unclean, control.HistoryUsed: cbtstate.Used,
		control.HistoryOtherDisk: cbtstate.OtherDisk, control.HistoryOtherHost: cbtstate.OtherHost, control.HistoryOtherSize: cbtstate.OtherSize, control.HistoryOtherBlock: cbtstate.OtherBlock,
		control.HistoryWritten: cbtstate.Written, control.HistoryDamaged: cbtstate.Damaged, control.HistoryVersion: cbtstate.Version,
		control.HistoryUntrusted: cbtstate.Untrusted, control.HistoryUnavailable: cbtstate.NoPlace, control.HistoryUnknown: cbtstate.Unknown,
	} {
		if api != state {
			t.Errorf("the API calls %q what the state calls %q", api, state)
		}
	}
}

// TestNotice: an event of a device reaches those who watch everything, and nobody
// else.
func TestNotice(t *testing.T) {
	l := newEventLog()
	l.emit(control.Event{Snapshot: "s", Kind: control.EventTaken})
	seen := make(chan control.Event)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	begun := make(chan struct{})
	go func() {
		close(begun)
		_ = l.watch(ctx, control.WatchRequest{}, func(e control.Event) error { seen <- e; return nil })
	}()
	<-begun
	go func() {
		for ctx.Err() == nil {
			l.notice(control.Event{Kind: control.EventNewGeneration, Text: "why"})
		}
	}()
	if e := <-seen; e.Kind != control.EventNewGeneration || e.Text != "why" || e.Snapshot != "" {
		t.Errorf("%+v", e)
	}
	if n := len(l.snapshots["s"].events); n != 1 || len(l.snapshots) != 1 {
		t.Errorf("the snapshot has %d events, %d snapshots", n, len(l.snapshots))
	}
}
