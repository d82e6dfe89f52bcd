package daemon

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	server "github.com/ublk-blksnap/ublk-blksnap/daemon"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestBackupScript runs a backup script that was written for blksnap: full, then
// incremental, restored and compared.
func TestBackupScript(t *testing.T) {
	guest.NeedEither(t)
	if _, err := os.Stat(control.DefaultSocket); err == nil {
		t.Fatal("a daemon runs on the default run directory")
	}
	disks := guest.RAMDisks(t, 2, 32<<20)
	bin := t.TempDir()
	if err := os.Symlink(program.Path(t), filepath.Join(bin, "blksnap")); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("testdata/backup.sh")
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	out, err := guest.Try("env", "PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", "bash", script, disks[0], disks[1], work)
	t.Log(out)
	if err != nil {
		t.Error(err)
	}
	// The script's first command has started a daemon.
	c := control.NewClient(control.DefaultSocket)
	defer c.Close()
	info, err := c.Info(guest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(info.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	guest.WaitFor(t, "the end of the daemon", func() bool { return !alive(info.PID) })
	_ = unix.Unmount(server.RunDir(server.DefaultRunDir).State(), unix.MNT_DETACH)
	guest.WaitFor(t, "the end of the devices", func() bool { return len(guest.UblkDevices()) == 0 })
}

// TestBlksnapScript does with blksnap's own commands what a backup script written
// for blksnap does, and looks at every line and status it sees.
func TestBlksnapScript(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 3, 64<<20)
	d := program.Start(t)
	call := func(args ...string) program.Answer {
		t.Helper()
		a := d.Call("blksnap", args...)
		return a
	}
	// says wants status 0 and that very output.
	says := func(out string, args ...string) {
		t.Helper()
		if a := call(args...); a.Status != 0 || a.Out != out || a.Err != "" {
			t.Fatalf("blksnap %v: status %d, printed %q, want %q, said %q", args, a.Status, a.Out, out, a.Err)
		}
	}
	fails := func(words string, args ...string) {
		t.Helper()
		if a := call(args...); a.Status != 1 || a.Out != "" || !strings.HasPrefix(a.Err, "blksnap: ") || !strings.Contains(a.Err, words) {
			t.Errorf("blksnap %v: status %d, printed %q, said %q, want %q", args, a.Status, a.Out, a.Err, words)
		}
	}
	if a := call("version"); a.Status != 0 || !regexp.MustCompile(`^\d+\.\d+\.\d+\.\d+\n$`).MatchString(a.Out) {
		t.Errorf("version: %+v", a)
	}
	says("Attached successfully\n", "attach", "-d", disks[0])
	says("Already was attached\n", "attach", "--device", disks[0])
	t.Cleanup(func() { call("detach", "-d", disks[0]) })
	filter := "/dev/ublk-blksnap/ram0"
	says("Already was attached\n", "attach", "-d", disks[0])
	fails("no such device", "attach", "-d", "/dev/nothing")

	info := func() map[string]string {
		t.Helper()
		a := call("cbtinfo", "--device="+disks[0])
		if a.Status != 0 {
			t.Fatalf("%+v", a)
		}
		out := map[string]string{}
		var keys []string
		for _, line := range strings.Split(strings.TrimSpace(a.Out), "\n") {
			key, value, _ := strings.Cut(line, "=")
			out[key] = value
			keys = append(keys, key)
		}
		if got := strings.Join(keys, " "); got != "block_size device_capacity block_count generation_id changes_number" {
			t.Fatalf("cbtinfo: %s", got)
		}
		return out
	}
	if i := info(); i["block_size"] != "65536" || i["block_count"] != "1024" || i["changes_number"] != "0" || i["device_capacity"] != fmt.Sprint(64<<20) {
		t.Errorf("cbtinfo: %v", i)
	}
	create := func(args ...string) string {
		t.Helper()
		a := call(append([]string{"snapshot_create"}, args...)...)
		if _, err := uuid.Parse(strings.TrimSuffix(a.Out, "\n")); a.Status != 0 || err != nil || a.Err != "" {
			t.Fatalf("snapshot_create %v: %+v", args, a)
		}
		id := strings.TrimSpace(a.Out)
		t.Cleanup(func() { call("snapshot_destroy", "-i", id) })
		return id
	}
	file := filepath.Join("/dev/shm", "differences")
	cbt := filepath.Join(t.TempDir(), "cbt")
	readMap := func() []byte {
		t.Helper()
		says("", "readcbtmap", "-d", disks[0], "-f", cbt)
		b, err := os.ReadFile(cbt)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(path string, block int64, b byte) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDWR|os.O_SYNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(bytes.Repeat([]byte{b}, 512), block<<16); err != nil {
			t.Fatal(err)
		}
	}
	reads := func(path string, block int64, b byte) {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		got := make([]byte, 512)
		if _, err := f.ReadAt(got, block<<16); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{b}, 512)) {
			t.Errorf("block %d of %s begins with %d, %v; want %d", block, path, got[0], err, b)
		}
	}

	// A first snapshot, of a device that is attached by creating it too.
	first := create("-d", disks[0], disks[1], "-f", file, "-l", "32M")
	fails("already", "snapshot_add", "-i", first, "-d", disks[0])
	says("", "snapshot_add", "-i", first, "-d", disks[2])
	for _, disk := range disks[1:] {
		t.Cleanup(func() { call("detach", "-d", disk) })
	}
	says("error_code=0\nimage=/dev/\n", "snapshot_info", "-d", disks[0])
	says("", "snapshot_take", "-i", first)
	fails("already", "snapshot_take", "-i", first)
	image := "/dev/ublk-blksnap/images/ram0-" + first
	says("error_code=0\nimage="+image+"\n", "snapshot_info", "-d", disks[0])
	says(image+"\n", "snapshot_info", "-d", filter, "-f", "image")
	says("0\n", "snapshot_info", "-d", "/dev/ublkb0", "--field", "error_code")
	says(first+"\n\n", "snapshot_collect")
	newer := create("-d", disks[0])
	says(image+"\n", "snapshot_info", "--dev", disks[0], "--fi", "image")
	says("", "snapshot_destroy", "-i", newer)
	fails("detach "+disks[0]+": held by snapshot "+first+": destroy it first: blksnap snapshot_destroy -i "+first, "detach", "-d", disks[0])

	// The map is that of the take, whatever is written later.
	map1 := readMap()
	write(filter, 5, 'a')
	write(filter, 7, 'b')
	if again := readMap(); len(map1) != 1024 || !bytes.Equal(again, map1) {
		t.Error("the map changed while the snapshot was held")
	}
	reads(filter, 5, 'a')
	reads(image, 5, 0)
	says("result=timeout\n", "snapshot_waitevent", "-i", first, "-t", "10")
	says("", "snapshot_destroy", "-i", first)
	says("\n", "snapshot_collect")
	if _, err := os.Stat(file); err == nil {
		t.Error("the storage file is left")
	}

	// The next take shows exactly what was written since.
	second := create("--device", disks[0], "--file", "/dev/shm")
	says("", "snapshot_take", "--id", second)
	if n := info()["changes_number"]; n != "2" {
		t.Errorf("changes_number %s after the second take", n)
	}
	for block, b := range readMap() {
		if changed := b > 1; changed != (block == 5 || block == 7) {
			t.Errorf("block %d has number %d", block, b)
		}
	}
	says("", "markdirtyblock", "--device", disks[0], "--range", "0:1", "256:128")
	fails("given more than once", "markdirtyblock", "-d", disks[0], "-d", disks[1], "-r", "0:1")
	fails("range outside the device", "markdirtyblock", "-d", disks[0], "-r", "512:1", "131072:1")
	var marked []int
	for block, b := range readMap() {
		if b > 1 {
			marked = append(marked, block)
		}
	}
	if got := fmt.Sprint(marked); got != "[0 2 5 7]" {
		t.Errorf("changed blocks %s", got)
	}
	says("", "snapshot_destroy", "-i", second)

	// A storage that overflows: the events tell, the image fails, the original
	// does not notice.
	third := create("-d", disks[0], "-f", file, "-l", "4M")
	says("", "snapshot_take", "-i", third)
	for block := int64(0); block < 200; block++ {
		write(filter, block, byte(block))
	}
	var last string
	for range 10 {
		a := call("snapshot_waitevent", "-i", third, "-t", "10000")
		if a.Status != 0 || !strings.HasPrefix(a.Out, "result=ok\ntime=") {
			t.Fatalf("waitevent: %+v", a)
		}
		if last = a.Out; strings.Contains(last, "event=corrupted\n") {
			break
		}
	}
	if !strings.Contains(last, "event=corrupted\ndevice=1:0\nerror_code=-28\n") {
		t.Errorf("the last event is %q", last)
	}
	if a := call("snapshot_watcher", "-i", third); a.Status != 0 || !strings.HasPrefix(a.Out, "Start snapshot watcher.\n") ||
		!strings.HasSuffix(a.Out, " - The snapshot was corrupted for device [1:0] with error \"No space left on device\".\nSnapshot watcher finished.\n") {
		t.Errorf("watcher: %+v", a)
	}
	says("-28\n", "snapshot_info", "-d", disks[0], "-f", "error_code")
	if _, err := os.ReadFile("/dev/ublk-blksnap/images/ram0-" + third); err == nil {
		t.Error("the image of a broken snapshot can be read")
	}
	for block := int64(0); block < 200; block++ {
		reads(filter, block, byte(block))
	}
	if a := d.Call("ublk-blksnap", "snapshot", "append", third, "/dev/shm"); a.Status != 7 || !strings.Contains(a.Err, "is corrupted: no space left on device") {
		t.Errorf("storage for a broken snapshot: %+v", a)
	}
	if a := d.Call("ublk-blksnap", "snapshot", "info", third); a.Status != 0 || !strings.Contains(a.Out, "no space left on device (ENOSPC)") {
		t.Errorf("info of a broken snapshot: %+v", a)
	}
	says("", "snapshot_destroy", "-i", third)
	says("result=not found\n", "snapshot_waitevent", "-i", third, "-t", "10")
	fails("no such snapshot", "snapshot_destroy", "-i", third)

	// The marks of a file.
	guest.Ext4.Make(t, filter)
	dir := guest.Mount(t, filter)
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 300_000), 0o600); err != nil {
		t.Fatal(err)
	}
	a := call("markdirtyblock", "-f", path, "--json")
	var found struct {
		Device string
		Ranges []string
	}
	if err := json.Unmarshal([]byte(a.Out), &found); a.Status != 0 || err != nil || found.Device != "/dev/ublkb0" || len(found.Ranges) == 0 {
		t.Fatalf("markdirtyblock: %+v, %v", a, err)
	}
	m := readMap()
	for _, r := range found.Ranges {
		var sector, count int
		if _, err := fmt.Sscanf(r, "%d:%d", &sector, &count); err != nil {
			t.Fatal(err)
		}
		for b := sector / 128; b <= (sector+count-1)/128; b++ {
			if m[b] == 0 {
				t.Errorf("block %d of the file is not marked", b)
			}
		}
	}
	fails("mounted on "+dir, "detach", "-d", disks[0])
	guest.Unmount(t, dir)
	for _, disk := range disks {
		says("", "detach", "-d", disk)
	}
	fails("has no filter", "detach", "-d", disks[0])
	guest.Ext4.Check(t, disks[0])

	// A mounted disk cannot be attached, and both ways out are named; under device-mapper it can.
	dir = guest.Mount(t, disks[0])
	fails("mounted on "+dir+": unmount it", "attach", "-d", disks[0])
	fails("add it with ublk-blksnap add --boot", "attach", "-d", disks[0])
	fails("put it under LVM once", "attach", "-d", disks[0])
	guest.Unmount(t, dir)
	dm := guest.DMDisk(t, "there", guest.LinearTable(t, disks[0]))
	dir = guest.Mount(t, dm)
	says("Attached successfully\n", "attach", "-d", dm)
	says("", "detach", "-d", dm)
	guest.Unmount(t, dir)
}
