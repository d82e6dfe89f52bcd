package daemon

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestBadDisks: what cannot be added is refused, with the reason and, if it is in
// use, with its user.
func TestBadDisks(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 3, 64<<20)
	d := program.Start(t)
	file := guest.SparseFile(t, "/dev/shm", 1<<20)
	d.Refused([]string{"add /dev/nothing: no such device"}, "add", "/dev/nothing")
	d.Refused([]string{"a regular file, not a block device", "losetup"}, "add", file)
	d.Refused([]string{"add /dev: a directory, not a block device"}, "add", "/dev")
	d.Refused([]string{"add /dev/null: a character device, not a block device"}, "add", "/dev/null")

	t.Run("node without device", func(t *testing.T) {
		node := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(250, 77))); err != nil {
			t.Fatal(err)
		}
		d.In(t).Refused([]string{"no device behind this node"}, "add", node)
	})
	t.Run("zero size", func(t *testing.T) {
		guest.Run(t, "modprobe", "loop")
		d.In(t).Refused([]string{"add /dev/loop7: has zero size"}, "add", "/dev/loop7")
	})
	t.Run("read-only", func(t *testing.T) {
		guest.Run(t, "blockdev", "--setro", disks[0])
		defer guest.Run(t, "blockdev", "--setrw", disks[0])
		d.In(t).Refused([]string{"add " + disks[0] + ": read-only: make it writable first: blockdev --setrw"}, "add", disks[0])
	})
	t.Run("mounted", func(t *testing.T) {
		guest.Ext4.Make(t, disks[0])
		dir := guest.Mount(t, disks[0])
		d.In(t).Refused([]string{"mounted on " + dir + ": unmount it, add it with --boot, and mount it again", "; or put it under LVM once"}, "add", disks[0])
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(disks[0], link); err != nil {
			t.Fatal(err)
		}
		d.In(t).Refused([]string{"add " + link + ": mounted on " + dir}, "add", link)
		guest.Unmount(t, dir)
	})
	t.Run("mounted in another namespace", func(t *testing.T) {
		guest.Ext4.Make(t, disks[0])
		dir := t.TempDir()
		cmd := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", "mount "+disks[0]+" "+dir+" && echo ready && read x")
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
		d.In(t).Refused([]string{"mounted on " + dir}, "add", disks[0])
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Log(err) // of the read at the end of its input
		}
	})
	t.Run("swap", func(t *testing.T) {
		guest.Run(t, "mkswap", disks[1])
		guest.Run(t, "swapon", disks[1])
		defer guest.Run(t, "swapoff", disks[1])
		d.In(t).Refused([]string{"used as swap space: swapoff " + disks[1]}, "add", disks[1])
	})
	t.Run("device-mapper", func(t *testing.T) {
		guest.DMDisk(t, "over", guest.LinearTable(t, disks[1]))
		d.In(t).Refused([]string{"held by the device-mapper device over", "/dev/mapper/over"}, "add", disks[1])
	})
	t.Run("loop", func(t *testing.T) {
		loop := guest.LoopOver(t, disks[1], 512)
		d.In(t).Refused([]string{"the backing device of " + loop + ": losetup -d " + loop}, "add", disks[1])
	})
	t.Run("claimed by a process", func(t *testing.T) {
		f, err := blockdev.OpenExclusive(disks[1], disks[1], unix.O_RDWR)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.In(t).Refused([]string{fmt.Sprintf("(process %d)", os.Getpid())}, "add", disks[1])
	})
	t.Run("partition", func(t *testing.T) {
		file := guest.SparseFile(t, "/dev/shm", 128<<20)
		cmd := exec.Command("sfdisk", "-q", file)
		cmd.Stdin = strings.NewReader("label: gpt\n,32M\n,32M\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		loop := guest.LoopOver(t, file, 512)
		guest.Run(t, "partx", "-u", loop)
		one, two := loop+"p1", loop+"p2"
		guest.Ext4.Make(t, one)
		dir := guest.Mount(t, one)
		dt := d.In(t)
		dt.Refused([]string{"its partition " + one + " is mounted on " + dir}, "add", loop)
		dev := dt.Add(two)
		guest.Unmount(t, dir)
		dt.Refused([]string{two + ", on the same disk, has the filter " + dev.Name}, "add", loop)
		dt.Remove(dev)
		whole := dt.Add(loop)
		dt.Refused([]string{loop + ", on the same disk, has the filter " + whole.Name}, "add", one)
		dt.Remove(whole)
	})
	t.Run("already added", func(t *testing.T) {
		dt := d.In(t)
		dev := dt.Add(disks[2])
		dt.Refused([]string{"already added as " + dev.Name}, "add", disks[2])
		dt.Refused([]string{"is itself the filter over " + disks[2]}, "add", dev.Path)
		dt.Refused([]string{"is itself the filter over " + disks[2]}, "add", dev.Link)
		dt.Refused([]string{"the name " + dev.Name + " is taken by the filter over " + disks[2], "--name"}, "add", disks[1], "--name", dev.Name)
		s := dt.Take(0, dev)
		dt.Refused([]string{"is an image of snapshot " + s.ID}, "add", s.Images[0].Path)
		dt.Refused([]string{"remove " + dev.Name + ": held by snapshot " + s.ID, "snapshot destroy"}, "remove", dev.Name)
		dt.Destroy(s.ID)
		dt.Remove(dev)
	})
	// Whatever was refused has left the disks free, and no notes.
	if notes, err := os.ReadDir(filepath.Join(string(d.RunDir), "udev")); err != nil || len(notes) > 0 {
		t.Errorf("notes left: %v, %v", notes, err)
	}
	for _, disk := range disks {
		d.Remove(d.Add(disk))
	}
}

