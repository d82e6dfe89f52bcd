package attach

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestAttachMounted: a script of blksnap's runs unchanged on a mounted volume: attach,
// snapshot, image, increment, detach. Its users notice nothing, and LVM and cryptsetup find
// everything in order.
func TestAttachMounted(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	for _, x := range []struct {
		name  string
		kind  guest.Filesystem
		mib   int
		crypt bool
	}{{"ext4 over LVM", guest.Ext4, 24, false}, {"xfs over LUKS over LVM", guest.XFS, 64, true}} {
		t.Run(x.name, func(t *testing.T) {
			if !x.crypt && !guest.Long() {
				return // the other tests here have one like it
			}
			group(t, "vga", guest.LoopDisk(t, int64(x.mib+16)<<20, 512))
			lv := volume(t, "vga/data", x.mib)
			path := lv
			if x.crypt {
				path = encrypted(t, "safe", lv)
			}
			x.kind.Make(t, path)
			before := tableOf(t, path)
			dir := guest.Mount(t, path)
			stop := busy(t, filepath.Join(dir, "busy"))

			if a := d.Call("ublk-blksnap", "add", path, "--dry-run"); a.Status != 0 || !strings.Contains(a.Out, "whose users keep their path") || tableOf(t, path) != before {
				t.Errorf("a dry run: %+v; table %s", a, tableOf(t, path))
			}
			if out := blksnap(t, d, "attach", "-d", path); out != "Attached successfully\n" {
				t.Errorf("attach says %q", out)
			}
			if out := blksnap(t, d, "attach", "-d", path); out != "Already was attached\n" {
				t.Errorf("a second attach says %q", out)
			}
			all, err := d.Devices(guest.Context(t))
			if err != nil || len(all) != 1 || !all[0].Attached || all[0].Link != all[0].Original || all[0].OriginalNumber != numOf(t, path).String() || !goesThroughFilter(t, path) {
				t.Fatalf("attached: %+v, %v; table %s", all, err, tableOf(t, path))
			}
			d.Refused([]string{"already added"}, "add", path)
			if out := lvm(t, "lvs", "--noheadings", "-o", "lv_name,lv_active,lv_device_open", "vga"); !strings.Contains(strings.Join(strings.Fields(out), " "), "data active open") {
				t.Errorf("lvs says %q", out)
			}
			lvm(t, "vgs")
			lvm(t, "pvs")
			lvm(t, "vgck", "vga")

			taken := func() (id string, image string, take control.Take) {
				t.Helper()
				id = strings.TrimSpace(blksnap(t, d, "snapshot_create", "-d", path, "-f", "/dev/shm"))
				blksnap(t, d, "snapshot_take", "-i", id)
				image = strings.TrimSpace(blksnap(t, d, "snapshot_info", "-d", path, "-f", "image"))
				return id, image, *d.Show(id).Images[0].Take
			}
			old := bytes.Repeat([]byte("as it was at the first take\n"), 4096)
			file := filepath.Join(dir, "file")
			if err := os.WriteFile(file, old, 0o600); err != nil {
				t.Fatal(err)
			}
			first, image1, take1 := taken()
			if err := os.WriteFile(file, bytes.Repeat([]byte("as it is later\n"), 8192), 0o600); err != nil {
				t.Fatal(err)
			}
			shown := guest.Mount(t, image1, append([]string{"ro"}, x.kind.Beside...)...)
			if got := readAll(t, filepath.Join(shown, "file")); !bytes.Equal(got, old) {
				t.Error("the image does not show the file as it was")
			}
			guest.Unmount(t, shown)
			x.kind.Check(t, image1)
			content1 := readAll(t, image1)
			blksnap(t, d, "snapshot_destroy", "-i", first)
			second, image2, _ := taken()
			content2 := readAll(t, image2)
			if _, err := d.CBTChanges(guest.Context(t), control.ChangesRequest{Device: path, Since: take1}, func(r control.Range) error {
				from, to := r.Sector*512, (r.Sector+r.Count)*512
				copy(content1[from:to], content2[from:to])
				return nil
			}); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(content1, content2) {
				t.Error("the increment misses changes")
			}
			if a := d.Call("blksnap", "detach", "-d", path); a.Status != 1 || !strings.Contains(a.Err, "held by snapshot") {
				t.Errorf("detach of what a snapshot holds: %+v", a)
			}
			blksnap(t, d, "snapshot_destroy", "-i", second)

			d.Kill()
			d.Restart()
			if all, err := d.Devices(guest.Context(t)); err != nil || len(all) != 1 || !all[0].Attached || all[0].Original != "/dev/mapper/"+dmName(t, path) {
				t.Errorf("after a death: %+v, %v", all, err)
			}
			blksnap(t, d, "detach", "-d", path)
			if after := tableOf(t, path); after != before {
				t.Errorf("table %q, and before it was %q", after, before)
			}
			nothingLeft(t, c)
			lvm(t, "vgck", "vga")
			stop()
			guest.Unmount(t, dir)
			x.kind.Check(t, path)
		})
	}
}

