package daemon

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// TestLostFoundLater: a snapshot of another boot has its event, once, whether the notes
// can be read at the start or later, and whichever daemon tells its end.
func TestLostFoundLater(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	base := t.TempDir()
	dir := RunDir(filepath.Join(base, "run"))
	if err := os.MkdirAll(dir.State(), 0o700); err != nil {
		t.Fatal(err)
	}
	begin := func() *Daemon {
		t.Helper()
		d := &Daemon{opts: Options{Dir: dir, Log: quiet(), Config: DefaultConfig()}, host: host(0), opLock: make(chan struct{}, 1), cleared: map[string]bool{}, unnoted: map[uuid.UUID]bool{}}
		d.opts.Config.StateDir = filepath.Join(base, "kept")
		d.activity.Store(new(string))
		d.openEvents()
		return d
	}
	d := begin()
	note := func() string {
		t.Helper()
		id := uuid.New()
		text, err := statefile.Encode("lost-snapshot", 1, map[string]any{"id": id, "created": time.Now(), "boot": "another", "devices": nil, "storage": nil})
		if err == nil {
			err = d.writeNote(id.String()+noteSuffix, text)
		}
		if err != nil {
			t.Fatal(err)
		}
		return id.String()
	}
	id := note()
	notes := notesDir(d.opts.Config.StateDir)
	if err := os.Chmod(notes, 0o777); err != nil { // so that none is read
		t.Fatal(err)
	}
	d.opLock <- struct{}{}
	d.findLost(ctx)
	if got, err := seen(d.events, control.WatchRequest{}); got != "" || len(d.lostSnapshots) != 0 {
		t.Fatalf("of notes that cannot be read: %s, %v", got, err)
	}
	if err := os.Chmod(notes, 0o700); err != nil {
		t.Fatal(err)
	}
	<-d.opLock
	lost := func(id string) string { return id + " " + control.EventLost }
	ended := func(id string) string { return lost(id) + ", " + id + " " + control.EventDestroyed }
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if got, _ := seen(d.events, control.WatchRequest{}); got == ended(id) { // it has no storage
			break
		} else if time.Since(began) > time.Minute {
			t.Fatalf("found later: %q", got)
		}
	}
	cancel()

	// Two daemons find another, which is told once.
	id = note()
	known := map[uuid.UUID]bool{}
	for n := 1; n >= 0; n-- {
		d = begin()
		found, err := d.lostBefore()
		if err != nil || len(found) != 1 {
			t.Fatalf("%v, %v", found, err)
		}
		if now := d.tellFound(found, known, true); len(now) != n {
			t.Errorf("%d of them are new, want %d", len(now), n)
		}
		if now := d.tellFound(found, map[uuid.UUID]bool{}, true); len(now) != 1 {
			t.Errorf("to the next daemon %d of them are new", len(now))
		}
		d.tellFound(nil, known, false)
		if got, _ := seen(d.events, control.WatchRequest{ID: id}); got != lost(id) {
			t.Errorf("with its note: %s", got)
		}
	}
	// One that has cleared it, and then died, has not said so.
	d.tellFound(nil, known, true)
	if got, err := seen(d.events, control.WatchRequest{ID: id}); got != ended(id) || err != nil {
		t.Errorf("without its note: %s, %v", got, err)
	}
}
