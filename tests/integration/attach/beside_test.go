package attach

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// An attachedVolume is one whose table other programs look at and change.
type attachedVolume struct {
	d    *program.Daemon
	path string
	dev  control.Device
}

// attachVolume attaches a volume under the name data.
func attachVolume(t testing.TB, d *program.Daemon, path string) *attachedVolume {
	t.Helper()
	dev, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: path, Name: "data", Attach: control.AttachAlways})
	if err != nil || !dev.Attached {
		t.Fatalf("%+v, %v", dev, err)
	}
	return &attachedVolume{d, path, dev}
}

// changedBy has another program give the volume another table. The snapshots of before end, it is
// attached anew with its size of then, and a new generation begins. more comes between.
func (v *attachedVolume) changedBy(t testing.TB, what string, size int64, change func(), more ...func()) {
	t.Helper()
	s := v.d.Take(0, v.dev)
	take := *s.Images[0].Take
	change()
	if now, err := v.d.Snapshot(guest.Context(t), s.ID); err == nil && now.State == control.SnapshotTaken {
		t.Errorf("%s: whoever asks is told that the images are good", what)
	}
	if _, e := v.d.Corrupted(s.ID); e.Device != v.dev.OriginalNumber || !strings.Contains(e.Text, "another program has given") {
		t.Errorf("%s: the event says %+v", what, e)
	}
	for _, f := range more {
		f()
	}
	guest.WaitFor(t, what+": another filter", func() bool {
		all, err := v.d.Devices(guest.Context(t))
		return err == nil && len(all) == 1 && all[0].Added != v.dev.Added && goesThroughFilter(t, v.path)
	})
	all, err := v.d.Devices(guest.Context(t))
	if err != nil || len(all) != 1 || all[0].Name != "data" || all[0].Size != size {
		t.Fatalf("%s: %+v, %v", what, all, err)
	}
	v.dev = all[0]
	_, err = v.d.CBTChanges(guest.Context(t), control.ChangesRequest{Device: v.path, Since: take}, func(control.Range) error { return nil })
	program.WantError(t, err, control.GenerationEnded)
}

// endsBy has another program make an end of the filter, with an event that says why.
func (v *attachedVolume) endsBy(t testing.TB, why string, change func()) {
	t.Helper()
	change()
	err := v.d.Watch(guest.Context(t), control.WatchRequest{Since: 1}, func(e control.Event) error {
		if e.Kind == control.EventRemoved && e.Device == v.dev.OriginalNumber && strings.Contains(e.Text, why) {
			return io.EOF
		}
		return nil
	})
	if !errors.Is(err, io.EOF) {
		t.Errorf("no event that says %q: %v", why, err)
	}
	guest.WaitFor(t, "the end of the filter", func() bool {
		all, err := v.d.Devices(guest.Context(t))
		return err == nil && len(all) == 0
	})
}

// held is a snapshot of a volume that nothing may happen to.
type held struct {
	v        *attachedVolume
	c        *dm.Control
	table    dm.Table
	snapshot control.Snapshot
	content  []byte
}

func (v *attachedVolume) hold(t testing.TB, c *dm.Control) *held {
	t.Helper()
	s := v.d.Take(0, v.dev)
	return &held{v, c, live(t, c, numOf(t, v.path)), s, readAll(t, s.Images[0].Path)}
}

