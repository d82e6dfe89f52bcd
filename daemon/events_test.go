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
	began := l.seq
	if open().seq <= began {
		t.Error("a log that begins anew does not count on")
	}
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
	if e, err := l.wait(ctx, control.WaitRequest{ID: "a"}); err != nil || e.Kind != control.EventCorrupted || e.Seq != began+4 || e.Errno != -5 {
		t.Errorf("%+v, %v", e, err)
	}
	l = open()
	if e, err := l.wait(ctx, control.WaitRequest{ID: "a"}); control.CodeOf(err) != control.Timeout {
		t.Errorf("told twice: %+v, %v", e, err)
	}
	l.emit(control.Event{Snapshot: "a", Kind: control.EventDestroyed})
	if l.seq != began+6 || len(l.recent) != 6 {
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
		one <- l.watch(context.Background(), control.WatchRequest{ID: "a"}, func(e control.Event) error {
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
		all <- l.watch(ctx, control.WatchRequest{}, func(e control.Event) error {
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
	var late []string
	if err := l.watch(ctx, control.WatchRequest{ID: "a"}, func(e control.Event) error { late = append(late, e.Kind); return nil }); err != nil || strings.Join(late, " ") != "created taken destroyed" {
		t.Errorf("a destroyed snapshot: %v, %v", late, err)
	}
	if err := l.watch(ctx, control.WatchRequest{ID: "nobody"}, nil); control.CodeOf(err) != control.NotFound {
		t.Errorf("an unknown snapshot: %v", err)
	}
	cancel()
	if err := l.watch(ctx, control.WatchRequest{ID: "b"}, func(control.Event) error { return nil }); control.CodeOf(err) != control.Interrupted {
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

// seen are the kinds of the events that a watcher has at once, with their snapshots.
func seen(l *eventLog, r control.WatchRequest) (string, error) {
	var all []string
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // it gets what there is, and does not wait
	err := l.watch(ctx, r, func(e control.Event) error { all = append(all, e.Snapshot+e.Device+" "+e.Kind); return nil })
	return strings.Join(all, ", "), err
}

// TestEventsOfAStart: what a daemon tells while it starts, when nobody can watch it yet,
// is told to whoever comes then: also if that daemon dies before anybody can ask it, and
// for a snapshot that has ended meanwhile.
func TestEventsOfAStart(t *testing.T) {
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
	l.answer()
	l.emit(control.Event{Snapshot: "s", Kind: control.EventCreated})
	l.emit(control.Event{Snapshot: "s", Kind: control.EventTaken})
	number := l.last()

	// The next daemon tells this, and dies before it answers.
	l = open()
	l.emit(control.Event{Snapshot: "s", Kind: control.EventCorrupted, Errno: -5})
	l.emit(control.Event{Snapshot: "s", Kind: control.EventDestroyed})
	// And the one after that.
	l = open()
	l.emit(control.Event{Snapshot: "p", Kind: control.EventLost, Text: "power"})
	l.notice(control.Event{Kind: control.EventNewGeneration, Device: "8:0"})
	const start = "s corrupted, s destroyed, p lost, 8:0 new_generation"
	watch := func(when string, r control.WatchRequest, want string, code control.Code) {
		t.Helper()
		if got, err := seen(l, r); got != want || code == "" && err != nil || code != "" && control.CodeOf(err) != code {
			t.Errorf("%s: watching %+v: %s, %v; want %s, %s", when, r, got, err, want, code)
		}
	}
	watch("before it answers", control.WatchRequest{}, start, control.Interrupted)
	l.answer()
	l.emit(control.Event{Snapshot: "q", Kind: control.EventCreated})
	for _, when := range []string{"once it answers", "for ever"} {
		watch(when, control.WatchRequest{}, start, control.Interrupted)
		watch(when, control.WatchRequest{Since: number}, start+", q created", control.Interrupted)
		watch(when, control.WatchRequest{Since: number + 3}, "8:0 new_generation, q created", control.Interrupted)
		watch(when, control.WatchRequest{Since: 1 << 62}, "s created, s taken, "+start+", q created", control.Interrupted)
		watch(when, control.WatchRequest{ID: "s"}, "s created, s taken, s corrupted, s destroyed", "")
		watch(when, control.WatchRequest{ID: "s", Since: number}, "s corrupted, s destroyed", "")
		watch(when, control.WatchRequest{ID: "p"}, "p lost", control.Interrupted) // until it is cleared
		watch(when, control.WatchRequest{ID: "q"}, "q created", control.Interrupted)
		watch(when, control.WatchRequest{ID: "x"}, "", control.NotFound)
	}

	// Waiters have the end of a snapshot, once.
	for id, kind := range map[string]string{"s": control.EventCorrupted, "p": control.EventLost} {
		if e, err := l.wait(context.Background(), control.WaitRequest{ID: id}); err != nil || e.Kind != kind {
			t.Errorf("%s: %+v, %v", id, e, err)
		}
	}
	for range 2 {
		for _, id := range []string{"s", "p"} {
			if e, err := l.wait(context.Background(), control.WaitRequest{ID: id, Timeout: time.Minute}); control.CodeOf(err) != control.NotFound {
				t.Errorf("%s: told twice: %+v, %v", id, e, err)
			}
		}
		l = open()
	}

	// What was told before the last daemon answered is not of this one's start.
	watch("the next", control.WatchRequest{}, "", control.Interrupted)
	if ids, lost := l.ids(), l.lostIDs(); !slices.Equal(ids, []string{"q"}) || !slices.Equal(lost, []string{"p"}) {
		t.Errorf("snapshots %v, lost ones %v", ids, lost)
	}
	l.emit(control.Event{Snapshot: "p", Kind: control.EventDestroyed})
	watch("the next", control.WatchRequest{ID: "p"}, "p lost, p destroyed", "")
}

// TestEndedSnapshotsAreBounded: what is known of a snapshot that has ended goes with its
// last recent event.
func TestEndedSnapshotsAreBounded(t *testing.T) {
	l := newEventLog()
	for i := range 2 * maxEvents {
		id := fmt.Sprint(i)
		l.emit(control.Event{Snapshot: id, Kind: control.EventCorrupted})
		if _, err := l.wait(context.Background(), control.WaitRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		l.emit(control.Event{Snapshot: id, Kind: control.EventDestroyed})
	}
	if n := len(l.waited); n == 0 || n > maxEvents {
		t.Errorf("%d ended snapshots are known", n)
	}
	if _, err := seen(l, control.WatchRequest{ID: "0"}); control.CodeOf(err) != control.NotFound {
		t.Errorf("the first one: %v", err)
	}
}