// TestBadParameters: values out of range, names, and things that are not there.
func TestBadParameters(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	many := fmt.Sprint(runtime.NumCPU() + 1)
	d.Refused([]string{many + " queues: this machine has processors for 1 to"}, "add", disk, "--queues", many)
	d.Refused([]string{"--queues 0: must be at least 1"}, "add", disk, "--queues", "0")
	d.Refused([]string{"queue depth 4097: want 1 to 4096"}, "add", disk, "--depth", "4097")
	d.Refused([]string{"--depth 0: must be at least 1"}, "add", disk, "--depth", "0")
	if strings.HasPrefix(ublk.KernelRelease(), "6.12") {
		d.Refused([]string{"no AUTO_BUF_REG: Linux 6.16 or newer is needed"}, "add", disk, "--mode", "zerocopy")
	}
	d.Refused([]string{`"fast" is not a mode`}, "add", disk, "--mode", "fast")
	for _, name := range []string{"a/b", "..", "images", "-x", "a b", strings.Repeat("n", 65)} {
		d.Refused([]string{"name"}, "add", disk, "--name="+name)
	}
	d.Refused([]string{"remove nothing: no filter of this name"}, "remove", "nothing")
	d.Refused([]string{"remove " + disk + ": has no filter: add it first"}, "remove", disk)
	d.Refused([]string{"status of /dev/nothing: no such device"}, "status", "/dev/nothing")
	// A dry run checks all of it and does nothing.
	d.Refused([]string{many + " queues: this machine has processors for 1 to"}, "add", disk, "--dry-run", "--queues", many)
	devices := guest.UblkDevices()
	a := d.Call("ublk-blksnap", "add", disk, "--dry-run", "--name", "planned", "--queues", "1", "--depth", "16", "--mode", "copy", "--json")
	var planned control.Device
	if err := json.Unmarshal([]byte(a.Out), &planned); a.Status != 0 || err != nil || planned.Name != "planned" || planned.Size != guest.SizeOf(t, disk) ||
		planned.Mode != control.ModeCopy || planned.Plan == nil || planned.Plan.Memory < 16*ublk.DefaultMaxIO || planned.History.Continued || planned.Path != "" {
		t.Errorf("a dry run: %+v, %v", a, err)
	}
	if now, err := d.Devices(guest.Context(t)); err != nil || len(now) > 0 || len(guest.UblkDevices()) != len(devices) {
		t.Errorf("a dry run has made %v, %v", now, err)
	}
	t.Run("dry run for the boot", func(t *testing.T) {
		d := d.In(t)
		stays := guest.DMDisk(t, "stays", guest.LinearTable(t, disk))
		const table = "/etc/ublk-blksnap.d/stays.conf"
		a := d.Call("ublk-blksnap", "add", stays, "--dry-run", "--boot")
		if _, err := os.Stat(table); a.Status != 0 || !strings.Contains(a.Out, "power failure:") || !strings.Contains(a.Err, "stays: "+table+" would have it for the boot\n") || err == nil {
			t.Errorf("%+v; its table: %v", a, err)
		}
	})
	dev := d.Add(disk)
	d.Refused([]string{"already added as " + dev.Name}, "add", disk, "--dry-run")
	id := "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8"
	d.Refused([]string{"no such snapshot"}, "snapshot", "take", id)
	d.Refused([]string{"no such snapshot"}, "snapshot", "destroy", id)
	d.Refused([]string{"snapshot 17: no such snapshot"}, "snapshot", "info", "17")
	d.Refused([]string{`snapshot "": neither a name nor a UUID`}, "snapshot", "info", "")
	d.Refused([]string{"/no/such/place"}, "snapshot", "create", dev.Name, "--storage", "/no/such/place/at/all")
	held := filepath.Join(t.TempDir(), "held")
	if err := os.WriteFile(held, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Refused([]string{"storage " + held + ": in use"}, "snapshot", "create", dev.Name, "--storage", held)
	if a := d.Call("ublk-blksnap", "snapshot", "create", dev.Name, "--storage", "/dev/null"); a.Status != 2 || !strings.Contains(a.Err, "storage /dev/null: neither") {
		t.Errorf("storage in a character device: %+v", a)
	}
	d.Refused([]string{"give --storage"}, "snapshot", "create", dev.Name, "--take")
	d.Refused([]string{"--config /my/conf: a daemon runs that was started with "}, "list", "--config", "/my/conf")
	d.Refused([]string{"chunk size 5120: not a power of two"}, "snapshot", "create", dev.Name, "--chunk-size", "5K")
	d.Refused([]string{"no filter of this name"}, "snapshot", "create", "nothing")
	if a := d.Call("ublk-blksnap", "snapshot", "create", dev.Name, disk); a.Status != 2 || !strings.Contains(a.Err, dev.Name+": named twice") {
		t.Errorf("one device by two names: %+v", a)
	}
	d.Refused([]string{"no take of that number"}, "cbt", "changes", dev.Name, "--since", d.CBT(dev).GenerationID+":9")
	d.Refused([]string{"copy the whole device"}, "cbt", "changes", dev.Name, "--since", id+":0")
	d.Refused([]string{"range outside the device"}, "cbt", "mark", dev.Name, "0:8", fmt.Sprintf("%d:1", dev.Size/512))
	if ss, err := d.Snapshots(guest.Context(t)); err != nil || len(ss) != 0 {
		t.Errorf("left of refused snapshots: %v, %v", ss, err)
	}
	// What a script goes by; blksnap's own commands only say that they failed.
	for _, c := range []struct {
		status int
		args   string
	}{
		{1, "add " + disk}, {2, "add --nonsense"}, {2, "add /dev/null"}, {3, "remove nothing"}, {3, "snapshot destroy " + id},
		{5, "add " + busyDisk(t)}, {6, "cbt changes " + dev.Name + " --since " + id + ":0"}, {1, "detach -d nothing"}, {1, "snapshot_destroy -i " + id},
	} {
		if a := d.Call("ublk-blksnap", strings.Fields(c.args)...); a.Status != c.status || a.Out != "" || a.Err == "" {
			t.Errorf("%s: %+v, want status %d", c.args, a, c.status)
		}
	}
	d.Remove(dev)

	// Who has seen enough of the events says so without an error.
	s := d.Create(control.CreateRequest{})
	watch := exec.Command(program.Path(t), "--run-dir", string(d.RunDir), "snapshot", "watch", s.ID)
	var errs bytes.Buffer
	watch.Stderr = &errs
	out, err := watch.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasSuffix(line, " created\n") {
		t.Errorf("watched %q, %v", line, err)
	}
	_ = watch.Process.Signal(os.Interrupt)
	if err := watch.Wait(); guest.ExitStatus(t, err) != 130 || errs.Len() > 0 {
		t.Errorf("interrupted: %v, said %q", err, &errs)
	}
	d.Destroy(s.ID)
}

// busyDisk is a disk that is used as swap space.
func busyDisk(t *testing.T) string {
	t.Helper()
	disk := guest.LoopDisk(t, 1<<20, 512)
	guest.Run(t, "mkswap", disk)
	guest.Run(t, "swapon", disk)
	t.Cleanup(func() { guest.Run(t, "swapoff", disk) })
	return disk
}

// TestRemoveInUse: a filter that somebody uses stays, with the user named.
func TestRemoveInUse(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	t.Run("mounted", func(t *testing.T) {
		guest.Ext4.Make(t, dev.Link)
		dir := guest.Mount(t, dev.Link)
		d.In(t).Refused([]string{"remove " + dev.Name + ": mounted on " + dir + ": unmount it first"}, "remove", dev.Name)
		guest.Unmount(t, dir)
	})
	t.Run("open", func(t *testing.T) {
		f, err := os.Open(dev.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.In(t).Refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
	})
	t.Run("open elsewhere", func(t *testing.T) {
		// As a container or a chroot has it.
		dir := t.TempDir()
		guest.Run(t, "mount", "--bind", "/dev", dir)
		defer guest.Unmount(t, dir)
		f, err := os.Open(filepath.Join(dir, filepath.Base(dev.Path)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.In(t).Refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
	})
	t.Run("mapped", func(t *testing.T) {
		f, err := os.OpenFile(dev.Path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem)
		mem[0]++
		d.In(t).Refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
	})
	t.Run("device-mapper", func(t *testing.T) {
		guest.DMDisk(t, "above", guest.LinearTable(t, dev.Path))
		d.In(t).Refused([]string{"held by the device-mapper device above"}, "remove", dev.Path)
	})
	t.Run("loop", func(t *testing.T) {
		loop := guest.LoopOver(t, dev.Path, 512)
		d.In(t).Refused([]string{loop}, "remove", dev.Link)
	})
	t.Run("snapshot", func(t *testing.T) { destroyInUse(t, d.In(t), dev) })
	f, err := os.Open(dev.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	program.WantError(t, d.Stop(guest.Context(t)), control.Busy, fmt.Sprintf("(process %d)", os.Getpid()))
	go func() { // a passer-by, such as udev, does not keep the daemon from its stop
		for ; ; time.Sleep(5 * time.Millisecond) {
			info, err := d.Info(guest.Context(t))
			if err != nil || strings.Contains(info.Activity, "nobody has a device open") {
				f.Close()
				return
			}
		}
	}()
	if err := d.Stop(guest.Context(t)); err != nil {
		t.Error(err)
	}
}

// destroyInUse: a snapshot whose image somebody uses stays, with the user named, unless it is
// destroyed by force.
func destroyInUse(t *testing.T, d *program.Daemon, dev control.Device) {
	guest.Ext4.Make(t, dev.Link)
	s := d.Take(0, dev)
	refused := func(words ...string) {
		t.Helper()
		a := d.Call("ublk-blksnap", "snapshot", "destroy", s.ID)
		for _, w := range append(words, "destroy snapshot "+s.ID+": ", "snapshot destroy --force "+s.ID) {
			if a.Status != 5 || !strings.Contains(a.Err, w) {
				t.Errorf("%+v, want status 5 and %q", a, w)
			}
		}
		if now := d.Show(s.ID); now.State != control.SnapshotTaken || now.Images[0].Link != s.Images[0].Link {
			t.Errorf("what was refused has changed it: %+v", now)
		}
	}
	f, err := os.Open(s.Images[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	refused("the image of "+dev.Name+": opened by", fmt.Sprintf("(process %d)", os.Getpid()), "end that process first")
	f.Close()
	at := guest.Mount(t, s.Images[0].Link)
	refused("the image of "+dev.Name+": mounted on "+at, "unmount it first")
	// A mount that nobody sees any more, as somebody has a file on it.
	file, err := os.Create(filepath.Join(at, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	guest.Run(t, "umount", "-l", at)
	refused("is in use", "fuser -vm")
	if a := d.Call("blksnap", "snapshot_destroy", "-i", s.ID); a.Status != 0 || a.Err != "" {
		t.Errorf("blksnap's own verb: %+v", a)
	}
	if _, err := file.Write(make([]byte, 4096)); err == nil {
		if err = file.Sync(); err == nil {
			t.Error("an image that is gone can be written to")
		}
	}
	s = d.Take(0, dev)
	if f, err = os.Open(s.Images[0].Path); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := fmt.Sprintf("ublk-blksnap: destroy snapshot %s: I/O fails from now on: the image of %s: opened by %s (process %d)\n", s.ID, dev.Name, ownName(t), os.Getpid())
	if a := d.Call("ublk-blksnap", "snapshot", "destroy", "--force", s.ID); a.Status != 0 || a.Out != "" || a.Err != want {
		t.Errorf("by force: %+v, want %q", a, want)
	}
	s = d.Take(0, dev)
	if a := d.Call("ublk-blksnap", "snapshot", "destroy", s.ID); a.Status != 0 {
		t.Errorf("one that nobody uses: %+v", a)
	}
}

// TestLargeRequests: what clients send takes no memory to speak of, however much
// it is and from how many.
func TestLargeRequests(t *testing.T) {
	guest.NeedEither(t)
	program.LeakTest(t)
	const size = 64 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	d.Destroy(d.Take(0, dev).ID)
	before := d.Memory()
	piece := []byte(strings.Repeat(`{"sector":0,"count":131072},`, 4096))
	send := func(path, begin string, piece []byte, n int, end string) (status int, err error) {
		parts := []io.Reader{strings.NewReader(begin)}
		for range n {
			parts = append(parts, bytes.NewReader(piece))
		}
		c := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", d.RunDir.Socket())
		}}}
		defer c.CloseIdleConnections()
		resp, err := c.Post("http://d/v1/"+path, "application/json", io.MultiReader(append(parts, strings.NewReader(end))...))
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	ends := make(chan error)
	most := before
	for range 4 {
		go func() {
			_, err := send("snapshot/create", `{"devices":["`, bytes.Repeat([]byte("x"), 1<<20), 60, `"]}`)
			// The daemon may hang up before all is sent.
			if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				ends <- err
				return
			}
			status, err := send("cbt/mark", fmt.Sprintf(`{"device":%q,"ranges":[`, dev.Name), piece, 20, `{"sector":0,"count":8}]}`)
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("marking is answered with status %d", status)
			}
			ends <- err
		}()
	}
	for left := 4; left > 0; {
		select {
		case err := <-ends:
			left--
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Millisecond):
			// Who wants to look does not wait for it.
			if _, err := d.Devices(guest.Context(t)); err != nil {
				t.Error(err)
			}
			most = max(most, d.Memory())
		}
	}
	if most > before+40<<20 {
		t.Errorf("%d MiB of memory, %d before", most>>20, before>>20)
	}
	if n := slices.Min(d.Map(dev)); n == 0 {
		t.Error("not all is marked")
	}
	d.Remove(dev)
}
