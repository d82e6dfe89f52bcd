package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestWatchGoesOn: a watcher goes on with the next daemon from the last event that it has
// had, over deaths and over another program in the daemon's process, and ends when the
// daemon is stopped.
func TestWatchGoesOn(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asked := make(chan WatchRequest, 16)
	// serve is a daemon that tells events up to last, from the first that is asked for.
	// Then it ends by what it is told.
	serve := func(l net.Listener, last uint64, end <-chan string) {
		mux := http.NewServeMux()
		s := &http.Server{Handler: mux}
		mux.HandleFunc("POST /v1/info", func(w http.ResponseWriter, _ *http.Request) {
			_ = json.NewEncoder(w).Encode(Info{LastEvent: 3})
		})
		mux.HandleFunc("POST /v1/snapshot/watch", func(w http.ResponseWriter, r *http.Request) {
			var req WatchRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
				t.Error(err)
			}
			asked <- req
			from := req.Since
			if from == 0 {
				from = 2 // an event of the start
			}
			e := json.NewEncoder(w)
			for n := from + 1; n <= last; n++ {
				_ = e.Encode(EventLine{Event: &Event{Seq: n, Kind: EventTaken}})
			}
			if last > 0 {
				_ = http.NewResponseController(w).Flush()
			}
			switch <-end {
			case "dies":
				_ = s.Close()
			case "is stopped":
				_ = e.Encode(LastLine{Error: &Error{Code: Interrupted, Message: "watch: interrupted"}})
			case "reloads":
				_ = e.Encode(LastLine{Error: &Error{Code: Unavailable, Message: "watch: another program takes over"}})
			case "ends it":
			case "refuses":
				_ = e.Encode(LastLine{Error: &Error{Code: Busy, Message: "too many"}})
			}
		})
		_ = s.Serve(l)
	}
	listen := func() net.Listener {
		t.Helper()
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			l, err := net.Listen("unix", socket)
			if err == nil {
				return l
			}
			if time.Since(began) > time.Minute { // the daemon before is not dead yet
				t.Fatal(err)
			}
		}
	}
	end := make(chan string)
	watch := func() (<-chan uint64, <-chan error) {
		seen, done := make(chan uint64, 16), make(chan error, 1)
		go func() {
			c := NewClient(socket)
			defer c.Close()
			done <- c.Watch(ctx, WatchRequest{}, func(e Event) error { seen <- e.Seq; return nil })
		}()
		return seen, done
	}
	takes := func(seen <-chan uint64, want ...uint64) {
		t.Helper()
		var got []uint64
		for len(got) < len(want) {
			select {
			case n := <-seen:
				got = append(got, n)
			case <-time.After(time.Minute):
				t.Fatalf("seen %v, want %v", got, want)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seen %v, want %v", got, want)
		}
	}
	since := func(want uint64) {
		t.Helper()
		if r := <-asked; r != (WatchRequest{Since: want}) {
			t.Fatalf("asked for %+v, want since %d", r, want)
		}
	}

	if err := NewClient(socket).Watch(ctx, WatchRequest{}, nil); CodeOf(err) != Unavailable {
		t.Fatalf("no daemon runs: %v", err)
	}
	l := listen()
	go serve(l, 5, end)
	seen, done := watch()
	since(0)
	takes(seen, 3, 4, 5)
	end <- "dies"
	time.Sleep(3 * nextInterval) // it looks for a daemon in vain
	l = listen()
	go serve(l, 7, end)
	since(5)
	takes(seen, 6, 7)
	end <- "reloads"
	since(7)
	end <- "dies"
	l = listen()
	go serve(l, 8, end)
	since(7)
	takes(seen, 8)
	end <- "is stopped"
	if err := <-done; CodeOf(err) != Interrupted || err.Error() != "watch: interrupted" {
		t.Errorf("the daemon was stopped: %v", err)
	}
	l.Close()

	// Without any event it goes on where it began, and other errors end it.
	l = listen()
	go serve(l, 0, end)
	seen, done = watch()
	since(0)
	end <- "dies"
	l = listen()
	go serve(l, 4, end)
	since(3)
	takes(seen, 4)
	end <- "refuses"
	if err := <-done; CodeOf(err) != Busy {
		t.Errorf("refused: %v", err)
	}
	_, done = watch()
	since(0)
	end <- "ends it"
	if err := <-done; err != nil {
		t.Error(err)
	}
	// An error of the watcher's own is no daemon's, whatever it says.
	own := &Error{Code: Unavailable, Message: "own"}
	if err := NewClient(socket).Watch(ctx, WatchRequest{}, func(Event) error { return own }); !errors.Is(err, own) {
		t.Errorf("the watcher's own error: %v", err)
	}
	<-asked
	end <- "ends it" // before another waits for his end
	_, done = watch()
	since(0)
	end <- "dies"
	cancel()
	if err := <-done; CodeOf(err) != Interrupted {
		t.Error(fmt.Errorf("given up while no daemon is there: %w", err))
	}
}

// TestWatchByName: the next daemon is asked for the snapshot that was watched, and not for
// another one that has its name by then.
func TestWatchByName(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 4)
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/info", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(Info{}) })
	mux.HandleFunc("/v1/snapshot/watch", func(w http.ResponseWriter, r *http.Request) {
		var q WatchRequest
		_ = json.NewDecoder(r.Body).Decode(&q)
		asked <- q.ID
		if q.ID == "nightly" {
			_ = json.NewEncoder(w).Encode(EventLine{Event: &Event{Seq: 3, Snapshot: "u", Name: "nightly"}})
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	s := &http.Server{Handler: mux}
	go func() { _ = s.Serve(l) }()
	defer s.Close()
	c := NewClient(socket)
	defer c.Close()
	if err := c.Watch(context.Background(), WatchRequest{ID: "nightly"}, func(Event) error { return nil }); err != nil {
		t.Error(err)
	}
	if first, next := <-asked, <-asked; first != "nightly" || next != "u" {
		t.Errorf("asked for %s and %s", first, next)
	}
}
