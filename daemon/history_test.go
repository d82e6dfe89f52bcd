package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
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

// TestKeptOfOneOfTwo: a disk gets a filter while another one looks the same, as a second
// path to it or a clone does. What was kept of the disk must not be believed when the other
// is gone again, because by then it is from before that filter.
func TestKeptOfOneOfTwo(t *testing.T) {
	dir := t.TempDir()
	d, bdev, id := ofOneDisk(t, dir)
	store, err := cbtstate.Open("/", d.opts.Config.StateDir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	kept := cbtstate.Record{ID: uuid.New(), Name: "data", Disk: cbtstate.Disk{Identity: id, Size: bdev.Size}}
	running := kept
	running.ID = uuid.New()
	if err := errors.Join(store.Save(kept, []byte("map"), func() bool { return true }), store.Run(running)); err != nil {
		t.Fatal(err)
	}

	sysfsDisk(t, d.host.Sys, "vdb", "4000:16")
	dev := &device{disk: bdev}
	found := d.findHistory(context.Background(), -1, dev, "data", 1000)
	if found.refusal == nil || found.refusal.Reason != cbtstate.Unknown {
		t.Fatalf("%+v", found)
	}
	d.useHistory(context.Background(), dev, "data", found)
	if _, _, err := store.Find(id, "data", 1000); err == nil {
		t.Error("the map that was kept would be believed")
	}
	if left, err := filepath.Glob(filepath.Join(d.opts.Config.StateDir, "*.running")); err != nil || len(left) > 0 {
		t.Errorf("the running record is there: %v, %v", left, err)
	}
}

// TestKeptUnderAnotherIdentity: a volume or an array may come to lie on other disks while it has
// a filter. Then its map is kept under another identity than its log, of which nothing is left
// that would be believed if it lies on the first disks again one day.
func TestKeptUnderAnotherIdentity(t *testing.T) {
	dir := t.TempDir()
	d, bdev, now := ofOneDisk(t, dir)
	then := disk.Identity{"serial=another"}
	store, err := cbtstate.Open("/", d.opts.Config.StateDir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := store.Run(cbtstate.Record{ID: uuid.New(), Name: "data", Disk: cbtstate.Disk{Identity: then, Size: bdev.Size}}); err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.Dup(int(file.Fd()))
	if err := errors.Join(err, file.Truncate(bdev.Size)); err != nil {
		t.Fatal(err)
	}
	dev := &device{disk: bdev, orig: blockdev.NewOSFile(fd, "disk"), geo: ublk.Geometry{Size: bdev.Size, LogicalBlock: 512}, intent: &intent{identity: then}}
	defer dev.orig.Close()
	if dev.cbt, err = cbtmap.NewMemory(bdev.Size, d.opts.Config.CBTParams()); err != nil {
		t.Fatal(err)
	}
	if err := d.tryKeepHistory(dev, func(cbtstate.Disk) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Find(now, "data", 1<<20); err != nil {
		t.Errorf("the map is not kept: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(d.opts.Config.StateDir, "*.running")); err != nil || len(left) > 0 {
		t.Errorf("what the log counted under is there: %v, %v", left, err)
	}
}

// TestMovedWhileDead: the log of a device that is taken over may begin under another identity, of
// a volume that lies on other disks by now, or in another state directory. Nothing is left that
// counts where the log of the dead daemon was, and what counts is on record: a removal by force
// after the next death takes it back.
func TestMovedWhileDead(t *testing.T) {
	for _, c := range []struct {
		name            string
		moved, otherDir bool
		noLog           bool // the next daemon has none
	}{
		{"to other disks", true, false, false},
		{"the state directory", false, true, false},
		{"both", true, true, false},
		{"without a log", true, false, true},
		{"neither", false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			d, bdev, now := ofOneDisk(t, dir)
			if err := os.MkdirAll(d.devicesDir(), 0o700); err != nil {
				t.Fatal(err)
			}
			then, dirThen := now, d.opts.Config.StateDir
			if c.moved {
				then = disk.Identity{"serial=another"}
			}
			if c.otherDir {
				dirThen = filepath.Join(dir, "before")
			}
			run := func(dir string, id disk.Identity) {
				t.Helper()
				store, err := cbtstate.Open("/", dir, true)
				if err != nil {
					t.Fatal(err)
				}
				defer store.Close()
				if err := store.Run(cbtstate.Record{ID: uuid.New(), Name: "data", Disk: cbtstate.Disk{Identity: id, Size: bdev.Size}}); err != nil {
					t.Fatal(err)
				}
			}
			count := func(when string, want int) {
				t.Helper()
				if left, err := filepath.Glob(filepath.Join(dir, "*/*.running")); err != nil || len(left) != want {
					t.Errorf("%s %d records count: %v, %v", when, len(left), left, err)
				}
			}
			run(dirThen, then)
			geo := ublk.Geometry{Size: bdev.Size, LogicalBlock: 512}
			r := deviceRecord{Name: "data", Tag: ublk.NewTag(filterKind), Original: originalRecord{Number: "8:0"}, Geometry: geo, Identity: then, StateDir: dirThen}
			if err := d.writeDeviceRecord(r); err != nil {
				t.Fatal(err)
			}
			dev := &device{disk: bdev, geo: geo}
			if !c.noLog {
				dev.intent = &intent{identity: now}
			}
			d.leaveKept(&survivor{record: r, dev: dev})
			if stays := !c.moved && !c.otherDir; stays {
				count("before the log begins anew", 1) // whose place it takes
			} else {
				count("before the log begins", 0)
			}
			if !c.noLog {
				run(d.opts.Config.StateDir, now)
				count("under the log", 1)
			}
			r, err := d.readDeviceRecord("data")
			if err != nil {
				t.Fatal(err)
			}
			if r.zone() < 0 {
				t.Error("the next daemon would begin no log")
			}
			d.forgetHistory(context.Background(), r)
			count("after a removal by force", 0)
		})
	}
}

// TestUncleanIsTold: that the last filter had no clean end is known by its running record, and is
// told with whatever reason that record is not believed, by the next daemon too.
func TestUncleanIsTold(t *testing.T) {
	dir := t.TempDir()
	d, bdev, id := ofOneDisk(t, dir)
	file, err := os.Create(filepath.Join(dir, "disk"))
	if err := errors.Join(err, file.Truncate(bdev.Size), os.MkdirAll(d.devicesDir(), 0o700)); err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	store, err := cbtstate.Open("/", d.opts.Config.StateDir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	dev := &device{disk: bdev, geo: ublk.Geometry{Size: bdev.Size, LogicalBlock: 512}}
	found := func(reason string, unclean bool) {
		t.Helper()
		told := d.findHistory(context.Background(), int(file.Fd()), dev, "data", 1<<20).told()
		if told.Reason != reason || told.AfterPowerFailure != unclean || told.Continued {
			t.Errorf("%+v, want the reason %s, unclean %v", told, reason, unclean)
		}
		r := deviceRecord{Name: "data", Tag: ublk.NewTag(filterKind), Original: originalRecord{Number: "8:0"}, Geometry: dev.geo, History: told}
		if err := d.writeDeviceRecord(r); err != nil {
			t.Fatal(err)
		}
		if r, err := d.readDeviceRecord("data"); err != nil || r.History != told {
			t.Errorf("the next daemon reads %+v, %v", r.History, err)
		}
	}
	found(cbtstate.NoState, false)
	r := cbtstate.Record{ID: uuid.New(), Name: "data", Disk: cbtstate.Disk{Identity: id, Size: bdev.Size, Boot: "another", Machine: d.host.MachineID()}}
	if err := store.Run(r); err != nil {
		t.Fatal(err)
	}
	found(cbtstate.Damaged, true) // it has no log
	log, err := store.NewLog(id, r.ID, 4096)
	if err := errors.Join(err, log.Close(), store.WriteBase(id, r.ID, make([]byte, 512))); err != nil {
		t.Fatal(err)
	}
	found(cbtstate.Unknown, true) // nobody counts what is written to this disk
	dev.geo.Size /= 2
	found(cbtstate.OtherSize, true)
	running, err := filepath.Glob(filepath.Join(d.opts.Config.StateDir, "*.running"))
	if err != nil || len(running) != 1 {
		t.Fatal(running, err)
	}
	if err := os.WriteFile(running[0], []byte("spoilt"), 0o600); err != nil {
		t.Fatal(err)
	}
	found(cbtstate.Damaged, true)
	if err := store.Stop(id); err != nil {
		t.Fatal(err)
	}
	found(cbtstate.Unclean, false) // as its reason says
}

// ofOneDisk is a daemon that has all it has in dir, on a machine with one disk.
func ofOneDisk(t *testing.T, dir string) (*Daemon, *disk.Disk, disk.Identity) {
	t.Helper()
	d := &Daemon{opts: Options{Dir: RunDir(filepath.Join(dir, "run")), Log: quiet(), Config: DefaultConfig()}, host: disk.Machine()}
	d.opts.Config.StateDir = filepath.Join(dir, "state")
	d.host.Sys = filepath.Join(dir, "sys")
	sysfsDisk(t, d.host.Sys, "vda", "4000:0") // no disk of this machine
	bdev, err := d.host.ByNumber(disk.Num{Major: 4000})
	if err != nil {
		t.Fatal(err)
	}
	id, err := d.host.Identify(bdev)
	if err != nil {
		t.Fatal(err)
	}
	return d, bdev, id
}

// sysfsDisk makes a disk in a sysfs of the test's own.
func sysfsDisk(t *testing.T, sys, name, number string) {
	t.Helper()
	own := filepath.Join(sys, "devices/virtio0", name)
	var errs []error
	for _, path := range []string{own, filepath.Join(sys, "dev/block"), filepath.Join(sys, "class/block")} {
		errs = append(errs, os.MkdirAll(path, 0o755))
	}
	for file, text := range map[string]string{"dev": number, "size": "2048", "serial": "disk-a"} {
		errs = append(errs, os.WriteFile(filepath.Join(own, file), []byte(text+"\n"), 0o600))
	}
	errs = append(errs, os.Symlink(own, filepath.Join(sys, "dev/block", number)), os.Symlink(own, filepath.Join(sys, "class/block", name)))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// TestSameIdentity: what is kept under an identity is taken back while the log of another
// filter counts under the same, as of a clone, or of the disk that was plugged in again. Then
// nobody may be told that this log would help.
func TestSameIdentity(t *testing.T) {
	dir := t.TempDir()
	d := &Daemon{opts: Options{Dir: RunDir(filepath.Join(dir, "run")), Log: quiet(), Config: Config{StateDir: filepath.Join(dir, "state"), DiskTimeout: 10 * time.Second}}, host: disk.Machine(), devices: map[string]*device{}}
	id := disk.Identity{"serial=disk-a"}
	with := func(name string, id disk.Identity, uncovered string) *device {
		dev := &device{disk: &disk.Disk{Name: name}, intent: &intent{d: d, identity: id, reason: uncovered, failed: make(chan error, 1)}}
		dev.Name = name
		d.devices[name] = dev
		return dev
	}
	twin, own := with("twin", id, ""), with("own", id, "")
	off, other := with("off", id, "it has not begun"), with("other", disk.Identity{"serial=disk-b"}, "")
	gaveUp := func(dev *device) bool {
		select {
		case <-dev.intent.failed:
			return true
		default:
			return false
		}
	}
	for what, back := range map[string]func() error{
		"found of a new filter's disk": func() error { return d.useState(own, id) },
		"of a filter that goes":        func() error { return d.stopState(own, id) },
		"owed":                         func() error { return d.useUp(d.here(id)) },
	} {
		if err := back(); err != nil {
			t.Fatal(err)
		}
		if !gaveUp(twin) {
			t.Errorf("%s: the log that counted under the same identity goes on", what)
		}
		if gaveUp(off) || gaveUp(other) || gaveUp(own) && what != "owed" {
			t.Errorf("%s: a log is given up that was not taken back", what)
		}
	}
	if err := d.useUp(outdated{id, filepath.Join(dir, "before")}); err != nil || gaveUp(twin) {
		t.Errorf("in another state directory: %v", err)
	}

	// It is not begun again while there are two.
	d.host.Sys, d.opLock = filepath.Join(dir, "sys"), make(chan struct{}, 1)
	sysfsDisk(t, d.host.Sys, "vda", "4000:0")
	sysfsDisk(t, d.host.Sys, "vdb", "4000:16")
	var err error
	if twin.disk, err = d.host.ByNumber(disk.Num{Major: 4000}); err != nil {
		t.Fatal(err)
	}
	twin.intent.dev, twin.intent.told = twin, true
	if err := twin.intent.beginAgain(context.Background()); !errors.Is(err, disk.ErrUnknown) || twin.intent.counts() {
		t.Errorf("begun again beside the other disk: %v", err)
	}
}
