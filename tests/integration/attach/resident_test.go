package attach

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestAttachResident: a filter comes under the volume with the daemon's own program and
// configuration, as the root filesystem's is. When the daemon dies, its guard
// starts the next one without reading anything of the volume; when the guard dies too, so
// does any command. A program from the volume itself takes over.
func TestAttachResident(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	group(t, "vgp", guest.LoopDisk(t, 128<<20, 512))
	lv := volume(t, "vgp/sys", 112)
	guest.Ext4.Make(t, lv)
	before := tableOf(t, lv)
	dir := guest.Mount(t, lv)
	d := program.Start(t)
	d.StopAndWait()

	d.Program = filepath.Join(dir, "ublk-blksnap")
	copyFile(t, program.Path(t), d.Program)
	config := filepath.Join(dir, "conf")
	configure := func(resident bool, stateDir string) {
		t.Helper()
		text := fmt.Sprintf("resident = %v\nstate_size = \"512M\"\nstate_dir = %q\n", resident, stateDir)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	configure(false, "")
	d.With("--config", config)
	d.Restart()
	d.Refused([]string{"lies on it", "resident = true", "daemon reload"}, "add", lv)
	reload := func() {
		t.Helper()
		if a := d.Call("ublk-blksnap", "daemon", "reload"); a.Status != 0 || !strings.Contains(a.Out, d.Program+" has taken over") && !strings.Contains(a.Out, " has taken over from ") {
			t.Fatalf("%+v", a)
		}
	}
	configure(true, filepath.Join(dir, "state"))
	reload()
	d.Refused([]string{"state_dir lies on it", "state_dir =", "daemon reload"}, "add", lv)
	configure(true, "")
	reload()
	dev, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: lv})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() { // the last daemon is no child of this process
			d.Call("ublk-blksnap", "remove", "--force", dev.Name)
			d.Call("ublk-blksnap", "daemon", "stop")
		}
	})
	stop := busy(t, filepath.Join(dir, "busy"))

	// fromMemory makes sure that nothing of ours has anything of the volume but by mistake.
	fromMemory := func() (pid int) {
		t.Helper()
		info, err := d.Info(guest.Context(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, comm := range []string{"ublk-blksnap", "ublk-probe", "ublk-guard"} {
			guest.WaitFor(t, comm+" from memory", func() bool {
				all := program.Processes(comm)
				return len(all) > 0 && !slices.ContainsFunc(all, func(pid int) bool {
					var state, exe unix.Stat_t
					err := errors.Join(unix.Stat(d.RunDir.State(), &state), unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &exe))
					return err != nil || exe.Dev != state.Dev
				})
			})
		}
		return info.PID
	}
	pid := fromMemory()
	// dies kills processes and then the daemon, when nothing of the volume is in the page cache
	// any more.
	dies := func(before ...string) {
		t.Helper()
		unix.Sync()
		guest.DropCaches(t)
		for _, comm := range before {
			for _, p := range program.Processes(comm) {
				_ = unix.Kill(p, unix.SIGKILL)
			}
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	next := func() {
		t.Helper()
		guest.WaitFor(t, "the next daemon", func() bool {
			info, err := d.Info(guest.Context(t))
			return err == nil && info.PID != pid
		})
		pid = fromMemory()
		if all, err := d.Devices(guest.Context(t)); err != nil || len(all) != 1 || !all[0].Attached || all[0].Name != dev.Name {
			t.Fatalf("the next daemon has %+v, %v", all, err)
		}
	}
	for range guest.Span(1, 20) {
		dies()
		next()
	}
	dies("ublk-probe", "ublk-guard")
	// Any command does it, with a program that can be read.
	if a := d.Call("ublk-blksnap", "list"); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	next()

	// An upgrade: the program is read before the volume waits.
	guest.DropCaches(t)
	reload()
	fromMemory()
	s := d.Take(0, dev)
	d.Destroy(s.ID)
	dies()
	next()
	blksnap(t, d, "detach", "-d", lv)
	if after := tableOf(t, lv); after != before {
		t.Errorf("table %q, and before it was %q", after, before)
	}
	if a := d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	nothingLeft(t, c)
	stop()
	guest.WaitFor(t, "the end of all processes", func() bool { return len(program.Processes("ublk-guard")) == 0 })
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, lv)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
