package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestEventsOutliveTheDaemon: the next daemon knows all events, and which a waiter has
// had.
func TestEventsOutliveTheDaemon(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "events.json")
	open := func() *eventLog {
		t.Helper()
		l, err := openEventLog(path, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := open()
	l.emit(control.Event{Snapshot: "a", Kind: control.EventCreated})
	l.emit(control.Event{Snapshot: "b", Kind: control.EventCreated})
	l.emit(control.Event{Snapshot: "a", Kind: control.EventLowFreeSpace, Sectors: 7})
	l.emit(control.Event{Snapshot: "a", Kind: control.EventCorrupted, Errno: -5})
	l.emit(control.Event{Snapshot: "b", Kind: control.EventDestroyed})
	if e, err := l.wait(ctx, control.WaitRequest{ID: "a"}); err != nil || e.Kind != control.EventLowFreeSpace {
		t.Fatalf("%+v, %v", e, err)
	}
	l = open()
	if !l.has("a", control.EventCorrupted) || l.has("a", control.EventTaken) || !slices.Equal(l.ids(), []string{"a"}) {
		t.Errorf("taken over: %v", l.ids())
	}
	if e, err := l.wait(ctx, control.WaitRequest{ID: "a"}); err != nil || e.Kind != control.EventCorrupted || e.Seq != 4 || e.Errno != -5 {
		t.Errorf("%+v, %v", e, err)
	}
	l = open()
	if e, err := l.wait(ctx, control.WaitRequest{ID: "a"}); control.CodeOf(err) != control.Timeout {
		t.Errorf("told twice: %+v, %v", e, err)
	}
	l.emit(control.Event{Snapshot: "a", Kind: control.EventDestroyed})
	if l.seq != 6 || len(l.recent) != 6 {
		t.Errorf("after %d events it remembers %d", l.seq, len(l.recent))
	}
	if err := os.WriteFile(path, []byte("no events"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := openEventLog(path, nil); err == nil || l == nil {
		t.Errorf("a damaged file: %v, %v", l, err)
	}
}

func TestWaitEvent(t *testing.T) {
	ctx := context.Background()
	l := newEventLog()
	now := func(id string) (control.Event, error) { return l.wait(ctx, control.WaitRequest{ID: id}) }

	if _, err := now("a"); control.CodeOf(err) != control.NotFound || !errors.Is(err, unix.ESRCH) {
		t.Fatalf("unknown snapshot: %v", err)
	}
	l.emit(control.Event{Snapshot: "a", Kind: control.EventCreated})
	l.emit(control.Event{Snapshot: "b", Kind: control.EventCreated})
	if _, err := now("a"); control.CodeOf(err) != control.Timeout {
		t.Fatalf("creation is not for waiters: %v", err)
	}
	l.emit(control.Event{Snapshot: "a", Kind: control.EventLowFreeSpace, Sectors: 1})
	l.emit(control.Event{Snapshot: "b", Kind: control.EventNoSpace})
	l.emit(control.Event{Snapshot: "a", Kind: control.EventCorrupted})
	for _, want := range []string{control.EventLowFreeSpace, control.EventCorrupted} {
		if e, err := now("a"); err != nil || e.Kind != want || e.Snapshot != "a" {
			t.Fatalf("got %+v, %v; want %s", e, err, want)
		}
	}
	if _, err := now("a"); control.CodeOf(err) != control.Timeout {
		t.Fatalf("each event once: %v", err)
	}

	// A waiter wakes by an event, and by the end of the snapshot.
	type result struct {
		e   control.Event
		err error
	}
	wait := func() chan result {
		c := make(chan result, 1)
		go func() {
			e, err := l.wait(ctx, control.WaitRequest{ID: "a", Timeout: time.Minute})
			c <- result{e, err}
		}()
		return c
	}
	c := wait()
	l.emit(control.Event{Snapshot: "a", Kind: control.EventNoSpace})
	if r := <-c; r.err != nil || r.e.Kind != control.EventNoSpace {
		t.Fatalf("%+v", r)
	}
	c = wait()
	for len(c) == 0 {
		// Until the waiter has found the snapshot, its end would not be noticed:
		// either is right.
		time.Sleep(time.Millisecond)
		l.emit(control.Event{Snapshot: "a", Kind: control.EventDestroyed})
		break
	}
	if r := <-c; control.CodeOf(r.err) != control.NotFound {
		t.Fatalf("%+v", r)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.wait(canceled, control.WaitRequest{ID: "b", Timeout: time.Minute}); err != nil {
		t.Fatal("an event that is there needs no waiting:", err)
	}
	if _, err := l.wait(canceled, control.WaitRequest{ID: "b", Timeout: time.Minute}); control.CodeOf(err) != control.Interrupted {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	l := newEventLog()
	l.emit(control.Event{Snapshot: "a", Kind: control.EventCreated})
	l.emit(control.Event{Snapshot: "b", Kind: control.EventCreated})
	one, all := make(chan error, 1), make(chan error, 1)
	started := make(chan struct{})
	var seenOne, seenAll []string
	go func() {
		one <- l.watch(context.Background(), "a", func(e control.Event) error {
			if len(seenOne) == 0 {
				close(started)
			}
			seenOne = append(seenOne, e.Kind)
			return nil
		})
	}()
	<-started
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready := make(chan struct{})
	go func() {
		all <- l.watch(ctx, "", func(e control.Event) error {
			if e.Snapshot == "c" {
				select {
				case <-ready:
				default:
					close(ready)
				}
				return nil
			}
			seenAll = append(seenAll, e.Snapshot+e.Kind)
			if e.Kind == control.EventDestroyed {
				return errors.New("enough")
			}
			return nil
		})
	}()
	// It sees what comes once it watches: that it does shows in something else.
	for watching := false; !watching; {
		l.emit(control.Event{Snapshot: "c", Kind: control.EventCreated})
		select {
		case <-ready:
			watching = true
		case <-time.After(time.Millisecond):
		}
	}
	l.emit(control.Event{Snapshot: "b", Kind: control.EventTaken})
	l.emit(control.Event{Snapshot: "a", Kind: control.EventTaken})
	l.emit(control.Event{Snapshot: "a", Kind: control.EventDestroyed})
	if err := <-one; err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(seenOne, " "); got != "created taken destroyed" {
		t.Errorf("snapshot a: %s", got)
	}
	if err := <-all; err == nil || err.Error() != "enough" {
		t.Fatal(err)
	}
	if got := strings.Join(seenAll, " "); got != "btaken ataken adestroyed" {
		t.Errorf("all: %s", got)
	}
	if err := l.watch(ctx, "a", nil); control.CodeOf(err) != control.NotFound {
		t.Errorf("a destroyed snapshot: %v", err)
	}
	cancel()
	if err := l.watch(ctx, "b", func(control.Event) error { return nil }); control.CodeOf(err) != control.Interrupted {
		t.Error(err)
	}
}

func TestEventsAreBounded(t *testing.T) {
	l := newEventLog()
	for i := range 3 * maxEvents {
		l.emit(control.Event{Snapshot: fmt.Sprint(i % 2), Kind: control.EventNoSpace})
	}
	if n := len(l.recent); n != maxEvents {
		t.Errorf("%d events kept", n)
	}
	if e, err := l.wait(context.Background(), control.WaitRequest{ID: "0"}); err != nil || e.Seq != maxEvents+1 {
		t.Errorf("oldest kept: %+v, %v", e, err)
	}
}
