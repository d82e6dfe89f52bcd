package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// TestOutdated: what must not be believed any more, and cannot be used up yet, is not
// forgotten when the daemon dies.
func TestOutdated(t *testing.T) {
	dir := t.TempDir()
	run := RunDir(filepath.Join(dir, "run"))
	if err := errors.Join(run.make(), run.subdir(stateName, 0o700)); err != nil {
		t.Fatal(err)
	}
	daemon := func(state string) *Daemon {
		d := &Daemon{opts: Options{Dir: run, Log: quiet(), Config: Config{StateDir: filepath.Join(dir, state), DiskTimeout: 10 * time.Second}}, host: host(0)}
		d.opLock = make(chan struct{}, 1)
		d.opLock <- struct{}{} // so that nothing is tried again
		return d
	}
	id := disk.Identity{"serial=a"}
	d := daemon("state")
	store, err := cbtstate.Open("/", d.opts.Config.StateDir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	kept := func() (here bool) {
		_, _, err := store.Find(id, "data", 1000)
		return err == nil
	}
	r := cbtstate.Record{ID: uuid.New(), Name: "data", Disk: cbtstate.Disk{Identity: id}}
	if err := store.Save(r, []byte("map"), func() bool { return true }); err != nil || !kept() {
		t.Fatal(err)
	}
	if err := os.Chmod(d.opts.Config.StateDir, 0o777); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d.useLater(d.here(id))
	}
	if d.useOutdated(); len(d.outdated) != 1 {
		t.Errorf("used up in a directory that everybody can write to: %v", d.outdated)
	}

	// The next one has another state_dir, and owes it all the same.
	next := daemon("another")
	next.openOutdated()
	if len(next.outdated) != 1 || !next.outdated[0].is(d.here(id)) {
		t.Fatalf("the next daemon owes %v", next.outdated)
	}
	if err := os.Chmod(d.opts.Config.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if next.useOutdated(); len(next.outdated) != 0 || kept() {
		t.Errorf("still there: %v, %v", next.outdated, kept())
	}
	if _, err := os.Stat(next.outdatedFile()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing is owed any more: %v", err)
	}

	// What a filter has begun anew is not taken back for it.
	next.useLater(d.here(id))
	next.usedUp(d.here(id))
	third := daemon("state")
	if third.openOutdated(); len(third.outdated) != 0 || third.outdatedDamaged != nil {
		t.Errorf("%v, %v", third.outdated, third.outdatedDamaged)
	}

	// What cannot be read stays so for all daemons to come, because the next debts do not
	// take its place.
	if err := os.WriteFile(third.outdatedFile(), []byte("ublk-blksnap outdated"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		fourth := daemon("state")
		if fourth.openOutdated(); fourth.outdatedDamaged == nil {
			t.Error("a damaged file was read")
		}
		fourth.useLater(d.here(id))
	}
}