// TestAttachChanged: when another program gives an attached volume another table, no change
// is missed in silence: the generation ends, the snapshots break, and the volume is attached
// anew. When it is removed, its filter goes.
func TestAttachChanged(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	disk := guest.LoopDisk(t, 128<<20, 512)
	lv := ""
	table := func(mib int) string { return fmt.Sprintf("0 %d linear %s 2048", mib<<11, disk) }
	if guest.Long() {
		group(t, "vgc", disk)
		lv = volume(t, "vgc/data", 64)
	} else {
		guest.Run(t, "modprobe", "dm-mod")
		guest.Run(t, "dmsetup", "create", "vgc-data", "--table", table(24))
		t.Cleanup(func() { guest.Try("dmsetup", "remove", "vgc-data") })
		lv = "/dev/mapper/vgc-data"
	}
	guest.Ext4.Make(t, lv)
	dir := guest.Mount(t, lv)
	stop := busy(t, filepath.Join(dir, "busy"))
	v := attachVolume(t, d, lv)
	// tell says what doctor and the metrics tell of the volume.
	tell := func(doctor string, bypassed, anew int) {
		t.Helper()
		if a := d.Call("ublk-blksnap", "doctor"); a.Status != 0 || !strings.Contains(a.Out, doctor) {
			t.Errorf("doctor: %+v, want %q", a, doctor)
		}
		metrics := guest.Run(t, "curl", "-sS", "--unix-socket", d.RunDir.Socket(), "http://localhost/metrics")
		for _, want := range []string{
			`filter_attached{device="data"} 1`, fmt.Sprintf(`filter_bypassed{device="data"} %d`, bypassed), fmt.Sprintf("attached_anew_total %d", anew),
		} {
			if !strings.Contains(metrics, "\nublk_blksnap_"+want+"\n") {
				t.Errorf("the metrics do not say %s: %s", want, metrics)
			}
		}
	}
	if guest.Long() {
		v.changedBy(t, "lvextend", 80<<20, func() { lvm(t, "lvextend", "-q", "-L", "80m", "vgc/data") })
		v.changedBy(t, "lvrename", 80<<20, func() {
			lvm(t, "lvrename", "-q", "vgc", "data", "datum")
			lv = "/dev/vgc/datum"
			v.path = lv
		})
		v.changedBy(t, "lvchange", 80<<20, func() { lvm(t, "lvchange", "--refresh", "vgc/datum") })
	} else {
		v.changedBy(t, "dmsetup", 32<<20, func() {
			guest.Run(t, "dmsetup", "load", lv, "--table", table(32))
			guest.Run(t, "dmsetup", "resume", lv)
		})
		// LVM gives a volume one table after another in some commands.
		volume, to := dm.Device{Num: numOf(t, lv)}, numOf(t, disk)
		load := func(mib int64) {
			t.Helper()
			if err := c.Load(volume, dm.Table{{Length: uint64(mib << 11), Type: "linear", Args: fmt.Appendf(nil, "%s 2048", to)}}); err != nil {
				t.Fatal(err)
			}
		}
		swap := func() {
			t.Helper()
			if err := c.Swap(guest.Context(t), volume); err != nil {
				t.Error(err)
			}
		}
		v.changedBy(t, "one table after another", 40<<20, func() { load(36); swap(); load(40) }, func() {
			if waits, err := c.Inactive(volume); err != nil || waits.Size() != 40<<20 {
				t.Errorf("the table that waited is %+v, %v", waits, err)
			}
			if all, err := d.Devices(guest.Context(t)); err != nil || len(all) != 1 || all[0].Added != v.dev.Added || !strings.Contains(all[0].Attention, "do not come to the filter") {
				t.Errorf("meanwhile: %+v, %v", all, err)
			}
			tell("vgc-data: its requests come to no filter", 1, 1)
			swap()
		})
		tell("vgc-data: its requests come to the filter "+v.dev.Path+"\n", 0, 2)
		// What waits stays, whatever is asked of the daemon.
		load(44)
		for _, force := range []bool{false, true} {
			err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: "data", Force: force})
			program.WantError(t, err, control.Busy, "another program is changing")
		}
		if waits, err := c.Inactive(volume); err != nil || waits.Size() != 44<<20 || !goesThroughFilter(t, lv) {
			t.Errorf("the table that waited is %+v, %v", waits, err)
		}
		if err := c.Clear(volume); err != nil {
			t.Error(err)
		}
	}
	stop()
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, lv)
	if guest.Long() {
		lvm(t, "lvremove", "-q", "-y", "vgc/datum")
	} else {
		guest.Run(t, "dmsetup", "remove", lv)
	}
	guest.WaitFor(t, "the end of the filter of a volume that was removed", func() bool {
		all, err := d.Devices(guest.Context(t))
		return err == nil && len(all) == 0
	})
	nothingLeft(t, c)
	if guest.Long() {
		lvm(t, "vgck", "vgc")
	}
}

