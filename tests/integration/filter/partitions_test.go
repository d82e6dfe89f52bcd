package filter

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	internaldisk "github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// sfdisk writes a partition table to a disk, and says what it says.
func sfdisk(t *testing.T, disk, table string) string {
	t.Helper()
	cmd := exec.Command("sfdisk", disk)
	cmd.Stdin = strings.NewReader(table)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	return string(out)
}

// partitions are what the kernel knows of the partitions of a disk: number, start and size
// in sectors.
func partitions(t *testing.T, disk string) (table []string) {
	t.Helper()
	files, _ := filepath.Glob("/sys/block/" + filepath.Base(disk) + "/*/partition")
	for _, f := range files {
		var line []string
		for _, name := range []string{"partition", "start", "size"} {
			b, err := os.ReadFile(filepath.Join(filepath.Dir(f), name))
			if err != nil {
				t.Fatal(err)
			}
			line = append(line, strings.TrimSpace(string(b)))
		}
		table = append(table, strings.Join(line, " "))
	}
	slices.Sort(table)
	return table
}

// TestPartitions has a filter over a disk with partitions: the filter has the same, they may
// be changed, and the disk has them then.
func TestPartitions(t *testing.T) {
	guest.Need(t)
	guest.Run(t, "modprobe", "loop")
	disk := strings.TrimSpace(guest.Run(t, "losetup", "-f", "-P", "--show", guest.SparseFile(t, "/dev/shm", 64<<20)))
	t.Cleanup(func() { guest.Run(t, "losetup", "-d", disk) })
	const table = "label: dos\n2048 32768 83\n34816 65536 5\n36864 16384 83\n55296 16384 83\n"
	sfdisk(t, disk, table)
	was := partitions(t, disk)
	if len(was) != 4 {
		t.Fatalf("the disk has %q", was)
	}
	d := program.Start(t)
	dev := d.Add(disk)
	same := func(want []string) func() bool {
		return func() bool { return slices.Equal(partitions(t, dev.Path), want) }
	}
	if !guest.KernelAtLeast(t, 7, 0) && !same(was)() { // later ones look beside all else
		t.Errorf("the disk has %q, and the filter, once added, %q", was, partitions(t, dev.Path))
	}
	guest.WaitFor(t, "the partitions", same(was))

	last := dev.Path + "p6"
	guest.WaitFor(t, last, func() bool { _, err := os.Stat(last); return err == nil })
	guest.Ext4.Make(t, last)
	dir := guest.Mount(t, last)
	err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
	program.WantError(t, err, control.Busy, "its partition "+last+" is mounted on "+dir)
	d.Kill()
	d.Restart()
	if !same(was)() {
		t.Errorf("after a death the filter has %q", partitions(t, dev.Path))
	}
	guest.Unmount(t, dir)

	// Where the kernel does not look by itself, partx tells it, as sfdisk's own word has it.
	said := sfdisk(t, dev.Path, "label: gpt\n2048 16384\n36864 16384\n")
	if !guest.KernelAtLeast(t, 7, 0) && !strings.Contains(said, "partx(8)") {
		t.Errorf("sfdisk says %s", said)
	}
	guest.Run(t, "partx", "-d", dev.Path)
	guest.Run(t, "partx", "-a", dev.Path)
	now := []string{"1 2048 16384", "2 36864 16384"}
	guest.WaitFor(t, "the new partitions", same(now))
	d.Remove(dev)
	if got := partitions(t, disk); !slices.Equal(got, now) {
		t.Errorf("without the filter the disk has %q, want %q", got, now)
	}

	// Nobody tells it, and the disk has them all the same.
	dev = d.Add(disk)
	sfdisk(t, dev.Path, table)
	d.Remove(dev)
	if got := partitions(t, disk); !slices.Equal(got, was) {
		t.Errorf("without the filter the disk has %q, want %q", got, was)
	}

	// Another disk has the name by now.
	bdev, err := internaldisk.Machine().Lookup(disk)
	if err != nil {
		t.Fatal(err)
	}
	bdev.Sequence--
	if err := internaldisk.AddPartitions(bdev, []internaldisk.Partition{{Number: 9, Start: 60 << 20, Size: 1 << 20}}); !errors.Is(err, unix.ENODEV) || len(partitions(t, disk)) != len(was) {
		t.Errorf("another disk: %v", err)
	}
}

// TestKilledInStart: the daemon is killed while the driver starts a filter over a disk that is
// slow. The next one goes on with the others.
func TestKilledInStart(t *testing.T) {
	guest.Need(t)
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "dm-delay")
	disks := guest.RAMDisks(t, 2, 16<<20)
	slow := guest.DMDisk(t, "slow", guest.LinearTable(t, disks[0]))
	d := program.Start(t)
	other := d.Add(disks[1])
	before, _ := filepath.Glob("/sys/block/ublkb*")
	guest.ReloadDM(t, "slow", fmt.Sprintf("0 %d delay %s 0 400", guest.SizeOf(t, slow)>>9, disks[0]))
	ended := make(chan error, 1)
	go func() {
		_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: slow})
		ended <- err
	}()
	guest.WaitFor(t, "the disk of the filter", func() bool {
		now, _ := filepath.Glob("/sys/block/ublkb*")
		return len(now) > len(before)
	})
	d.Kill()
	<-ended
	d.Restart()
	f := direct.MustOpen(t, other.Path, unix.O_RDONLY)
	if err := f.ReadAt(direct.Pages(t, 4096), 0); err != nil {
		t.Error(err)
	}
	f.Close()
	d.Remove(other)
	all, err := d.Devices(guest.Context(t))
	if err != nil || len(all) > 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	for _, dev := range all {
		d.Remove(dev)
	}
	guest.ReloadDM(t, "slow", guest.LinearTable(t, disks[0]))
}
