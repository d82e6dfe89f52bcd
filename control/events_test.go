package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWaitEvent(t *testing.T) {
	ctx := context.Background()
	l := newEventLog()
	now := func(id string) (Event, error) { return l.wait(ctx, WaitRequest{ID: id}) }

	if _, err := now("a"); CodeOf(err) != NotFound || !errors.Is(err, unix.ESRCH) {
		t.Fatalf("unknown snapshot: %v", err)
	}
	l.emit(Event{Snapshot: "a", Kind: EventCreated})
	l.emit(Event{Snapshot: "b", Kind: EventCreated})
	if _, err := now("a"); CodeOf(err) != Timeout {
		t.Fatalf("creation is not for waiters: %v", err)
	}
	l.emit(Event{Snapshot: "a", Kind: EventLowFreeSpace, Sectors: 1})
	l.emit(Event{Snapshot: "b", Kind: EventNoSpace})
	l.emit(Event{Snapshot: "a", Kind: EventCorrupted})
	for _, want := range []string{EventLowFreeSpace, EventCorrupted} {
		if e, err := now("a"); err != nil || e.Kind != want || e.Snapshot != "a" {
			t.Fatalf("got %+v, %v; want %s", e, err, want)
		}
	}
	if _, err := now("a"); CodeOf(err) != Timeout {
		t.Fatalf("each event once: %v", err)
	}

	// A waiter wakes by an event, and by the end of the snapshot.
	type result struct {
		e   Event
		err error
	}
	wait := func() chan result {
		c := make(chan result, 1)
		go func() {
			e, err := l.wait(ctx, WaitRequest{ID: "a", Timeout: time.Minute})
			c <- result{e, err}
		}()
		return c
	}
	c := wait()
	l.emit(Event{Snapshot: "a", Kind: EventNoSpace})
	if r := <-c; r.err != nil || r.e.Kind != EventNoSpace {
		t.Fatalf("%+v", r)
	}
	c = wait()
	for len(c) == 0 {
		// Until the waiter has found the snapshot, its end would not be noticed:
		// either is right.
		time.Sleep(time.Millisecond)
		l.emit(Event{Snapshot: "a", Kind: EventDestroyed})
		break
	}
	if r := <-c; CodeOf(r.err) != NotFound {
		t.Fatalf("%+v", r)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.wait(canceled, WaitRequest{ID: "b", Timeout: time.Minute}); err != nil {
		t.Fatal("an event that is there needs no waiting:", err)
	}
	if _, err := l.wait(canceled, WaitRequest{ID: "b", Timeout: time.Minute}); CodeOf(err) != Interrupted {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	l := newEventLog()
	l.emit(Event{Snapshot: "a", Kind: EventCreated})
	l.emit(Event{Snapshot: "b", Kind: EventCreated})
	one, all := make(chan error, 1), make(chan error, 1)
	started := make(chan struct{})
	var seenOne, seenAll []string
	go func() {
		one <- l.watch(context.Background(), "a", func(e Event) error {
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
		all <- l.watch(ctx, "", func(e Event) error {
			if e.Snapshot == "c" {
				select {
				case <-ready:
				default:
					close(ready)
				}
				return nil
			}
			seenAll = append(seenAll, e.Snapshot+e.Kind)
			if e.Kind == EventDestroyed {
				return errors.New("enough")
			}
			return nil
		})
	}()
	// It sees what comes once it watches: that it does shows in something else.
	for watching := false; !watching; {
		l.emit(Event{Snapshot: "c", Kind: EventCreated})
		select {
		case <-ready:
			watching = true
		case <-time.After(time.Millisecond):
		}
	}
	l.emit(Event{Snapshot: "b", Kind: EventTaken})
	l.emit(Event{Snapshot: "a", Kind: EventTaken})
	l.emit(Event{Snapshot: "a", Kind: EventDestroyed})
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
	if err := l.watch(ctx, "a", nil); CodeOf(err) != NotFound {
		t.Errorf("a destroyed snapshot: %v", err)
	}
	cancel()
	if err := l.watch(ctx, "b", func(Event) error { return nil }); CodeOf(err) != Interrupted {
		t.Error(err)
	}
}

func TestEventsAreBounded(t *testing.T) {
	l := newEventLog()
	for i := range 3 * maxEvents {
		l.emit(Event{Snapshot: fmt.Sprint(i % 2), Kind: EventNoSpace})
	}
	if n := len(l.recent); n != maxEvents {
		t.Errorf("%d events kept", n)
	}
	if e, err := l.wait(context.Background(), WaitRequest{ID: "0"}); err != nil || e.Seq != maxEvents+1 {
		t.Errorf("oldest kept: %+v, %v", e, err)
	}
}
