package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestKilled: without recovery SIGKILL ends the I/O of its devices with errors.
// Nothing hangs, and the next daemon begins from a clean machine.
func TestKilled(t *testing.T) {
	guest.Need(t)
	disks := guest.RAMDisks(t, 2, 64<<20)
	d := program.Start(t)
	dev, other := d.Add(disks[0]), d.Add(disks[1])
	s := d.Take(0, other)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link, "errors=continue")
	writer := func(path string) chan error {
		end := make(chan error, 1)
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_SYNC|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			defer f.Close()
			for {
				if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
					end <- err
					return
				}
			}
		}()
		return end
	}
	writers := []chan error{writer(filepath.Join(dir, "file")), writer(other.Path), writer(s.Images[0].Path)}
	time.Sleep(300 * time.Millisecond)
	if err := unix.Kill(d.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for i, w := range writers {
		t.Logf("writer %d: %v", i, guest.Await(t, "the end of a writer", w))
	}
	if !d.Ended(guest.Patience) {
		t.Fatal("the process does not end")
	}
	if _, err := guest.Try("umount", dir); err != nil {
		t.Errorf("the dead filesystem cannot be unmounted: %v", err)
	}

	// Who looks is told, and no daemon is started.
	for _, args := range [][]string{{"list"}, {"status", dev.Name}, {"remove", dev.Name}, {"snapshot", "list"}, {"cbt", "info", dev.Name}, {"snapshot", "take", s.ID}} {
		a := d.Call("ublk-blksnap", args...)
		for _, w := range []string{"no daemon runs", fmt.Sprintf("process %d", d.PID), "start it with",
			"filter " + dev.Name + " over " + disks[0] + " (" + dev.Path + ")", "filter " + other.Name + " over " + disks[1],
			"snapshot " + s.ID + " of " + other.Name + " with differences in /dev/shm"} {
			if a.Status != 4 || a.Out != "" || !strings.Contains(a.Err, w) {
				t.Errorf("%v without a daemon: %+v; want %q", args, a, w)
			}
		}
	}

	// As if it had died in a take: a filesystem stands still, and is on record.
	still := guest.LoopDisk(t, 64<<20, 512)
	guest.Ext4.Make(t, still)
	frozen := guest.Mount(t, still)
	guest.Run(t, "fsfreeze", "-f", frozen)
	if err := os.WriteFile(filepath.Join(d.RunDir.State(), "frozen"), []byte(frozen+"\x00"), 0o600); err != nil {
		t.Fatal(err)
	}

	// The next daemon on the same directory.
	next := exec.Command(program.Path(t), "daemon", "--run-dir", string(d.RunDir))
	next.Stdout, next.Stderr = os.Stdout, os.Stderr
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the next daemon", func() bool { _, err := d.Info(guest.Context(t)); return err == nil })
	if _, err := guest.Try("fsfreeze", "-u", frozen); err == nil {
		t.Error("a filesystem that the dead daemon froze still stands still")
	}
	if left := guest.UblkDevices(); len(left) > 0 {
		t.Errorf("devices of the dead daemon: %v", left)
	}
	for _, kind := range []string{"cbt", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(d.RunDir.State(), kind)); err != nil || len(left) > 0 {
			t.Errorf("state of the dead daemon: %v, %v", left, err)
		}
	}
	// It knows what is missing until it is there again.
	lost := fmt.Sprintf("ublk-blksnap: the daemon before (process %d) died, and with it the filter %s over", d.PID, dev.Name)
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.HasPrefix(a.Err, lost) {
		t.Errorf("list after a death: %+v", a)
	}
	if a := d.Call("ublk-blksnap", "status", other.Name); a.Status != 3 || !strings.Contains(a.Err, "which died: add it again: ublk-blksnap add "+disks[1]) {
		t.Errorf("status of what died: %+v", a)
	}
	if a := d.Call("ublk-blksnap", "snapshot", "info", s.ID); a.Status != 3 || !strings.Contains(a.Err, "which died") {
		t.Errorf("snapshot info of what died: %+v", a)
	}
	var back []control.Device
	for _, disk := range disks {
		again, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: disk})
		if err != nil {
			t.Error(err)
			continue
		}
		back = append(back, again)
	}
	if i, err := d.Info(guest.Context(t)); err != nil || i.Lost != nil {
		t.Errorf("all filters are there again, and missed: %+v, %v", i.Lost, err)
	}
	for _, again := range back {
		if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: again.Name}); err != nil {
			t.Error(err)
		}
	}
	if err := next.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := next.Wait(); err != nil {
		t.Error(err)
	}
	guest.Run(t, "e2fsck", "-p", disks[0])
}

