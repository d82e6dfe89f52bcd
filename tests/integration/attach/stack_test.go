package attach

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// quiet has LVM leave alone what is not there in a test's machine.
var quiet = []string{"--config", "devices{use_devicesfile=0} activation{monitoring=0} global{use_lvmpolld=0}"}

// lvm runs a command of LVM, which must have nothing to complain of.
func lvm(t testing.TB, args ...string) string {
	t.Helper()
	out := guest.Run(t, args[0], append(args[1:], quiet...)...)
	for _, bad := range []string{"WARNING", "mismatch", "uplicate"} {
		if strings.Contains(out, bad) {
			t.Errorf("%v says %s", args, out)
		}
	}
	return out
}

// group makes a volume group over disks, which goes with the test.
func group(t testing.TB, name string, disks ...string) {
	t.Helper()
	guest.Run(t, "modprobe", "dm-mod")
	lvm(t, append([]string{"vgcreate", "-q", "-s", "1m", name}, disks...)...)
	t.Cleanup(func() {
		guest.Try("vgremove", "-f", "-y", name)
		for _, d := range disks {
			guest.Try("wipefs", "-aq", d)
		}
	})
}

// volume makes a logical volume of several stretches, so that its table has several targets.
func volume(t testing.TB, name string, mib int) string {
	t.Helper()
	vg, lv, _ := strings.Cut(name, "/")
	lvm(t, "lvcreate", "-q", "-y", "-Wn", "-L", fmt.Sprint(mib/2, "m"), "-n", lv, vg)
	lvm(t, "lvcreate", "-q", "-y", "-Wn", "-L", "1m", "-n", lv+"gap", vg)
	lvm(t, "lvextend", "-q", "-L", fmt.Sprint(mib, "m"), name)
	return "/dev/" + name
}

// encrypted makes and opens an encrypted volume over a disk, with its key in its table. LUKS takes
// 16 MiB of the disk.
func encrypted(t testing.TB, name, disk string) string {
	t.Helper()
	key := keyFile(t)
	formatLUKS(t, disk, key)
	guest.Run(t, "cryptsetup", "open", "--disable-keyring", "--key-file", key, disk, name)
	t.Cleanup(func() { guest.Try("cryptsetup", "close", name) })
	return "/dev/mapper/" + name
}

// keyFile is a new file with what opens an encrypted volume.
func keyFile(t testing.TB) string {
	t.Helper()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, bytes.Repeat([]byte("secret.."), 8), 0o600); err != nil {
		t.Fatal(err)
	}
	return key
}

// formatLUKS makes an encrypted volume, which takes little time to open.
func formatLUKS(t testing.TB, disk, key string) {
	t.Helper()
	guest.Run(t, "modprobe", "dm-crypt")
	guest.Run(t, "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", disk, key)
}

// dmName is device-mapper's name of a device.
func dmName(t testing.TB, path string) string {
	t.Helper()
	return strings.TrimSpace(guest.Run(t, "dmsetup", "info", "-c", "--noheadings", "-o", "name", path))
}

// tableOf is the table of a device.
func tableOf(t testing.TB, path string) string {
	t.Helper()
	return guest.Run(t, "dmsetup", "table", path)
}

// goesThroughFilter says whether the requests of a device come to a filter.
func goesThroughFilter(t testing.TB, path string) bool {
	t.Helper()
	table := strings.Fields(tableOf(t, path))
	if len(table) != 5 || table[2] != "linear" {
		return false
	}
	to, err := os.Readlink("/sys/dev/block/" + table[3])
	return err == nil && strings.HasPrefix(filepath.Base(to), "ublkb")
}

// nothingLeft makes sure that no device of ours is left.
func nothingLeft(t testing.TB, c *dm.Control) {
	t.Helper()
	guest.WaitFor(t, fmt.Sprintf("the end of %v", guest.UblkDevices()), func() bool { return len(guest.UblkDevices()) == 0 })
	all, err := c.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		if strings.HasPrefix(d.Name, "ublk-blksnap") {
			t.Errorf("%s is left", d)
		}
	}
}

const (
	// busyBlock is what a busy user writes at a time.
	busyBlock = 4096
	// busyBlocks is how many places he has.
	busyBlocks = 512
)

// busy has somebody write to a file and read back what he has written, past the page cache,
// until stop. It makes sure then that the file holds all of it.
func busy(t testing.TB, path string) (stop func()) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := f.Truncate(busyBlock * busyBlocks); err != nil {
		t.Fatal(err)
	}
	quit, ended := make(chan struct{}), make(chan error, 1)
	var last [busyBlocks]uint64
	written := uint64(0)
	block := direct.Pages(t, busyBlock)
	check := func(at int) error {
		_, err := f.ReadAt(block, int64(at)*busyBlock)
		if got := binary.LittleEndian.Uint64(block); err == nil && (got != last[at] || binary.LittleEndian.Uint64(block[busyBlock-8:]) != last[at]) {
			err = fmt.Errorf("block %d reads as %d, and was written as %d", at, got, last[at])
		}
		return err
	}
	go func() {
		for n := uint64(1); ; n++ {
			select {
			case <-quit:
				ended <- nil
				return
			default:
			}
			at := int(n * 7919 % busyBlocks)
			binary.LittleEndian.PutUint64(block, n)
			binary.LittleEndian.PutUint64(block[busyBlock-8:], n)
			_, err := f.WriteAt(block, int64(at)*busyBlock)
			last[at] = n
			if err == nil && n%16 == 0 {
				err = f.Sync()
			}
			if err == nil {
				err = check(at)
			}
			if err != nil {
				ended <- err
				return
			}
			written = n
		}
	}()
	stopped := false
	stop = func() {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		close(quit)
		err := guest.Await(t, "the end of the writer of "+path, ended)
		for at := 0; err == nil && at < busyBlocks; at++ {
			if last[at] != 0 {
				err = check(at)
			}
		}
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		f.Close()
		t.Logf("%s: %d writes", path, written)
	}
	t.Cleanup(stop)
	return stop
}

// blksnap calls one of blksnap's verbs, which must succeed.
func blksnap(t testing.TB, d *program.Daemon, args ...string) string {
	t.Helper()
	a := d.Call("blksnap", args...)
	if a.Status != 0 || a.Err != "" {
		t.Fatalf("blksnap %v: %+v", args, a)
	}
	return a.Out
}

// readAll is what a device holds.
func readAll(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
