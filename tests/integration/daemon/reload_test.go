package daemon

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestReload: one program after the other takes over in the daemon's process, under a
// filesystem that is written to. A state of another format is brought to that of the
// program; a program that does not know it, or a record in it, is refused, and nothing changes.
func TestReload(t *testing.T) {
	guest.Need(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	at := guest.Mount(t, dev.Link)
	s := d.Take(0, dev)
	image := direct.Digest(t, s.Images[0].Path)
	stop := guest.Verified(t, at)
	before := d.CBT(dev)

	var pauses []time.Duration
	reload := func(args ...string) control.Reloaded {
		t.Helper()
		a := d.Call("ublk-blksnap", append([]string{"daemon", "reload", "--json"}, args...)...)
		var done control.Reloaded
		if err := json.Unmarshal([]byte(a.Out), &done); a.Status != 0 || err != nil {
			t.Fatalf("reload: %+v, %v", a, err)
		}
		info, err := d.Info(guest.Context(t))
		if err != nil || info.PID != d.PID || info.Reloaded == nil || !info.Reloaded.At.Equal(done.At) || info.Lost != nil {
			t.Errorf("after a reload the daemon says of itself %+v, %v", info, err)
		}
		pauses = append(pauses, done.Pause)
		return done
	}
	quiesced := 0
	if guest.KernelAtLeast(t, 6, 16) {
		quiesced = 2 // the filter and the image
	}
	// Who waits for his turn meanwhile has it with the next program.
	end, changed := make(chan struct{}), make(chan error, 1)
	go func() {
		n := 0
		for {
			select {
			case <-end:
				changed <- nil
				return
			default:
			}
			n++
			if _, err := d.SetSnapshot(guest.Context(t), control.SetRequest{ID: s.ID, TTL: time.Duration(n) * time.Hour}); control.CodeOf(err) == control.Interrupted || errors.Is(err, unix.ERESTART) {
				changed <- err
				return
			}
		}
	}()
	for range int(guest.Span(3, 20)) {
		if done := reload(); done.Quiesced != quiesced || done.From != control.Version || done.To != control.Version || done.Program != program.Path(t) {
			t.Errorf("reloaded: %+v", done)
		}
		time.Sleep(200 * time.Millisecond)
	}
	close(end)
	if err := guest.Await(t, "the last change", changed); err != nil {
		t.Errorf("during a reload: %v", err)
	}

	// The versions of records rise without that of the format.
	record := filepath.Join(d.RunDir.State(), "devices", dev.Name+".json")
	ours, version, err := statefile.Read(record, "device", 98)
	if err == nil {
		err = statefile.Write(record, "device", 99, json.RawMessage(ours))
	}
	if err != nil {
		t.Fatal(err)
	}
	d.Refused([]string{"cannot take over", "the filter " + dev.Name, "it has version 99", "remove " + dev.Name, "nothing has changed"}, "daemon", "reload")
	if err := statefile.Write(record, "device", version, json.RawMessage(ours)); err != nil {
		t.Fatal(err)
	}

	// The next format, and not back.
	next := guest.TreeFile(t, "bin/ublk-blksnap-next")
	if _, err := os.Stat(filepath.Join(d.RunDir.State(), "devices", dev.Name+".json")); err != nil {
		t.Errorf("the record is not where it is in this format: %v", err)
	}
	reload("--program", next)
	if _, err := os.Stat(filepath.Join(d.RunDir.State(), "disks", dev.Name+".json")); err != nil {
		t.Errorf("the record is not where it is in the next format: %v", err)
	}
	d.Refused([]string{"cannot take over", "it has version 5, and this one knows up to 4", "nothing has changed"}, "daemon", "reload", "--program", program.Path(t))
	d.Refused([]string{"cannot take over", "no such file"}, "daemon", "reload", "--program", "/nonexistent")
	reload()

	// Nor does an older program begin when the daemon has died.
	d.Kill()
	out, err := exec.Command(program.Path(t), "daemon", "--run-dir", string(d.RunDir)).CombinedOutput()
	if status := guest.ExitStatus(t, err); status != 1 || !strings.Contains(string(out), "it has version 5, and this one knows up to 4") || !strings.Contains(string(out), "daemon stop") {
		t.Errorf("a program that does not know the format: status %d, %s", status, out)
	}
	t.Setenv("UBLK_BLKSNAP_BIN", next)
	d.Restart()
	if now, err := d.Devices(guest.Context(t)); err != nil || len(now) != 1 || now[0].Path != dev.Path {
		t.Errorf("devices %+v, %v", now, err)
	}
	if after := d.CBT(dev); after.GenerationID != before.GenerationID {
		t.Errorf("the change map was at %+v, is at %+v", before, after)
	}
	stop()
	if direct.Digest(t, s.Images[0].Path) != image {
		t.Error("the image is not what it was")
	}
	d.Destroy(s.ID)
	guest.Unmount(t, at)
	d.Remove(dev)
	guest.Ext4.Check(t, disk)
	slices.Sort(pauses)
	t.Logf("%d reloads: I/O waited for %v at most, in the median %v", len(pauses), pauses[len(pauses)-1], pauses[len(pauses)/2])
}

// TestReloadStuckStorage: while a storage's filesystem stands still a program could not
// begin, so a reload is refused, and all I/O goes on.
func TestReloadStuckStorage(t *testing.T) {
	guest.NeedEither(t)
	guest.Run(t, "modprobe", "dm-mod")
	files := guest.DMDisk(t, "files", guest.LinearTable(t, guest.LoopDisk(t, guest.Ext4.Minimum, 512)))
	guest.Ext4.Make(t, files)
	dir := guest.Mount(t, files)
	ram := guest.RAMDisks(t, 2, 24<<20)
	d := program.Start(t, "diff_buffer_pool_size=8M")
	dev, free := d.Add(ram[0]), d.Add(ram[1])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: filepath.Join(dir, "differences")}}})
	s = d.Taken(s.ID)
	guest.Run(t, "dmsetup", "suspend", "files") // with its filesystem frozen
	resume := sync.OnceFunc(func() { guest.Run(t, "dmsetup", "resume", "files") })
	t.Cleanup(resume)
	write := func(dev control.Device, n int64) {
		t.Helper()
		f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
		defer f.Close()
		buf := direct.Buffers.Get().(*[]byte)
		defer direct.Buffers.Put(buf)
		if err := f.WriteAt((*buf)[:4096], n*s.ChunkSize); err != nil {
			t.Errorf("%s: %v", dev.Name, err)
		}
	}
	for n := range int64(40) {
		write(dev, n)
	}
	d.Refused([]string{"reload", "storage " + dir, "does not answer"}, "daemon", "reload")
	write(dev, 41)
	write(free, 0)
	resume()
	guest.WaitFor(t, "the end of all stores", func() bool { u := d.Show(s.ID).Usage; return u.Copied == u.Stored })
	if a := d.Call("ublk-blksnap", "daemon", "reload"); a.Status != 0 {
		t.Errorf("reload: %+v", a)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
	d.Remove(free)
	guest.Unmount(t, dir)
}
