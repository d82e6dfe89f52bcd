package cbt

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// plugged is a loop device that can be pulled out and plugged in again: to the
// kernel it is then as new as after another boot, and its counters say nothing.
type plugged struct {
	t    *testing.T
	file string
	disk string
}

func plug(t *testing.T, size int64) *plugged {
	t.Helper()
	guest.Need(t)
	guest.Run(t, "modprobe", "loop")
	p := &plugged{t: t, file: guest.SparseFile(t, "/dev/shm", size)}
	p.in()
	t.Cleanup(p.out)
	return p
}

func (p *plugged) in() {
	p.t.Helper()
	p.disk = strings.TrimSpace(guest.Run(p.t, "losetup", "-f", "--show", p.file))
}

func (p *plugged) out() {
	p.t.Helper()
	guest.Run(p.t, "losetup", "-d", p.disk)
	guest.WaitFor(p.t, "the last user of "+p.disk, func() bool {
		_, err := os.Stat("/sys/block/" + filepath.Base(p.disk) + "/loop")
		return err != nil
	})
}

func (p *plugged) again() { p.t.Helper(); p.out(); p.in() }

func named(name string) func(*control.AddRequest) {
	return func(r *control.AddRequest) { r.Name = name }
}

// wants fails the test unless the history has the reason, and its text says so;
// an empty reason is for one that goes on.
func wants(t *testing.T, what string, dev control.Device, reason, text string) {
	t.Helper()
	if h := dev.History; h.Reason != reason || h.Continued != (reason == "") || !strings.Contains(h.Text, text) {
		t.Errorf("%s: %+v, want reason %q and text %q", what, h, reason, text)
	}
}

func writeBlock(t *testing.T, path string, offset int64) {
	t.Helper()
	f := direct.MustOpen(t, path, unix.O_RDWR)
	defer f.Close()
	p := direct.Pages(t, 4096)
	p[0] = byte(offset >> 16)
	if err := f.WriteAt(p, offset); err != nil {
		t.Fatal(err)
	}
}

// TestHistoryGoesOn: changes before the end of a daemon, and after the start of
// another one that shares nothing with it but the state directory, are one increment.
func TestHistoryGoesOn(t *testing.T) {
	guest.NeedEither(t)
	p := plug(t, 40<<20)
	state := "state_dir=" + filepath.Join(t.TempDir(), "state")
	d := program.Start(t, state)
	dev := d.Add(p.disk, named("data"))
	wants(t, "the first time", dev, control.HistoryNone, "nothing was kept")
	i := d.CBT(dev)
	writeBlock(t, dev.Path, 1*i.BlockSize)
	since := *d.Take(0, dev).Images[0].Take
	writeBlock(t, dev.Path, 5*i.BlockSize)
	want := []int64{5}
	check := func(what string) {
		t.Helper()
		s := d.Take(0, dev)
		got, err := d.Changed(dev, since)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: changed blocks %v, want %v: %v", what, got, want, err)
		}
		if err := d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID}); err != nil {
			t.Fatal(err)
		}
	}
	next := func(what string, block int64) {
		t.Helper()
		wants(t, what, dev, "", "goes on")
		if h := d.CBT(dev).History; !h.Continued {
			t.Errorf("%s: cbt info says %+v", what, h)
		}
		writeBlock(t, dev.Path, block*i.BlockSize)
		want = append(want, block)
		check(what)
	}
	destroyAll(t, d)
	d.StopAndWait()

	d = program.Start(t, state)
	dev = d.Add(p.disk, named("data"))
	next("another daemon", 7)
	d.StopAndWait()

	p.again()
	d = program.Start(t, state)
	dev = d.Add(p.disk, named("data"))
	next("plugged in again", 9)

	d.Remove(dev)
	dev = d.Add(p.disk, named("other"))
	next("removed, and added under another name", 11)

	// Used once, and no clean end after that.
	if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		t.Fatal(err)
	}
	dev = d.Add(p.disk, named("data"))
	wants(t, "after a removal by force", dev, control.HistoryUnclean, "did not end cleanly")
	if _, err := d.Changed(dev, since); control.CodeOf(err) != control.GenerationEnded {
		t.Errorf("after a removal by force: %v", err)
	}
	told := "data: change tracking began anew: " + dev.History.Text + ": that costs a full backup"
	if a := d.Call("ublk-blksnap", "list"); !strings.Contains(a.Err, told+"\n") {
		t.Errorf("list: %+v, want %q", a, told)
	}
	for _, args := range [][]string{{"status"}, {"status", "data"}} {
		if a := d.Call("ublk-blksnap", args...); !strings.Contains(a.Out, strings.TrimPrefix(told, "data: ")) {
			t.Errorf("%v: %+v, want %q", args, a, told)
		}
	}
}

