package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// watchedDisk is a filter over a disk of a machine of which only sysfs is there.
type watchedDisk struct {
	*Daemon
	dev *device
	w   watched
	sys string
}

func newWatchedDisk(t *testing.T) *watchedDisk {
	d, dev, _ := measured(t)
	clear(d.snapshots)
	base := t.TempDir()
	x := &watchedDisk{Daemon: d, dev: dev, sys: filepath.Join(base, "sys")}
	d.host = &disk.Host{Root: base, Sys: x.sys, Proc: filepath.Join(base, "proc")}
	d.events, d.opLock = newEventLog(), make(chan struct{}, 1)
	d.opts.Dir, d.opts.Config = RunDir(base), DefaultConfig()
	d.activity.Store(new(string))
	dev.disk = &disk.Disk{Num: disk.Num{Major: 8}, Sequence: 7}
	dev.geo.Size = dev.Size
	x.put(t, dev.disk.Num, "sda", dev.Size)
	return x
}

// put gives a disk of the machine a size.
func (x *watchedDisk) put(t *testing.T, n disk.Num, name string, size int64) {
	t.Helper()
	dir, link := filepath.Join(x.sys, "devices", name), filepath.Join(x.sys, "dev/block", n.String())
	for _, d := range []string{dir, filepath.Dir(link)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{"size": fmt.Sprint(size / 512), "diskseq": "7"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(dir, link); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
}

// watch looks at the disk once, and says whether the daemon had something to do.
func (x *watchedDisk) watch(ctx context.Context) bool {
	before := x.activity.Load()
	x.watchDisk(ctx, x.dev, &x.w)
	return x.activity.Load() != before
}

// TestGrowInVain: a filter that could not grow is not tried again at once, because its writes
// wait meanwhile.
func TestGrowInVain(t *testing.T) {
	x := newWatchedDisk(t)
	x.canGrow = true
	ctx := context.Background()
	for size := int64(2 << 30); size <= 3<<30; size += 1 << 30 {
		x.put(t, x.dev.disk.Num, "sda", size)
		// It has no record, so that it cannot grow.
		if !x.watch(ctx) || !strings.Contains(x.describe(x.dev).Attention, fmt.Sprintf("grown to %d bytes, and the filter has not yet", size)) {
			t.Fatalf("%d bytes: %+v", size, x.describe(x.dev))
		}
		if x.watch(ctx) {
			t.Errorf("%d bytes: tried again at once", size)
		}
	}
	x.w.growAgain = time.Now()
	if !x.watch(ctx) {
		t.Error("not tried again")
	}
	x.put(t, x.dev.disk.Num, "sda", x.dev.Size)
	if !x.watch(ctx) || x.describe(x.dev).Attention != "" || x.watch(ctx) {
		t.Errorf("the disk has its size again: %+v", x.describe(x.dev))
	}
}

// asked is a context that calls do once, when somebody begins to wait for its end.
type asked struct {
	context.Context
	once sync.Once
	do   func()
}

func (a *asked) Done() <-chan struct{} {
	a.once.Do(a.do)
	return nil
}

// TestTurnComesLate: what the daemon has seen of a disk may have changed before its turn comes.
// It goes by what is then.
func TestTurnComesLate(t *testing.T) {
	t.Run("other size", func(t *testing.T) {
		x := newWatchedDisk(t)
		x.put(t, x.dev.disk.Num, "sda", 3<<30)
		x.watch(&asked{Context: context.Background(), do: func() { x.put(t, x.dev.disk.Num, "sda", 2<<30) }})
		if got := x.describe(x.dev); got.OriginalSize != 2<<30 {
			t.Errorf("%+v", got)
		}
	})
	// gone has the disk of a filter be gone, and late happen before the daemon's turn comes.
	gone := func(t *testing.T, late func(x *watchedDisk)) {
		t.Helper()
		x := newWatchedDisk(t)
		x.dev.ublk.Num = disk.Num{Major: 259}
		x.put(t, x.dev.ublk.Num, "ublkb0", x.dev.Size)
		x.put(t, x.dev.disk.Num, "sda", 0)
		for range lookMissed - 1 {
			x.watch(context.Background())
		}
		turned := x.watch(&asked{Context: context.Background(), do: func() { late(x) }})
		if !strings.Contains(x.describe(x.dev).Attention, "its disk is gone") {
			t.Errorf("%+v", x.describe(x.dev))
		}
		if !turned || !x.w.again.IsZero() || x.dev.removing || x.deviceNamed(x.dev.Name) != x.dev {
			t.Errorf("it had a turn: %v; again at %v; being removed: %v", turned, x.w.again, x.dev.removing)
		}
		x.put(t, x.dev.disk.Num, "sda", x.dev.Size)
		x.watch(context.Background())
		if got := x.describe(x.dev); got.Attention != "" || x.watch(context.Background()) {
			t.Errorf("after the disk is back: %+v", got)
		}
	}
	t.Run("back", func(t *testing.T) {
		gone(t, func(x *watchedDisk) { x.put(t, x.dev.disk.Num, "sda", x.dev.Size) })
	})
	t.Run("used", func(t *testing.T) {
		gone(t, func(x *watchedDisk) {
			if err := os.MkdirAll(filepath.Join(x.sys, "devices/ublkb0/holders/dm-0"), 0o755); err != nil {
				t.Fatal(err)
			}
		})
	})
}
