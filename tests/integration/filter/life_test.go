package filter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestOriginalError has a part of the original fail: what touches it gets EIO,
// and nothing else does.
func TestOriginalError(t *testing.T) {
	guest.NeedEither(t)
	const size = 16 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	good := guest.LinearTable(t, ram)
	const bad, badEnd = 8 << 20 >> 9, 8<<20>>9 + 64 // sectors
	broken := []string{
		fmt.Sprintf("0 %d linear %s 0", bad, ram),
		fmt.Sprintf("%d %d error", bad, badEnd-bad),
		fmt.Sprintf("%d %d linear %s %d", badEnd, size>>9-badEnd, ram, badEnd),
	}
	disk := guest.DMDisk(t, "original", good)
	d := program.Start(t)
	dev := d.Add(disk)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	guest.ReloadDM(t, "original", broken...)
	before := d.Held()

	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	buf := direct.Pages(t, 1<<20)
	for _, c := range []struct {
		at, n int64 // sectors
		fails bool
	}{
		{bad - 8, 8, false}, {bad, 8, true}, {bad - 8, 16, true}, {badEnd - 8, 8, true}, {badEnd, 8, false},
		{bad - 512, 2048, true}, {badEnd - 1, 1, true}, {0, 2048, false},
	} {
		p := buf[:c.n*stamp.SectorSize]
		if err := f.ReadAt(p, c.at*stamp.SectorSize); errors.Is(err, unix.EIO) != c.fails || err != nil && !c.fails {
			t.Errorf("read of sectors %d+%d: %v", c.at, c.n, err)
		} else if err == nil {
			if err := w.Disks[0].Compare(p, c.at); err != nil {
				t.Error(err)
			}
		}
		if c.fails {
			if err := f.WriteAt(p, c.at*stamp.SectorSize); !errors.Is(err, unix.EIO) {
				t.Errorf("write of sectors %d+%d: %v", c.at, c.n, err)
			}
			continue
		}
		x := w.Disks[0].Begin(c.at, c.at+c.n, false)
		stamp.Fill(p, x.Version, 0, c.at)
		if err := f.WriteAt(p, c.at*stamp.SectorSize); err != nil {
			t.Errorf("write of sectors %d+%d: %v", c.at, c.n, err)
		}
		x.Done()
	}
	if err := unix.Fsync(f.FD); err != nil {
		t.Errorf("flush: %v", err)
	}
	s, err := d.DeviceStatus(guest.Context(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	if s.Errors == 0 || s.InFlight != 0 {
		t.Errorf("%d errors counted, %d in flight", s.Errors, s.InFlight)
	}
	f.Close()
	d.Settled(before, 3)

	// Random writers elsewhere do not notice; then all is well again.
	guest.ReloadDM(t, "original", good)
	x := w.Disks[0].Begin(bad-512, badEnd+2048, false)
	p := buf[:1<<20]
	f = direct.MustOpen(t, dev.Path, unix.O_RDWR)
	for at := x.From; at < x.To; {
		n := min(int64(2048), x.To-at)
		stamp.Fill(p[:n*stamp.SectorSize], x.Version, 0, at)
		if err := f.WriteAt(p[:n*stamp.SectorSize], at*stamp.SectorSize); err != nil {
			t.Fatal(err)
		}
		at += n
	}
	x.Done()
	f.Close()
	d.Remove(dev)
	if err := w.Same(disk); err != nil {
		t.Error(err)
	}
}

// TestRemoveUnwritten: a filter whose page cache cannot be written to the disk is not removed
// as if nothing were lost. The kernel says that once, and drops the data.
func TestRemoveUnwritten(t *testing.T) {
	guest.NeedEither(t)
	const size = 16 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	disk := guest.DMDisk(t, "unwritten", guest.LinearTable(t, ram))
	d := program.Start(t)
	for _, first := range []string{"remove", "stop"} {
		dev := d.Add(disk)
		guest.ReloadDM(t, "unwritten", fmt.Sprintf("0 %d error", size>>9))
		guest.Run(t, "dd", "if=/dev/urandom", "of="+dev.Path, "bs=4k", "count=1", "conv=notrunc")
		stop := func() error { return d.Stop(guest.Context(t)) }
		remove := func() error {
			return d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
		}
		tries := []func() error{remove, remove, stop}
		if first == "stop" {
			tries = []func() error{stop, stop, remove}
		}
		for i, try := range tries {
			if i == 1 {
				guest.ReloadDM(t, "unwritten", guest.LinearTable(t, ram))
			}
			var err error
			guest.WaitFor(t, "the end of whoever looks at what was written", func() bool {
				err = try()
				return control.CodeOf(err) != control.Busy
			})
			program.WantError(t, err, control.Internal, "data that was written cannot be brought to", "remove --force "+dev.Name)
		}
		if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	dev := d.Add(disk)
	if h := dev.History; h.Continued {
		t.Errorf("the change map was kept: %+v", h)
	}
	d.Remove(dev)
}

// TestRemoveForced removes a filter under fio: it gets I/O errors and ends.
func TestRemoveForced(t *testing.T) {
	guest.NeedEither(t)
	ram := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	round := func() {
		dev := d.Add(ram, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 32))
		c := exec.Command("fio", "--name=test", "--filename="+dev.Path, "--ioengine=libaio", "--direct=1", "--rw=randrw",
			"--bsrange=4k-256k", "--iodepth=32", "--time_based", "--runtime=600")
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		guest.WaitFor(t, "writes of fio", func() bool {
			s, err := d.DeviceStatus(guest.Context(t), dev.Name)
			if err != nil {
				t.Fatal(err)
			}
			return s.Operations[control.OpWrite].Requests > 100
		})
		err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name})
		program.WantError(t, err, control.Busy, "fio")
		if err := d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Wait() }()
		if err := guest.Await(t, "the end of fio", ended); guest.ExitStatus(t, err) == 0 || !strings.Contains(out.String(), "error") {
			t.Errorf("fio noticed nothing: %v\n%s", err, out.String())
		}
		if _, err := os.Stat(dev.Link); err == nil {
			t.Errorf("%s is still there", dev.Link)
		}
		// Nobody holds the disk any more.
		f, err := blockdev.OpenExclusive(ram, ram, unix.O_RDWR)
		if err != nil {
			t.Fatalf("open the original: %v", err)
		}
		f.Close()
	}
	round()
	before := d.Held()
	round()
	d.Settled(before, 3)
}