func destroyAll(t *testing.T, d *program.Daemon) {
	t.Helper()
	all, err := d.Snapshots(guest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if err := d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWrittenBehindOurBack: a filesystem that was mounted past the filter, and
// every place of the fingerprint with one byte changed.
func TestWrittenBehindOurBack(t *testing.T) {
	turn := shortTurn(t)
	for _, fs := range []guest.Filesystem{guest.Ext4, guest.XFS, guest.Btrfs} {
		t.Run(fs.Name, func(t *testing.T) {
			guest.NeedEither(t)
			p := plug(t, fs.Minimum)
			d := program.Start(t)
			add := func() control.Device { t.Helper(); return d.Add(p.disk, named("data")) }
			dev := add()
			fs.Make(t, dev.Path)
			dir := guest.Mount(t, dev.Path)
			if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			guest.Unmount(t, dir)
			d.Remove(dev)
			p.again()
			dev = add()
			wants(t, "untouched", dev, "", "")
			d.Remove(dev)

			events := make(chan control.Event, 10)
			watching, stop := context.WithCancel(context.Background())
			defer stop()
			go d.Watch(watching, control.WatchRequest{}, func(e control.Event) error { events <- e; return nil })

			p.again()
			dir = guest.Mount(t, p.disk)
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("changed"), 0o600); err != nil {
				t.Fatal(err)
			}
			guest.Unmount(t, dir)
			p.again()
			dev = add()
			wants(t, "a file changed", dev, control.HistoryWritten, fs.Name[:3])
			d.Remove(dev)
			if e := guest.Await(t, "the event", events); e.Kind != control.EventNewGeneration || e.Device != dev.OriginalNumber || e.Text != dev.History.Text {
				t.Errorf("event %+v", e)
			}
			stop()

			// The counters know of every write in the same boot.
			writeBlock(t, p.disk, fs.Minimum/2+1234*4096)
			dev = add()
			wants(t, "a block in the middle", dev, control.HistoryWritten, "the kernel has counted 1 writes")
			d.Remove(dev)

			for n, place := range places(t, p) {
				if n%4 != turn && (fs.Name != guest.Ext4.Name || !guest.Long()) {
					continue // package fingerprint tries each
				}
				p.out()
				flip(t, p.file, place.Offset+place.Length-1)
				p.in()
				dev = add()
				wants(t, place.Name, dev, control.HistoryWritten, "the disk was written to: its ")
				d.Remove(dev)
			}
			p.again()
			wants(t, "untouched at last", add(), "", "")
		})
	}
}

// TestVolumesBehindOurBack: a volume was made past the filter, in a boot of which the kernel's
// counters say nothing.
func TestVolumesBehindOurBack(t *testing.T) {
	guest.NeedEither(t)
	p := plug(t, 64<<20)
	d := program.Start(t)
	dev := d.Add(p.disk, named("data"))
	lvm := func(disk, command string, args ...string) {
		t.Helper()
		guest.Run(t, command, append([]string{"--devices", disk, "--yes", "-qq"}, args...)...)
	}
	lvm(dev.Path, "pvcreate", dev.Path)
	lvm(dev.Path, "vgcreate", "behind", dev.Path)
	lvm(dev.Path, "lvcreate", "--name", "one", "--size", "16M", "behind")
	guest.Ext4.Make(t, "/dev/behind/one")
	lvm(dev.Path, "vgchange", "--activate", "n", "behind")
	d.Remove(dev)
	p.again()
	dev = d.Add(p.disk, named("data"))
	wants(t, "untouched", dev, "", "")
	d.Remove(dev)

	p.again()
	lvm(p.disk, "lvcreate", "--activate", "n", "--zero", "n", "--wipesignatures", "n", "--name", "two", "--size", "8M", "behind")
	p.again()
	dev = d.Add(p.disk, named("data"))
	wants(t, "a second volume", dev, control.HistoryWritten, "LVM")
	d.Remove(dev)
}

// TestClaimedWhileDead: somebody has the disk when the next daemon comes, which dies too,
// and writes and lets go before a third one comes. It says so, and so does a fourth.
func TestClaimedWhileDead(t *testing.T) {
	p := plug(t, 40<<20)
	d := program.Start(t)
	dev := d.Add(p.disk, named("data"))
	s := d.Take(0, dev)
	since := *s.Images[0].Take
	d.Kill()
	var other *os.File
	guest.WaitFor(t, "the dead daemon to let go of the disk", func() (ok bool) {
		var err error
		other, err = os.OpenFile(p.disk, os.O_RDWR|unix.O_EXCL, 0)
		return err == nil
	})
	d.Restart()
	d.Refused([]string{"waits to be taken over", "opened exclusively by"}, "remove", dev.Name)
	d.Kill()
	_, err := other.WriteAt([]byte("behind our back"), 32<<20)
	if err = errors.Join(err, other.Sync(), other.Close()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		d.Restart()
		all, err := d.Devices(guest.Context(t))
		if err != nil || len(all) != 1 {
			t.Fatalf("%v, %v", all, err)
		}
		wants(t, "after another had it", all[0], control.HistoryWritten, "somebody else had the disk")
		if _, _, err := d.Changes(dev, since); control.CodeOf(err) != control.GenerationEnded {
			t.Errorf("I3: changes since before: %v", err)
		}
		if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil && len(i.Lost.Devices) > 0 {
			t.Errorf("the daemon says %+v, %v", i.Lost, err)
		}
		d.Kill()
	}
	d.Restart()
	d.Remove(dev)
}

// shortTurn is 0 or 1: two kernels share what the short form of a test goes through.
func shortTurn(t *testing.T) int {
	if guest.KernelAtLeast(t, 7, 0) {
		return 1
	}
	return 0
}

func places(t *testing.T, p *plugged) []fingerprint.Place {
	t.Helper()
	f, err := os.Open(p.file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	all, err := fingerprint.Read(context.Background(), f, st.Size(), 512)
	if err != nil || len(all) < 4 {
		t.Fatalf("%d places: %v", len(all), err)
	}
	return all
}

func flip(t *testing.T, file string, at int64) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	f.ReadAt(b, at)
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// TestHistoryOfAnotherDisk: a clone is another disk, although it holds the same.
func TestHistoryOfAnotherDisk(t *testing.T) {
	guest.NeedEither(t)
	p := plug(t, 16<<20)
	d := program.Start(t)
	d.Remove(d.Add(p.disk, named("data")))
	clone := plug(t, 16<<20)
	guest.Run(t, "dd", "if="+p.file, "of="+clone.file, "bs=1M", "conv=notrunc,sparse", "status=none")
	clone.again()
	dev := d.Add(clone.disk, named("data"))
	wants(t, "a clone", dev, control.HistoryOtherDisk, "another disk: loop="+p.file)
	d.Remove(dev)
	// Neither has taken the other's.
	dev = d.Add(p.disk, named("data"))
	wants(t, "the disk itself", dev, "", "")
	d.Remove(dev)
	// A disk that has grown is another one as well.
	p.out()
	if err := os.Truncate(p.file, 20<<20); err != nil {
		t.Fatal(err)
	}
	p.in()
	wants(t, "grown", d.Add(p.disk, named("data")), control.HistoryOtherSize, "16777216 bytes, and has 20971520")
}

// TestHistoryOfAPartition: what is written to its neighbour does not count, what is
// written to it by the disk's name does.
func TestHistoryOfAPartition(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.SCSIDisk(t, 64, 512)
	cmd := exec.Command("sfdisk", "-q", disk)
	cmd.Stdin = strings.NewReader("label: gpt\nstart=2048 size=40960\nstart=43008 size=40960\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	guest.WaitFor(t, "the partitions", func() bool { _, err := os.Stat(disk + "2"); return err == nil })
	d := program.Start(t)
	add := func() control.Device { t.Helper(); return d.Add(disk+"1", named("data")) }
	d.Remove(add())
	dev := add()
	wants(t, "untouched", dev, "", "")
	d.Remove(dev)
	writeBlock(t, disk+"2", 8<<20)
	dev = add()
	wants(t, "the neighbour written", dev, "", "")
	d.Remove(dev)
	writeBlock(t, disk, 1<<20+8<<20)
	dev = add()
	wants(t, "written by the disk's name", dev, control.HistoryWritten, "the disk of the partition was written to")
	d.Remove(dev)
	writeBlock(t, disk+"1", 8<<20)
	wants(t, "written", add(), control.HistoryWritten, "the kernel has counted 1 writes")
}

// TestStateDirectory: where the state may not lie, and what is said of that.
func TestStateDirectory(t *testing.T) {
	guest.NeedEither(t)
	p := plug(t, 16<<20)
	on := plug(t, guest.Ext4.Minimum)
	dir := t.TempDir()
	d := program.Start(t, "state_dir="+filepath.Join(dir, "mnt", "state"))
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	below := d.Add(on.disk, named("below"))
	guest.Ext4.Make(t, below.Path)
	guest.Run(t, "mount", below.Path, filepath.Join(dir, "mnt"))
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH) })
	d.Remove(d.Add(p.disk, named("data"))) // nothing is kept
	if names, _ := filepath.Glob(filepath.Join(dir, "mnt/state/*")); len(names) > 0 {
		t.Errorf("kept on a disk with a filter: %v", names)
	}
	if err := os.MkdirAll(filepath.Join(dir, "mnt/state"), 0o700); err != nil {
		t.Fatal(err)
	}
	dev := d.Add(p.disk, named("data"))
	wants(t, "on a disk with a filter", dev, control.HistoryUnavailable, "lies on "+on.disk+", which has a filter")
	d.Remove(dev)
	if log, _ := os.ReadFile(d.Log); strings.Count(string(log), "the change map is not kept") != 2 {
		t.Errorf("the log does not say twice that the map was not kept:\n%s", log)
	}
	// The daemon looks there every two seconds, because of what the disk below would have there.
	guest.WaitFor(t, "the unmount", func() bool { return unix.Unmount(filepath.Join(dir, "mnt"), 0) == nil })
	d.Remove(below)

	state := filepath.Join(dir, "state")
	d = program.Start(t, "state_dir="+state)
	d.Remove(d.Add(p.disk, named("data")))
	if err := os.Chmod(state, 0o777); err != nil {
		t.Fatal(err)
	}
	dev = d.Add(p.disk, named("data"))
	wants(t, "a directory for all", dev, control.HistoryUntrusted, "can be written to by others")
	d.Remove(dev)
	if err := os.Chmod(state, 0o700); err != nil {
		t.Fatal(err)
	}
	// What was kept there before is out of date, and used up as soon as it can be.
	guest.WaitFor(t, "the end of what was kept", func() bool {
		names, _ := filepath.Glob(state + "/*.json")
		return len(names) == 0
	})
	wants(t, "closed to others again", d.Add(p.disk, named("data")), control.HistoryUnclean, "")
}

// TestOutdatedOutlivesDeath: what was kept of a disk, and is out of date since it has
// a filter, is used up, though the daemon that was to do that has died.
func TestOutdatedOutlivesDeath(t *testing.T) {
	guest.NeedEither(t)
	p := plug(t, 16<<20)
	d := program.Start(t, "intent_log=false")
	d.Remove(d.Add(p.disk, named("data")))
	if err := os.Chmod(d.StateDir, 0o777); err != nil {
		t.Fatal(err)
	}
	dev := d.Add(p.disk, named("data"))
	wants(t, "a directory for all", dev, control.HistoryUntrusted, "can be written to by others")
	d.Kill()
	d.Restart()
	if err := os.Chmod(d.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the end of what was kept", func() bool {
		names, err := filepath.Glob(d.StateDir + "/*.json")
		return err == nil && len(names) == 0
	})
	d.Remove(dev)
}
