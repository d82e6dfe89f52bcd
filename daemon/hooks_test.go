package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// hooked is a daemon with hooks, each of which notes what it is told and does as the file
// beside it says.
func hooked(t *testing.T, names ...string) (d *Daemon, notes func() string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	base := t.TempDir()
	hooks, out := filepath.Join(base, "hooks"), filepath.Join(base, "out")
	if err := errors.Join(os.Mkdir(hooks, 0o755), os.Mkdir(filepath.Join(base, "state"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text := fmt.Sprintf("#!/bin/sh\necho %s $1 $UBLK_BLKSNAP_NAME $UBLK_BLKSNAP_RESULT $UBLK_BLKSNAP_ERROR >>%s\n[ ! -e %s/%s.$1 ] || . %s/%s.$1\n", name, out, base, name, base, name)
		if err := os.WriteFile(filepath.Join(hooks, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	prober, err := disk.StartProber("ublk-blksnap", ProbeCommand, "/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(prober.Close)
	d = &Daemon{host: host(0), events: newEventLog(), snapshots: map[string]*snapshot{}, opts: Options{Log: quiet(), Dir: RunDir(base), Config: DefaultConfig(), Prober: prober}}
	d.opts.Config.HookDir = hooks
	d.ending.untilEnd, d.ending.end = context.WithCancel(context.Background())
	return d, func() string {
		text, _ := os.ReadFile(out)
		_ = os.Remove(out)
		return string(text)
	}
}

func (d *Daemon) does(t *testing.T, what, text string) {
	t.Helper()
	path := filepath.Join(string(d.opts.Dir), what)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
}

func TestHooks(t *testing.T) {
	d, notes := hooked(t, "10-a", "20-b")
	s := &snapshot{id: uuidA, note: snapshotNote{Name: "nightly"}}
	ctx := context.Background()
	// take plays a take that ends with err.
	take := func(t *testing.T, err error) (*hookRun, error) {
		t.Helper()
		run := &hookRun{Snapshot: s.id, Name: s.note.Name}
		before := d.beforeTakeOf(ctx, run)
		if before == nil {
			if _, err := os.Stat(d.hooksFile()); err != nil {
				t.Errorf("nothing is on record: %v", err)
			}
			d.afterTake(run, err)
		}
		if _, err := os.Stat(d.hooksFile()); err == nil {
			t.Error("the record is left")
		}
		return run, before
	}
	want := func(t *testing.T, lines ...string) {
		t.Helper()
		if got := notes(); got != strings.Join(lines, "\n")+"\n" {
			t.Errorf("hooks were told\n%s, want %q", got, lines)
		}
	}
	t.Run("taken", func(t *testing.T) {
		if run, err := take(t, nil); err != nil || len(run.failed) > 0 {
			t.Errorf("%v, %v", run, err)
		}
		want(t, "10-a pre nightly", "20-b pre nightly", "20-b post nightly taken", "10-a post nightly taken")
	})
	t.Run("not taken", func(t *testing.T) {
		if _, err := take(t, errors.New("no space\nat all")); err != nil {
			t.Error(err)
		}
		want(t, "10-a pre nightly", "20-b pre nightly", "20-b post nightly failed no space", "10-a post nightly failed no space")
	})
	t.Run("cancelled", func(t *testing.T) {
		d.does(t, "10-a.pre", "echo it is down >&2; exit 1")
		_, err := take(t, nil)
		if e := errorOf(err); err == nil || !strings.Contains(e.Message, "hook 10-a before the take: failed: exit status 1: it is down") || !strings.Contains(e.Fix, "--no-hooks") {
			t.Errorf("%v", err)
		}
		want(t, "10-a pre nightly", "10-a post nightly failed hook 10-a before the take: failed: exit status 1: it is down")
	})
	t.Run("late", func(t *testing.T) {
		d.opts.Config.HookTimeout = time.Second
		defer func() { d.opts.Config.HookTimeout = time.Minute }()
		d.does(t, "20-b.pre", "sleep 1000")
		if _, err := take(t, nil); control.CodeOf(err) != control.Timeout {
			t.Errorf("%v", err)
		}
		if got := notes(); strings.Count(got, "post nightly failed") != 2 {
			t.Errorf("hooks were told\n%s", got)
		}
	})
	t.Run("the caller goes", func(t *testing.T) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(context.Background())
		defer func() { ctx = context.Background() }()
		d.opts.Config.HooksRequired = false // which does not help then
		defer func() { d.opts.Config.HooksRequired = true }()
		d.does(t, "10-a.pre", "touch "+d.opts.Dir.path("runs")+"; sleep 1000")
		go func() {
			for !d.opts.Dir.has("runs") {
				time.Sleep(time.Millisecond)
			}
			cancel()
		}()
		if _, err := take(t, nil); control.CodeOf(err) != control.Interrupted {
			t.Errorf("%v", err)
		}
		if got := notes(); !strings.HasPrefix(got, "10-a pre nightly\n10-a post nightly failed") {
			t.Errorf("hooks were told\n%s", got)
		}
	})
	t.Run("not required", func(t *testing.T) {
		d.opts.Config.HooksRequired = false
		defer func() { d.opts.Config.HooksRequired = true }()
		d.does(t, "10-a.pre", "exit 1")
		d.does(t, "20-b.post", "exit 2")
		run, err := take(t, nil)
		if err != nil || len(run.failed) != 2 || !strings.Contains(run.failed[0], "10-a before") || !strings.Contains(run.failed[1], "20-b after") {
			t.Errorf("%v, %v", run, err)
		}
		want(t, "10-a pre nightly", "20-b pre nightly", "20-b post nightly taken", "10-a post nightly taken")
		if e := d.events.recent; len(e) != 2 || e[0].Kind != control.EventHookFailed || e[0].Snapshot != uuidA || e[1].Text != run.failed[1] {
			t.Errorf("events %+v", e)
		}
	})
	t.Run("foreign", func(t *testing.T) {
		path := filepath.Join(d.opts.Config.HookDir, "10-a")
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(path, 0o755)
		if _, err := take(t, nil); err == nil || !strings.Contains(err.Error(), path+" is not root's alone") {
			t.Errorf("%v", err)
		}
		if got := notes(); got != "" {
			t.Errorf("hooks were told\n%s", got)
		}
	})
	t.Run("the daemon dies", func(t *testing.T) {
		for _, taken := range []bool{true, false} {
			if err := d.beforeTakeOf(ctx, &hookRun{Snapshot: s.id, Name: s.note.Name}); err != nil {
				t.Fatal(err)
			}
			result := "failed the daemon has died"
			d.snapshots = map[string]*snapshot{}
			if taken {
				result = "taken"
				d.snapshots[s.id] = &snapshot{id: s.id, taken: &time.Time{}}
			}
			d.runOwedHooks()
			d.runOwedHooks() // which owes nothing any more
			want(t, "10-a pre nightly", "20-b pre nightly", "20-b post nightly "+result, "10-a post nightly "+result)
		}
	})
}