// TestRounds adds and removes a filter again and again: it leaves nothing.
func TestRounds(t *testing.T) {
	guest.Need(t)
	program.LeakTest(t)
	const size = 4 << 20
	ram := guest.RAMDisks(t, 2, size)
	d := program.Start(t)
	w := stamp.NewWorld(size, size)
	if err := w.Fill(ram...); err != nil {
		t.Fatal(err)
	}
	round := func(i int) {
		dev := d.Add(ram[i%2], program.Queues(guest.QueueCounts()[i%len(guest.QueueCounts())], 1<<(i%8)))
		if err := direct.Scan(dev.Link, size, w.Disks[i%2].Compare); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		d.Remove(dev)
	}
	for i := range 4 {
		round(i)
	}
	before := d.Held()
	memory := d.Memory()
	rounds := int(guest.Span(20, 100))
	for i := range rounds {
		round(i)
	}
	d.Settled(before, 3)
	grown := d.Memory() - memory
	t.Logf("%d KiB more after %d rounds", grown>>10, rounds)
	if grown > 4<<20 {
		t.Errorf("%d bytes more memory", grown)
	}
	if left := guest.Entries("/dev/ublk-blksnap"); left > 1 {
		t.Errorf("%d links are left", left)
	}
	if left := guest.Entries(d.RunDir.State() + "/cbt"); left > 0 {
		t.Errorf("%d change maps are left", left)
	}
}

// TestSteadyState is I9 for a filter under load: after the first requests it
// takes no more memory, and starts no threads.
func TestSteadyState(t *testing.T) {
	guest.NeedEither(t)
	program.LeakTest(t)
	const size = 64 << 20
	ram := guest.RAMDisks(t, 1, size)[0]
	d := program.Start(t)
	dev := d.Add(ram, program.Queues(guest.QueueCounts()[len(guest.QueueCounts())-1], 64))
	w := stamp.NewWorld(size)
	stop := w.StartWriters(t, 3, stamp.Mix{Writers: 8, Zeroes: true, Largest: 64 << 10}, dev.Path)
	w.More(t, 2000)
	before, memory := d.Held(), d.Memory()
	n := int64(guest.Span(5000, 1000000))
	w.More(t, n)
	grown := d.Memory() - memory
	var after program.Held
	guest.WaitFor(t, "files that were open for a moment", func() bool {
		after = d.Held()
		return after.FDs <= before.FDs
	})
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d KiB more after %d writes", grown>>10, n)
	if grown > 1<<20 {
		t.Errorf("I9: %d bytes more memory after %d writes", grown, n)
	}
	if after.Threads > before.Threads+2 {
		t.Errorf("I9: now %+v, before %+v, after %d writes", after, before, n)
	}
	d.Remove(dev)
}

// TestKilledWhileSyncing: the daemon is killed while its disk, which is about to be
// removed, is made durable. That waits for the next daemon.
func TestKilledWhileSyncing(t *testing.T) {
	guest.Need(t)
	const size = 32 << 20
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "dm-delay")
	// Each write takes a second.
	disk := guest.DMDisk(t, "slow", fmt.Sprintf("0 %[2]d delay %[1]s 0 0 %[1]s 0 1000", guest.RAMDisks(t, 1, size)[0], size>>9))
	d := program.Start(t)
	dev := d.Add(disk)
	f, err := os.OpenFile(dev.Path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Write(make([]byte, 8<<20)) // to the page cache
	}
	if err != nil {
		t.Fatal(err)
	}
	removed := make(chan error, 1)
	go func() { removed <- d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name}) }()
	guest.WaitFor(t, "the sync", func() bool {
		st, err := d.DeviceStatus(guest.Context(t), dev.Name)
		return err == nil && st.InFlight > 0
	})
	d.Kill()
	<-removed
	d.Restart()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	d.Remove(dev)
}
