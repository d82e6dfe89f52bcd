package integration

import (
	"bufio"
	"bytes"
	"context"
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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// refused calls the program and wants a status that the program has, nothing on
// standard output and one line on standard error that says all of the words.
func (d *daemon) refused(words []string, args ...string) {
	d.t.Helper()
	a := d.call("ublk-blksnap", args...)
	if a.status < 1 || a.status > 8 || a.out != "" || strings.Count(a.errout, "\n") != 1 || !strings.HasPrefix(a.errout, "ublk-blksnap: ") {
		d.t.Errorf("%v: status %d, printed %q, said %q", args, a.status, a.out, a.errout)
	}
	for _, w := range words {
		if !strings.Contains(a.errout, w) {
			d.t.Errorf("%v said %q, not %q", args, a.errout, w)
		}
	}
	// What is said is for people: nothing of the daemon's own view, nothing twice.
	for _, w := range []string{"/proc/1/root", "strconv", "ublk-blksnap: ublk-blksnap:"} {
		if strings.Contains(a.errout, w) {
			d.t.Errorf("%v said %q", args, a.errout)
		}
	}
}

// TestBadDisks: what cannot be added is refused, with the reason and, if it is in
// use, with its user.
func TestBadDisks(t *testing.T) {
	needVM(t)
	disks := ramDisks(t, 3, 64<<20)
	d := startDaemon(t)
	file := sparseFile(t, "/dev/shm", 1<<20)
	d.refused([]string{"add /dev/nothing: no such device"}, "add", "/dev/nothing")
	d.refused([]string{"a regular file, not a block device", "losetup"}, "add", file)
	d.refused([]string{"add /dev: a directory, not a block device"}, "add", "/dev")
	d.refused([]string{"add /dev/null: a character device, not a block device"}, "add", "/dev/null")

	t.Run("node without device", func(t *testing.T) {
		node := filepath.Join(t.TempDir(), "node")
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(250, 77))); err != nil {
			t.Fatal(err)
		}
		d.in(t).refused([]string{"no device behind this node"}, "add", node)
	})
	t.Run("zero size", func(t *testing.T) {
		run(t, "modprobe", "loop")
		d.in(t).refused([]string{"add /dev/loop7: has zero size"}, "add", "/dev/loop7")
	})
	t.Run("read-only", func(t *testing.T) {
		run(t, "blockdev", "--setro", disks[0])
		defer run(t, "blockdev", "--setrw", disks[0])
		d.in(t).refused([]string{"add " + disks[0] + ": read-only: make it writable first: blockdev --setrw"}, "add", disks[0])
	})
	t.Run("mounted", func(t *testing.T) {
		ext4FS.make(t, disks[0])
		dir := mount(t, disks[0])
		d.in(t).refused([]string{"mounted on " + dir + ": unmount it first"}, "add", disks[0])
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(disks[0], link); err != nil {
			t.Fatal(err)
		}
		d.in(t).refused([]string{"add " + link + ": mounted on " + dir}, "add", link)
		umount(t, dir)
	})
	t.Run("mounted in another namespace", func(t *testing.T) {
		ext4FS.make(t, disks[0])
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
		d.in(t).refused([]string{"mounted on " + dir}, "add", disks[0])
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Log(err) // of the read at the end of its input
		}
	})
	t.Run("swap", func(t *testing.T) {
		run(t, "mkswap", disks[1])
		run(t, "swapon", disks[1])
		defer run(t, "swapoff", disks[1])
		d.in(t).refused([]string{"used as swap space: swapoff " + disks[1]}, "add", disks[1])
	})
	t.Run("device-mapper", func(t *testing.T) {
		dmDisk(t, "over", linear(t, disks[1]))
		d.in(t).refused([]string{"held by the device-mapper device over", "/dev/mapper/over"}, "add", disks[1])
	})
	t.Run("loop", func(t *testing.T) {
		loop := loopOver(t, disks[1], 512)
		d.in(t).refused([]string{"the backing device of " + loop + ": losetup -d " + loop}, "add", disks[1])
	})
	t.Run("claimed by a process", func(t *testing.T) {
		f, err := blockdev.OpenExclusive(disks[1], disks[1], unix.O_RDWR)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.in(t).refused([]string{fmt.Sprintf("(process %d)", os.Getpid())}, "add", disks[1])
	})
	t.Run("partition", func(t *testing.T) {
		file := sparseFile(t, "/dev/shm", 128<<20)
		cmd := exec.Command("sfdisk", "-q", file)
		cmd.Stdin = strings.NewReader("label: gpt\n,32M\n,32M\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		loop := loopOver(t, file, 512)
		run(t, "partx", "-u", loop)
		one, two := loop+"p1", loop+"p2"
		ext4FS.make(t, one)
		dir := mount(t, one)
		dt := d.in(t)
		dt.refused([]string{"its partition " + one + " is mounted on " + dir}, "add", loop)
		dev := dt.add(two)
		umount(t, dir)
		dt.refused([]string{two + ", on the same disk, has the filter " + dev.Name}, "add", loop)
		dt.remove(dev)
		whole := dt.add(loop)
		dt.refused([]string{loop + ", on the same disk, has the filter " + whole.Name}, "add", one)
		dt.remove(whole)
	})
	t.Run("already added", func(t *testing.T) {
		dt := d.in(t)
		dev := dt.add(disks[2])
		dt.refused([]string{"already added as " + dev.Name}, "add", disks[2])
		dt.refused([]string{"is itself the filter over " + disks[2]}, "add", dev.Path)
		dt.refused([]string{"is itself the filter over " + disks[2]}, "add", dev.Link)
		dt.refused([]string{"the name " + dev.Name + " is taken by the filter over " + disks[2], "--name"}, "add", disks[1], "--name", dev.Name)
		s := dt.take(0, dev)
		dt.refused([]string{"is an image of snapshot " + s.ID}, "add", s.Images[0].Path)
		dt.refused([]string{"remove " + dev.Name + ": held by snapshot " + s.ID, "snapshot destroy"}, "remove", dev.Name)
		dt.destroy(s.ID)
		dt.remove(dev)
	})
	// Whatever was refused has left the disks free, and no notes.
	if notes, err := os.ReadDir(filepath.Join(string(d.dir), "udev")); err != nil || len(notes) > 0 {
		t.Errorf("notes left: %v, %v", notes, err)
	}
	for _, disk := range disks {
		d.remove(d.add(disk))
	}
}