// TestAttachRefused: what cannot have a filter while it is in use says why, and what to do,
// and nothing changes.
func TestAttachRefused(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	group(t, "vgr", guest.LoopDisk(t, 96<<20, 512))
	lv := volume(t, "vgr/data", 32)
	refused := func(path string, words ...string) {
		t.Helper()
		d.In(t).Refused(words, "add", path)
		a := d.Call("blksnap", "attach", "-d", path)
		if a.Status != 1 || !strings.Contains(a.Err, words[0]) {
			t.Errorf("blksnap attach -d %s: %+v", path, a)
		}
		nothingLeft(t, c)
	}
	t.Run("no device-mapper", func(t *testing.T) {
		disk := guest.LoopDisk(t, 16<<20, 512)
		guest.Ext4.Make(t, disk)
		dir := guest.Mount(t, disk)
		d.In(t).Refused([]string{"mounted on " + dir, "--boot", "LVM"}, "add", disk)
		guest.Unmount(t, dir)
		d.In(t).Refused([]string{"device-mapper"}, "add", "--attach", disk)
	})
	t.Run("swap", func(t *testing.T) {
		guest.Run(t, "mkswap", lv)
		guest.Run(t, "swapon", lv)
		defer guest.Run(t, "swapoff", lv)
		refused(lv, "swap space", "swapoff")
	})
	t.Run("swap in a file", func(t *testing.T) {
		guest.Ext4.Make(t, lv)
		dir := guest.Mount(t, lv)
		file := filepath.Join(dir, "swap file\t1")
		if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		guest.Run(t, "mkswap", file)
		guest.Run(t, "swapon", file)
		defer guest.Unmount(t, dir)
		defer guest.Run(t, "swapoff", file)
		refused(lv, "swap space", "swapoff")
	})
	t.Run("read-only", func(t *testing.T) {
		lvm(t, "lvchange", "-q", "-pr", "vgr/data")
		defer lvm(t, "lvchange", "-q", "-prw", "vgr/data")
		defer guest.Unmount(t, guest.Mount(t, lv, "ro"))
		refused(lv, "read-only")
	})
	t.Run("what the daemon reads", func(t *testing.T) {
		guest.Ext4.Make(t, lv)
		dir := guest.Mount(t, lv)
		config := filepath.Join(dir, "conf")
		if err := os.WriteFile(config, []byte("state_size = \"512M\"\nstate_dir = \"\"\nguard = false\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		d := program.Start(t)
		d.StopAndWait()
		d.With("--config", config)
		d.Restart()
		// Nor does it lose the configuration in a mount namespace of its own.
		if a := d.Call("ublk-blksnap", "daemon", "reload"); a.Status != 0 {
			t.Errorf("%+v", a)
		}
		d.Refused([]string{"the configuration lies on it"}, "add", lv)
		d.StopAndWait()
		guest.Unmount(t, dir)
	})
	t.Run("storage", func(t *testing.T) {
		guest.Ext4.Make(t, lv)
		dir := guest.Mount(t, lv)
		other := d.In(t).Add(guest.LoopDisk(t, 16<<20, 512))
		d := d.In(t)
		s := d.Create(control.CreateRequest{Devices: []string{other.Name}, Storage: []control.Storage{{Path: dir}}})
		d.Taken(s.ID)
		d.Refused([]string{"storage of snapshot " + s.ID}, "add", lv)
		d.Destroy(s.ID)
		d.Remove(other)
		guest.Unmount(t, dir)
	})
	t.Run("a target that only one may have", func(t *testing.T) {
		if !guest.Long() {
			return
		}
		guest.Run(t, "modprobe", "dm-era")
		low := guest.LoopDisk(t, 8<<20, 512)
		era := guest.DMDisk(t, "era", "0 8192 era "+low+" "+lv+" 128")
		guest.Ext4.Make(t, era)
		dir := guest.Mount(t, era)
		refused(era, "era", "unmount it first")
		guest.Unmount(t, dir)
	})
	t.Run("multipath", func(t *testing.T) {
		guest.Run(t, "modprobe", "dm-multipath")
		guest.Run(t, "modprobe", "dm-round-robin")
		path := guest.LoopDisk(t, 16<<20, 512)
		multi := guest.DMDisk(t, "multi", "0 32768 multipath 0 0 1 1 round-robin 0 1 1 "+path+" 1000")
		d.In(t).Refused([]string{"multipath device", "unmount it and add it", "with --boot"}, "add", "--attach", multi)
		nothingLeft(t, c)
		if !guest.Long() {
			return
		}
		on := guest.DMDisk(t, "onmulti", guest.LinearTable(t, multi))
		guest.Ext4.Make(t, on)
		dir := guest.Mount(t, on)
		refused(multi, "the volume that lies on it")
		before := tableOf(t, on)
		stop := busy(t, filepath.Join(dir, "busy"))
		dev := d.In(t).Add(on)
		d.In(t).Remove(dev)
		stop()
		if now := tableOf(t, on); now != before || !dev.Attached {
			t.Errorf("%+v; table %s, before it was %s", dev, now, before)
		}
		guest.Unmount(t, dir)
	})
	t.Run("a part of a volume group", func(t *testing.T) {
		if !guest.Long() {
			return
		}
		guest.Run(t, "wipefs", "-aq", lv)
		inner := guest.DMDisk(t, "inner", guest.LinearTable(t, lv))
		group(t, "vgi", inner)
		path := volume(t, "vgi/data", 8)
		refused(inner, "belongs to LVM", "name the volumes")
		_ = path
		lvm(t, "vgremove", "-q", "-f", "-y", "vgi")
	})
}