// live is the table of a device.
func live(t testing.TB, c *dm.Control, n blockdev.Num) dm.Table {
	t.Helper()
	table, err := c.Live(dm.Device{Num: n})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// same calls a command that must end with a status and say something, and change nothing.
func (h *held) same(t testing.TB, status int, say, name string, args ...string) {
	t.Helper()
	if name != "cryptsetup" && name != "dmsetup" {
		args = append(args, quiet...)
	}
	out, err := guest.Try(name, args...)
	if got := guest.ExitStatus(t, err); got != status || !strings.Contains(out, say) {
		t.Errorf("%s %v: status %d and %q, want %d and %q", name, args, got, out, status, say)
	}
	h.still(t, name+" "+strings.Join(args, " "))
}

// still makes sure that all is as it was.
func (h *held) still(t testing.TB, after string) {
	t.Helper()
	all, err := h.v.d.Devices(guest.Context(t))
	if now := live(t, h.c, numOf(t, h.v.path)); !now.Is(h.table) || err != nil || len(all) != 1 || all[0].Added != h.v.dev.Added || all[0].Attention != h.v.dev.Attention {
		t.Errorf("after %s: %+v, %v; table %+v, before it was %+v", after, all, err, now, h.table)
	}
}

// end makes sure that the image and the increment to a second one are right.
func (h *held) end(t testing.TB) {
	t.Helper()
	if !bytes.Equal(readAll(t, h.snapshot.Images[0].Path), h.content) {
		t.Error("the image has changed")
	}
	guest.Ext4.Check(t, h.snapshot.Images[0].Path)
	second := h.v.d.Take(0, h.v.dev)
	now := readAll(t, second.Images[0].Path)
	_, ranges, err := h.v.d.Changes(h.v.dev, *h.snapshot.Images[0].Take)
	for _, r := range ranges {
		copy(h.content[r.Sector*512:(r.Sector+r.Count)*512], now[r.Sector*512:])
	}
	if err != nil || len(ranges) == 0 || !bytes.Equal(now, h.content) {
		t.Errorf("the increment of %d ranges misses changes, %v", len(ranges), err)
	}
	h.v.d.Destroy(second.ID)
	h.v.d.Destroy(h.snapshot.ID)
}

// TestAttachBesideLVM: what LVM and device-mapper do beside a volume that is attached, mounted and
// written to works as docs/lvm.md says, and harms nobody.
func TestAttachBesideLVM(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	disks := []string{guest.LoopDisk(t, 64<<20, 512), guest.LoopDisk(t, 64<<20, 512)}
	group(t, "vgb", disks...)
	lvm(t, "lvcreate", "-q", "-y", "-Wn", "-L", "24m", "-n", "data", "vgb", disks[0])
	path := "/dev/vgb/data"
	guest.Ext4.Make(t, path)
	dir := guest.Mount(t, path)
	sums := guest.SomeFiles(t, filepath.Join(dir, "files"), 1)
	var stop func()
	write := func() { stop = busy(t, filepath.Join(dir, "busy")) }
	write()
	v := attachVolume(t, d, path)

	h := v.hold(t, c)
	h.same(t, 0, "1 logical volume", "vgchange", "-ay", "vgb")
	h.same(t, 5, "Can't deactivate volume group", "vgchange", "-an", "vgb")
	h.same(t, 5, "NOT reduced", "lvreduce", "-L", "8m", "vgb/data")
	h.same(t, 1, "busy", "dmsetup", "remove", path)
	h.same(t, 0, "", "dmsetup", "suspend", path)
	_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{"data"}, Storage: []control.Storage{{Path: "/dev/shm"}}, Take: true})
	program.WantError(t, err, control.Busy, "freeze "+dir)
	h.still(t, "dmsetup suspend")
	h.same(t, 0, "", "dmsetup", "resume", path)
	if guest.Long() {
		h.same(t, 5, "filesystem in use", "lvchange", "-an", "vgb/data")
		h.same(t, 0, "ACTIVE", "dmsetup", "info", path)
		h.same(t, 0, "linear", "dmsetup", "status", path)
		h.same(t, 0, "data", "lvs", "vgb")
	}
	h.end(t)

	// Moved to another disk, it waits for the end of that.
	v.changedBy(t, "pvmove", 24<<20, func() {
		lvm(t, "pvmove", "-q", "-b", "-i", "+3600", disks[0], disks[1]) // looks again in an hour
	}, func() {
		all, err := d.Devices(guest.Context(t))
		if err != nil || len(all) != 1 || !strings.Contains(all[0].Attention, "do not come to the filter") {
			t.Errorf("meanwhile: %+v, %v", all, err)
		}
		_, err = d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{"data"}, Storage: []control.Storage{{Path: "/dev/shm"}}, Take: true})
		program.WantError(t, err, control.GenerationEnded)
		lvm(t, "pvmove", "-q", "-i", "0", disks[0])
	})
	if guest.Long() {
		v.changedBy(t, "pvmove back", 24<<20, func() {
			lvm(t, "pvmove", "-q", "-b", "-i", "+3600", disks[1], disks[0])
		}, func() {
			d.Kill()
			d.Restart()
			guest.WaitFor(t, "the next daemon's word that the volume is passed by", func() bool {
				all, err := d.Devices(guest.Context(t))
				return err == nil && len(all) == 1 && strings.Contains(all[0].Attention, "do not come to the filter")
			})
			d.Remove(v.dev)
			d.Refused([]string{"LVM is moving its extents", "try again when that is done"}, "add", path)
			nothingLeft(t, c)
			lvm(t, "pvmove", "-q", "-i", "0", disks[1])
			attachVolume(t, d, path)
		})
		v.changedBy(t, "vgchange --refresh", 24<<20, func() { lvm(t, "vgchange", "--refresh", "vgb") })
		v.changedBy(t, "lvextend --resizefs", 32<<20, func() { lvm(t, "lvextend", "-q", "-r", "-L", "32m", "vgb/data") })
		stop()
		guest.Unmount(t, dir)
		guest.Run(t, "e2fsck", "-fp", path)
		guest.Run(t, "resize2fs", path, "18m")
		dir = guest.Mount(t, path)
		write()
		v.changedBy(t, "lvreduce", 20<<20, func() { guest.Run(t, "lvreduce", append([]string{"-q", "-f", "-L", "20m", "vgb/data"}, quiet...)...) })
		v.endsBy(t, "snapshot-origin", func() { lvm(t, "lvcreate", "-q", "-s", "-L", "8m", "-n", "snap", "vgb/data") })
		nothingLeft(t, c)
		lvm(t, "lvremove", "-q", "-f", "vgb/snap")
		v = attachVolume(t, d, path)
	}
	all, err := c.List()
	private := slices.IndexFunc(all, func(x dm.Device) bool { return x.Name == disk.PrivateName(numOf(t, path)) })
	if err != nil || private < 0 {
		t.Fatalf("no private device: %+v, %v", all, err)
	}
	below := live(t, c, all[private].Num)
	stop()
	guest.Unmount(t, dir)
	v.endsBy(t, "its volume is gone", func() { lvm(t, "vgchange", "-q", "-an", "vgb") })
	nothingLeft(t, c)
	lvm(t, "vgchange", "-q", "-ay", "vgb")
	if now := live(t, c, numOf(t, path)); !now.Is(below) {
		t.Errorf("the filter lay on %+v, and LVM gives the volume %+v", below, now)
	}
	guest.Ext4.Check(t, path)
	dir = guest.Mount(t, path)
	guest.SameFiles(t, filepath.Join(dir, "files"), sums)
	guest.Unmount(t, dir)
	lvm(t, "vgck", "vgb")
}