// TestOrphan: a device with recovery outlives its daemon, its I/O waiting. The
// next daemon throws it away only when told to; then the I/O fails.
func TestOrphan(t *testing.T) {
	guest.Need(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	yes := true
	dev := d.Add(disk, func(r *control.AddRequest) { r.Recovery = &yes })
	if !dev.Recovery {
		t.Fatal("no recovery")
	}
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link, "errors=continue")
	if err := unix.Kill(d.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !d.Ended(guest.Patience) {
		t.Fatal("the process does not end")
	}
	written := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(dev.Path, os.O_RDWR|unix.O_DSYNC, 0)
		if err == nil {
			_, err = f.WriteAt(make([]byte, 4096), 32<<20)
			f.Close()
		}
		written <- err
	}()
	next := exec.Command(program.Path(t), "daemon", "--run-dir", string(d.RunDir))
	next.Stdout, next.Stderr = os.Stdout, os.Stderr
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the next daemon", func() bool { _, err := d.Info(guest.Context(t)); return err == nil })
	d.Refused([]string{"left by a daemon that died", "remove --force " + dev.Path}, "remove", dev.Path)
	d.Refused([]string{"left by a daemon that died", "remove --force " + dev.Name}, "remove", dev.Name)
	d.Refused([]string{"the name " + dev.Name + " is taken by " + dev.Path, "remove --force " + dev.Path}, "add", disk)
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.Contains(a.Err, "whose I/O waits, "+dev.Name) {
		t.Errorf("list while I/O waits: %+v", a)
	}
	select {
	case err := <-written:
		t.Fatalf("the write did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if a := d.Call("ublk-blksnap", "remove", "--force", dev.Name); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	if err := guest.Await(t, "the end of the write", written); err == nil {
		t.Error("a write succeeded without a daemon")
	}
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 || !strings.Contains(a.Err, "the filter "+dev.Name) || strings.Contains(a.Err, "waits") {
		t.Errorf("list when nothing waits any more: %+v", a)
	}
	if _, err := guest.Try("umount", dir); err != nil {
		t.Error(err)
	}
	guest.WaitFor(t, "the end of the device", func() bool { return len(guest.UblkDevices()) == 0 })
	again, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: disk})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: again.Name}); err != nil {
		t.Error(err)
	}
	if err := next.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := next.Wait(); err != nil {
		t.Error(err)
	}
}

// TestRemovedByForce: the users of a filter get errors, those of its images too,
// and the snapshot breaks aloud.
func TestRemovedByForce(t *testing.T) {
	guest.Need(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	s := d.Take(0, dev)
	image, err := os.OpenFile(s.Images[0].Path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	var kinds []string
	watched := make(chan error, 1)
	go func() {
		watched <- d.Watch(context.Background(), s.ID, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil })
	}()
	if a := d.Call("ublk-blksnap", "remove", "--force", dev.Name); a.Status != 0 || a.Err != "" {
		t.Fatalf("%+v", a)
	}
	if err := <-watched; err != nil && control.CodeOf(err) != control.NotFound {
		t.Error(err)
	} else if got := strings.Join(kinds, " "); err == nil && got != "created taken corrupted destroyed" {
		t.Errorf("events: %s", got)
	}
	if _, err := image.Read(alignedBuf(4096)); err == nil {
		t.Error("the image of a removed device can be read")
	}
	if ss, err := d.Snapshots(guest.Context(t)); err != nil || len(ss) != 0 {
		t.Errorf("snapshots left: %v, %v", ss, err)
	}
	image.Close()
	d.Remove(d.Add(disk))
}

func alignedBuf(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return b
}
