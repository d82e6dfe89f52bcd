package attach

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestDeathInAttach: the daemon dies at each step of an attachment and of a detachment, and at
// each step of what the next one does about that. The users of the volume notice no more than
// a pause, and in the end it is attached, or it has its own table and nothing is left.
func TestDeathInAttach(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	group(t, "vgd", guest.LoopDisk(t, 80<<20, 512))
	lv := volume(t, "vgd/data", 48)
	guest.Ext4.Make(t, lv)
	before := tableOf(t, lv)
	dir := guest.Mount(t, lv)
	d := program.Start(t)
	d.StopAndWait()
	d.Program = program.Path(t) + "-deathpoints"
	arm := filepath.Join(t.TempDir(), "armed")
	stop := busy(t, filepath.Join(dir, "busy"))
	attached := func() bool {
		t.Helper()
		all, err := d.Devices(guest.Context(t))
		if err != nil || len(all) > 1 {
			t.Fatalf("devices %+v, %v", all, err)
		}
		return len(all) == 1
	}
	// dies does something with a daemon that dies at step n of it.
	dies := func(n int, f func() error) (died bool) {
		t.Helper()
		if err := os.WriteFile(arm, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		err := f()
		died = d.Ended(0) || err != nil && d.Ended(time.Second)
		os.Remove(arm)
		if !died && err != nil {
			t.Fatalf("n = %d: a daemon that lives says %v", n, err)
		}
		return died
	}
	launch := func(n int) {
		t.Helper()
		os.Remove(arm)
		d.Restart(fmt.Sprintf("%s=%d", deathpoint.DieAt, n), deathpoint.DieFile+"="+arm)
	}
	attach := func() error {
		_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: lv})
		return err
	}
	detach := func() error {
		return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: lv})
	}
	// settled waits until it is known how far it came.
	settled := func(n int) {
		t.Helper()
		guest.WaitFor(t, fmt.Sprintf("n = %d: an end of what the dead daemon began; table %s", n, tableOf(t, lv)), func() bool {
			there := attached()
			if there != goesThroughFilter(t, lv) {
				return false
			}
			if there {
				_, err := d.CBTInfo(guest.Context(t), lv)
				return err == nil
			}
			return tableOf(t, lv) == before
		})
		if !attached() {
			// Whatever waits for opLock comes after all that is left is removed.
			if _, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{}); err != nil {
				t.Error(err)
			}
			for _, id := range program.SnapshotIDs(t, d) {
				d.Destroy(id)
			}
			nothingLeft(t, c)
		}
	}
	stride := int(guest.Span(12, 1))
	if guest.KernelAtLeast(t, 7, 0) && stride > 1 {
		stride += 2
	}
	steps := func(what string, f, ready func() error) {
		for n := 1; ; n += stride {
			t.Logf("%s: n = %d", what, n)
			launch(n)
			if err := ready(); err != nil {
				t.Fatal(err)
			}
			if !dies(n, f) {
				t.Logf("%s: lives through it at n = %d", what, n)
				d.StopAndWait()
				return
			}
			// The next one dies too, somewhere in its taking over.
			if m := 1 + n%5; n%2 == 0 {
				os.WriteFile(arm, nil, 0o600)
				d.Launch(fmt.Sprintf("%s=%d", deathpoint.DieAt, m), deathpoint.DieFile+"="+arm)
				if !d.Ended(3 * time.Second) {
					d.Kill()
				}
				os.Remove(arm)
			}
			d.Restart()
			settled(n)
			if attached() {
				if err := detach(); err != nil {
					t.Errorf("n = %d: %v", n, err)
				}
			}
			if now := tableOf(t, lv); now != before {
				t.Errorf("n = %d: table %q, and before it was %q", n, now, before)
			}
			nothingLeft(t, c)
			for _, kind := range []string{"cbt", "counters", "devices"} {
				if left, err := os.ReadDir(filepath.Join(d.RunDir.State(), kind)); err != nil || len(left) > 0 {
					t.Errorf("n = %d: left in %s: %v, %v", n, kind, left, err)
				}
			}
			d.StopAndWait()
			if t.Failed() {
				return
			}
		}
	}
	steps("detach", detach, attach)
	steps("attach", attach, func() error { return nil })
	stop()
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, lv)
	lvm(t, "vgck", "vgd")
}