// TestBadParameters: values out of range, names, and things that are not there.
func TestBadParameters(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	many := fmt.Sprint(runtime.NumCPU() + 1)
	d.refused([]string{many + " queues: this machine has processors for 1 to"}, "add", disk, "--queues", many)
	d.refused([]string{"--queues 0: must be at least 1"}, "add", disk, "--queues", "0")
	d.refused([]string{"queue depth 4097: want 1 to 4096"}, "add", disk, "--depth", "4097")
	d.refused([]string{"--depth 0: must be at least 1"}, "add", disk, "--depth", "0")
	if strings.HasPrefix(ublk.KernelRelease(), "6.12") {
		d.refused([]string{"no AUTO_BUF_REG: Linux 6.16 or newer is needed"}, "add", disk, "--mode", "zerocopy")
	}
	d.refused([]string{`"fast" is not a mode`}, "add", disk, "--mode", "fast")
	for _, name := range []string{"a/b", "..", "images", "-x", "a b", strings.Repeat("n", 65)} {
		d.refused([]string{"name"}, "add", disk, "--name="+name)
	}
	d.refused([]string{"remove nothing: no filter of this name"}, "remove", "nothing")
	d.refused([]string{"remove " + disk + ": has no filter: add it first"}, "remove", disk)
	d.refused([]string{"status of /dev/nothing: no such device"}, "status", "/dev/nothing")
	dev := d.add(disk)
	id := "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8"
	d.refused([]string{"no such snapshot"}, "snapshot", "take", id)
	d.refused([]string{"no such snapshot"}, "snapshot", "destroy", id)
	d.refused([]string{"not a UUID"}, "snapshot", "info", "17")
	d.refused([]string{"/no/such/place"}, "snapshot", "create", dev.Name, "--storage", "/no/such/place/at/all")
	held := filepath.Join(t.TempDir(), "held")
	if err := os.WriteFile(held, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.refused([]string{"storage " + held + ": in use"}, "snapshot", "create", dev.Name, "--storage", held)
	if a := d.call("ublk-blksnap", "snapshot", "create", dev.Name, "--storage", "/dev/null"); a.status != 2 || !strings.Contains(a.errout, "storage /dev/null: neither") {
		t.Errorf("storage in a character device: %+v", a)
	}
	d.refused([]string{"give --storage"}, "snapshot", "create", dev.Name, "--take")
	d.refused([]string{"--config /my/conf: a daemon runs that was started with "}, "list", "--config", "/my/conf")
	d.refused([]string{"chunk size 5120: not a power of two"}, "snapshot", "create", dev.Name, "--chunk-size", "5K")
	d.refused([]string{"no filter of this name"}, "snapshot", "create", "nothing")
	d.refused([]string{"already"}, "snapshot", "create", dev.Name, disk)
	d.refused([]string{"no take of that number"}, "cbt", "changes", dev.Name, "--since", d.cbt(dev).GenerationID+":9")
	d.refused([]string{"copy the whole device"}, "cbt", "changes", dev.Name, "--since", id+":0")
	d.refused([]string{"range outside the device"}, "cbt", "mark", dev.Name, "0:8", fmt.Sprintf("%d:1", dev.Size/512))
	if ss, err := d.Snapshots(ctx(t)); err != nil || len(ss) != 0 {
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
		if a := d.call("ublk-blksnap", strings.Fields(c.args)...); a.status != c.status || a.out != "" || a.errout == "" {
			t.Errorf("%s: %+v, want status %d", c.args, a, c.status)
		}
	}
	d.remove(dev)

	// Who has seen enough of the events says so without an error.
	s := d.create(control.CreateRequest{})
	watch := exec.Command(program(t), "--run-dir", string(d.dir), "snapshot", "watch", s.ID)
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
	if err := watch.Wait(); status(t, err) != 130 || errs.Len() > 0 {
		t.Errorf("interrupted: %v, said %q", err, &errs)
	}
	d.destroy(s.ID)
}

// busyDisk is a disk that is used as swap space.
func busyDisk(t *testing.T) string {
	t.Helper()
	disk := loopDisk(t, 1<<20, 512)
	run(t, "mkswap", disk)
	run(t, "swapon", disk)
	t.Cleanup(func() { run(t, "swapoff", disk) })
	return disk
}

// TestRemoveInUse: a filter that somebody uses stays, with the user named.
func TestRemoveInUse(t *testing.T) {
	needVM(t)
	disk := ramDisks(t, 1, 64<<20)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	t.Run("mounted", func(t *testing.T) {
		ext4FS.make(t, dev.Link)
		dir := mount(t, dev.Link)
		d.in(t).refused([]string{"remove " + dev.Name + ": mounted on " + dir + ": unmount it first"}, "remove", dev.Name)
		umount(t, dir)
	})
	t.Run("open", func(t *testing.T) {
		f, err := os.Open(dev.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.in(t).refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
	})
	t.Run("open elsewhere", func(t *testing.T) {
		// As a container or a chroot has it.
		dir := t.TempDir()
		run(t, "mount", "--bind", "/dev", dir)
		defer umount(t, dir)
		f, err := os.Open(filepath.Join(dir, filepath.Base(dev.Path)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d.in(t).refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
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
		d.in(t).refused([]string{"opened by", fmt.Sprintf("(process %d)", os.Getpid())}, "remove", disk)
	})
	t.Run("device-mapper", func(t *testing.T) {
		dmDisk(t, "above", linear(t, dev.Path))
		d.in(t).refused([]string{"held by the device-mapper device above"}, "remove", dev.Path)
	})
	t.Run("loop", func(t *testing.T) {
		loop := loopOver(t, dev.Path, 512)
		d.in(t).refused([]string{loop}, "remove", dev.Link)
	})
	d.remove(dev)
}

// TestNotRoot: another user is told to be root, whether a daemon runs or not.
func TestNotRoot(t *testing.T) {
	d := startDaemon(t)
	// The program may lie where others cannot go.
	bin := filepath.Join("/run", "ublk-blksnap-test")
	run(t, "install", "-m", "755", program(t), bin)
	defer os.Remove(bin)
	for _, dir := range []string{string(d.dir), "/run/no-daemon-here"} {
		for _, args := range [][]string{{"list"}, {"add", "/dev/null"}, {"daemon"}} {
			cmd := exec.Command(bin, append([]string{"--run-dir", dir}, args...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			var errs bytes.Buffer
			cmd.Stderr = &errs
			err := cmd.Run()
			if status(t, err) != 1 || !strings.HasSuffix(errs.String(), "run this as root\n") {
				t.Errorf("%v on %s: %v: %s", args, dir, err, &errs)
			}
		}
	}
}

// fresh is a run directory without a daemon, and a call of the program on it.
func fresh(t *testing.T) (dir string, call func(args ...string) answer) {
	dir = filepath.Join(t.TempDir(), "run")
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "state"), unix.MNT_DETACH) })
	return dir, func(args ...string) answer {
		t.Helper()
		cmd := exec.Command(program(t), append([]string{"--run-dir", dir}, args...)...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		return answer{status(t, cmd.Run()), out.String(), errs.String()}
	}
}

// TestMachineCannot: what is missing on the machine is said by the first
// command, by doctor, and leaves nothing behind.
func TestMachineCannot(t *testing.T) {
	needVM(t)
	t.Run("io_uring disabled", func(t *testing.T) {
		const sysctl = "/proc/sys/kernel/io_uring_disabled"
		if err := os.WriteFile(sysctl, []byte("2"), 0); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				t.Skip("needs kernel 6.6: sysctl kernel.io_uring_disabled")
			}
			t.Fatal(err)
		}
		defer os.WriteFile(sysctl, []byte("0"), 0)
		cannot(t, "io_uring is disabled by sysctl kernel.io_uring_disabled=2: set it to 0")
	})
	t.Run("no ublk_drv", func(t *testing.T) {
		unload(t, "ublk_drv")
		modules := filepath.Join("/lib/modules", ublk.KernelRelease())
		run(t, "mount", "-t", "tmpfs", "none", modules)
		defer run(t, "modprobe", "ublk_drv")
		defer run(t, "umount", modules)
		cannot(t, "no ublk driver", "ublk_drv")
	})
}

// TestOldKernel is the same on a kernel from before ublk, as KERNEL=6.1 boots.
func TestOldKernel(t *testing.T) {
	needVM(t)
	if kernelAtLeast(t, 6, 5) {
		t.Skip("needs kernel 6.4 or older")
	}
	cannot(t, "too old: Linux 6.5 or newer is needed")
}

// cannot checks that commands fail and say these words.
func cannot(t *testing.T, words ...string) {
	t.Helper()
	dir, call := fresh(t)
	for _, args := range [][]string{{"add", "/dev/null"}, {"daemon"}, {"doctor"}} {
		a := call(args...)
		said := a.out + a.errout
		if a.status != 1 {
			t.Errorf("%v: status %d", args, a.status)
		}
		for _, w := range words {
			if !strings.Contains(said, w) {
				t.Errorf("%v said %q, not %q", args, said, w)
			}
		}
	}
	version := exec.Command(program(t), "version")
	version.Args[0] = "blksnap"
	said, err := version.CombinedOutput()
	if status(t, err) != 1 || !strings.HasPrefix(string(said), "blksnap: ") || !strings.Contains(string(said), words[0]) {
		t.Errorf("blksnap version: %v, %q", err, said)
	}
	if m, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(m, []byte(dir)) {
		t.Errorf("a mount is left in %s, %v", dir, err)
	}
}

// TestDoctorWell: on a machine that can, doctor says so.
func TestDoctorWell(t *testing.T) {
	needVM(t)
	_, call := fresh(t)
	a := call("doctor")
	if a.status != 0 || strings.Contains(a.out, "missing") {
		t.Fatalf("status %d: %s%s", a.status, a.out, a.errout)
	}
	for _, line := range []string{"ublk_drv", "io_uring", "USER_RECOVERY_REISSUE", "kernel"} {
		if !strings.Contains(a.out, "ok      "+line) {
			t.Errorf("%s is not ok:\n%s", line, a.out)
		}
	}
	if a := call("doctor", "--json"); a.status != 0 || !strings.Contains(a.out, `"ok": true`) {
		t.Errorf("JSON: status %d: %s", a.status, a.out)
	}
}

// TestLargeRequests: what clients send takes no memory to speak of, however much
// it is and from how many.
func TestLargeRequests(t *testing.T) {
	needVM(t)
	leakTest(t)
	const size = 64 << 20
	disk := ramDisks(t, 1, size)[0]
	d := startDaemon(t)
	dev := d.add(disk)
	d.destroy(d.take(0, dev).ID)
	before := d.memory()
	piece := []byte(strings.Repeat(`{"sector":0,"count":131072},`, 4096))
	send := func(path, begin string, piece []byte, n int, end string) (status int, err error) {
		parts := []io.Reader{strings.NewReader(begin)}
		for range n {
			parts = append(parts, bytes.NewReader(piece))
		}
		c := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", d.dir.Socket())
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
			if _, err := d.Devices(ctx(t)); err != nil {
				t.Error(err)
			}
			most = max(most, d.memory())
		}
	}
	if most > before+40<<20 {
		t.Errorf("%d MiB of memory, %d before", most>>20, before>>20)
	}
	if n := slices.Min(d.cbtMap(dev)); n == 0 {
		t.Error("not all is marked")
	}
	d.remove(dev)
}
