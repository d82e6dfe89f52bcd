package daemon

import (
	"bytes"
	"errors"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// TestAutoAppend: a snapshot that runs low gets one storage more, and what goes wrong is
// told once, and tried again.
func TestAutoAppend(t *testing.T) {
	d, dev, s := measured(t)
	d.host = host(time.Minute)
	d.opLock = make(chan struct{}, 1)
	d.events = newEventLog()
	var log bytes.Buffer
	d.opts.Log = NewLog(&log, slog.LevelInfo, false)
	d.activity.Store(new(string))
	d.devices = map[string]*device{} // none that the storage could lie on
	d.opts.Config = DefaultConfig()
	d.opts.Dir = RunDir(t.TempDir())
	if err := s.snap.Add(dev.filter, snapshots.Device{Name: dev.Name, Number: 1, Block: 512}); err != nil {
		t.Fatal(err)
	}
	kinds := func() (kinds []string) {
		for _, e := range d.events.recent {
			kinds = append(kinds, e.Kind)
		}
		return kinds
	}
	dir := t.TempDir()
	now := time.Now()
	var auto autoAppend
	try := func(begins bool) {
		t.Helper()
		auto.lookAfter(d, s, now)
		if (auto.done != nil) != begins {
			t.Fatalf("it begins: %v, want %v", auto.done != nil, begins)
		}
		if begins {
			auto.ended(d, s, <-auto.done, now)
		}
	}
	try(false) // nobody wants it
	s.note.AutoAppend = &control.AutoAppend{Path: filepath.Join(dir, "none", "there"), Reserve: 1}
	try(false) // nothing is copied yet
	s.taken = &now
	eventually(t, "a thread to hear of the device", s.low)
	try(true)
	try(false) // it has just failed
	now = now.Add(autoRetry)
	try(true) // and fails again, of which nobody has to hear
	if got := kinds(); !slices.Equal(got, []string{control.EventNotAppended}) {
		t.Fatalf("events %q", got)
	}
	s.note.AutoAppend.Path = dir
	now = now.Add(autoRetry)
	try(true)
	if got := kinds(); !slices.Equal(got, []string{control.EventNotAppended, control.EventAppended}) {
		t.Fatalf("events %q: %+v", got, d.events.recent)
	}
	if st := s.storage; len(st) != 1 || !st[0].Auto || st[0].Path != dir || st[0].Reserve != 1 {
		t.Errorf("storage %+v", st)
	}
	d.opts.Log.Flush(time.Minute)
	if got := log.String(); !regexp.MustCompile(`a snapshot has storage.* storage=` + regexp.QuoteMeta(dir) + ` at_most=\S+.* leaves_free=`).MatchString(got) {
		t.Errorf("the log does not say how far the storage grows: %s", got)
	}
	now = now.Add(autoRetry)
	try(false) // it has it
	auto = autoAppend{}
	auto.ended(d, s, &control.Error{Code: control.Timeout, Message: "does not answer"}, now)
	if !auto.over {
		t.Error("storage that may be appended yet is appended again")
	}
}

// TestCheckAutoAppend: what cannot be is refused when it is asked for, and passed over
// with a warning if it is only configured.
func TestCheckAutoAppend(t *testing.T) {
	d := &Daemon{opts: Options{Log: quiet(), Config: DefaultConfig()}, host: host(time.Minute)}
	dir := t.TempDir()
	if a, err := d.autoAppendOf(nil); a != nil || err != nil {
		t.Errorf("by default %+v, %v", a, err)
	}
	if a, err := d.autoAppendOf(&control.AutoAppend{Path: dir}); err != nil || *a != (control.AutoAppend{Path: dir, Reserve: 10}) {
		t.Errorf("%+v, %v", a, err)
	}
	for _, c := range []struct {
		control.AutoAppend
		want string
	}{
		{control.AutoAppend{Reserve: 5}, "no directory"}, {control.AutoAppend{Path: "x"}, "not an absolute path"}, {control.AutoAppend{Path: dir, Reserve: 100}, "not within"},
		{control.AutoAppend{Path: dir, Reserve: -1}, "not within"}, {control.AutoAppend{Path: "/dev/null"}, "not a directory"}, {control.AutoAppend{Path: dir + "/none/there"}, dir},
	} {
		_, err := d.autoAppendOf(&c.AutoAppend)
		if e := (*control.Error)(nil); !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.AutoAppend, err, c.want)
		}
	}
	d.opts.Config.AutoAppend = "/dev/null"
	if a, err := d.autoAppendOf(nil); a != nil || err != nil {
		t.Errorf("with a bad configuration %+v, %v", a, err)
	}
	d.opts.Config.AutoAppend, d.opts.Config.AutoAppendReserve = dir, 30
	if a, err := d.autoAppendOf(nil); err != nil || *a != (control.AutoAppend{Path: dir, Reserve: 30}) {
		t.Errorf("as configured %+v, %v", a, err)
	}
}