// TestAttachAgain: attached and detached again and again while fio writes and verifies, with a
// death of the daemon in a tenth of the attachments and detachments (in CI in a twentieth): somewhere
// in it. LVM and everybody else find the tables as they were, and the group in order before, while
// the volumes are attached, and afterwards.
func TestAttachAgain(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	group(t, "vgs", guest.LoopDisk(t, 130<<20, 512))
	volumes := []string{volume(t, "vgs/ext4", 24), encrypted(t, "xfs", volume(t, "vgs/xfs", 80))}
	kinds := []guest.Filesystem{guest.Ext4, guest.XFS}
	d := program.Start(t)
	var before, dirs []string
	var stops []func()
	for i, path := range volumes {
		kinds[i].Make(t, path)
		before = append(before, tableOf(t, path))
		dirs = append(dirs, guest.Mount(t, path))
		stops = append(stops, guest.Verified(t, dirs[i]))
	}
	add := func(path string) error {
		_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: path})
		return err
	}
	remove := func(path string) error {
		return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: path})
	}
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	deaths, inIt := 0, 0
	// dying does it with a daemon that dies somewhere in it, which takes about as long as usual,
	// and whatever comes of it, once more.
	dying := func(do func(string) error, path string, done bool, usual time.Duration) error {
		asked := make(chan error, 1)
		go func() { asked <- do(path) }()
		time.Sleep(time.Duration(rnd.Int63n(int64(usual))))
		d.Kill()
		err := guest.Await(t, "an answer", asked)
		if deaths++; err != nil {
			inIt++
		}
		d.Restart()
		if goesThroughFilter(t, path) == done {
			return nil
		}
		t.Logf("%s: died in it: %v", path, err)
		return do(path)
	}
	groupInOrder(t, "vgs", "before")
	dies, share := 0, int(guest.Span(20, 10)) // the operation in which it dies, one of so many
	usual := make([]time.Duration, 2*len(volumes))
	for n := range int(guest.Span(10, 100)) {
		began := time.Now()
		for j := range usual { // each is attached, then each is detached
			i, attach, do := j%len(volumes), j < len(volumes), remove
			if attach {
				do = add
			}
			if j == len(volumes) && n%10 == 5 {
				groupInOrder(t, "vgs", "attached")
			}
			k := n*len(usual) + j
			if k%share == 0 {
				first := 0
				if k == 0 {
					first = len(usual) // when it is known how long each takes
				}
				dies = k + first + rnd.Intn(share-first)
			}
			var err error
			if from := time.Now(); k != dies {
				err = do(volumes[i])
				usual[j] = time.Since(from)
			} else {
				err = dying(do, volumes[i], attach, usual[j])
			}
			if err != nil {
				t.Fatalf("round %d: %v", n, err)
			}
			if now := tableOf(t, volumes[i]); goesThroughFilter(t, volumes[i]) != attach || !attach && now != before[i] {
				t.Fatalf("round %d: table %q, and before it was %q", n, now, before[i])
			}
			if info, err := c.Info(dm.Device{Num: numOf(t, volumes[i])}); err != nil || !info.Live || info.Suspended || info.Inactive || info.ReadOnly {
				t.Errorf("round %d: %+v, %v", n, info, err)
			}
		}
		t.Logf("round %d: %v", n, time.Since(began))
	}
	t.Logf("%d deaths, %d of them before an answer", deaths, inIt)
	if guest.Long() && inIt < deaths/4 {
		t.Errorf("of %d deaths no more than %d came before an answer", deaths, inIt)
	}
	nothingLeft(t, c)
	groupInOrder(t, "vgs", "afterwards")
	for i, path := range volumes {
		stops[i]()
		guest.Unmount(t, dirs[i])
		kinds[i].Check(t, path)
	}
}

// groupInOrder makes sure that LVM finds a group of writable volumes, and what the kernel has of
// each, in order. Of an attached one it says that the kernel has another table than its own.
func groupInOrder(t testing.TB, name, when string) {
	t.Helper()
	lvm(t, "vgck", name)
	out := guest.Run(t, "lvs", append([]string{"--noheadings", "--separator", ",", "-o", "lv_active,lv_live_table,lv_inactive_table,lv_suspended,lv_permissions,lv_health_status", name}, quiet...)...)
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		switch {
		case when == "attached" && strings.Contains(line, "WARNING: Cannot find matching striped segment for "+name+"/"):
		case strings.TrimSpace(line) != "active,live table present,,,writeable,":
			t.Errorf("%s: lvs says %q", when, out)
		}
	}
}