// TestAttachBesideCryptsetup: so does cryptsetup beside an encrypted volume.
func TestAttachBesideCryptsetup(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	lower, key, path := guest.LoopDisk(t, 40<<20, 512), keyFile(t), "/dev/mapper/safe"
	formatLUKS(t, lower, key)
	open := func() {
		guest.Run(t, "cryptsetup", "open", "--key-file", key, lower, "safe")
	}
	open()
	t.Cleanup(func() { guest.Try("cryptsetup", "close", "safe") })
	guest.Ext4.Make(t, path)
	dir := guest.Mount(t, path)
	sums := guest.SomeFiles(t, filepath.Join(dir, "files"), 1)
	stop := busy(t, filepath.Join(dir, "busy"))
	// LUKS2 puts the key where nobody can have it for a second table.
	d.Refused([]string{"keyring", "cryptsetup refresh --disable-keyring safe"}, "add", path)
	nothingLeft(t, c)
	guest.Run(t, "cryptsetup", "refresh", "--disable-keyring", "--key-file", key, "safe")
	own := live(t, c, numOf(t, path))
	v := attachVolume(t, d, path)
	h := v.hold(t, c)
	h.same(t, 0, "is active and is in use", "cryptsetup", "status", "safe")
	h.same(t, 1, "", "cryptsetup", "resize", "--key-file", key, "--size", "16384", "safe")
	h.same(t, 1, "not cryptsetup managed", "cryptsetup", "refresh", "--key-file", key, "safe")
	h.same(t, 5, "still in use", "cryptsetup", "close", "safe")
	h.same(t, 1, "Error during suspending", "cryptsetup", "luksSuspend", "safe")
	if guest.Long() {
		h.same(t, 1, "Active device safe is not LUKS2", "cryptsetup", "reencrypt", "-q", "--key-file", key, "--active-name", "safe")
	}
	h.end(t)
	d.Remove(v.dev)
	if now := live(t, c, numOf(t, path)); !now.Is(own) {
		t.Errorf("its table is %+v, and was %+v", now, own)
	}
	nothingLeft(t, c)
	if guest.Long() {
		v = attachVolume(t, d, path)
	}
	stop()
	guest.Unmount(t, dir)
	if guest.Long() {
		v.endsBy(t, "its volume is gone", func() { guest.Run(t, "cryptsetup", "close", "safe") })
		nothingLeft(t, c)
		open()
	}
	guest.Ext4.Check(t, path)
	dir = guest.Mount(t, path)
	guest.SameFiles(t, filepath.Join(dir, "files"), sums)
	guest.Unmount(t, dir)
}
