package attach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

const diskSize = 4 << 20

// controlDM opens device-mapper.
func controlDM(t *testing.T) *dm.Control {
	t.Helper()
	guest.Run(t, "modprobe", "dm-mod")
	c, err := dm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// makeDM makes a device that goes with the test.
func makeDM(t *testing.T, c *dm.Control, name string, table dm.Table) dm.Info {
	t.Helper()
	i, err := c.Make(name, "TEST-"+name, table, dm.Unseen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		guest.WaitFor(t, "the end of "+name, func() bool { return !errors.Is(c.Remove(i.Device), unix.EBUSY) })
	})
	return i
}

func numOf(t testing.TB, node string) blockdev.Num {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		t.Fatal(err)
	}
	return blockdev.NumOf(st.Rdev)
}

func node(i dm.Info) string { return fmt.Sprintf("/dev/dm-%d", i.Num.Minor) }

// TestDM: each call does what the package says, and its error names the device.
func TestDM(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	disks := guest.RAMDisks(t, 2, diskSize)
	nums := []blockdev.Num{numOf(t, disks[0]), numOf(t, disks[1])}
	for i, disk := range disks {
		if err := os.WriteFile(disk, bytes.Repeat([]byte{byte('a' + i)}, diskSize), 0); err != nil {
			t.Fatal(err)
		}
	}
	if v, err := c.Version(); err != nil || v[0] != 4 {
		t.Fatalf("version %v, %v", v, err)
	}
	first, second := dm.Linear(diskSize, nums[0]), dm.Linear(diskSize, nums[1])
	dev := makeDM(t, c, "test-dm", first)
	if dev.UUID != "TEST-test-dm" || dev.Name != "test-dm" || !dev.Live || dev.Inactive || dev.Suspended || dev.Opens != 0 || dev.ReadOnly {
		t.Errorf("made: %+v", dev)
	}
	shows := func(what string, want byte) {
		t.Helper()
		f := direct.MustOpen(t, node(dev), unix.O_RDONLY)
		defer f.Close()
		b := direct.Pages(t, 4096)
		if err := f.ReadAt(b, diskSize/2); err != nil || b[17] != want {
			t.Errorf("%s: it shows %c, %v; want %c", what, b[17], err, want)
		}
	}
	shows("made", 'a')

	all, err := c.List()
	if err != nil || !slices.Contains(all, dm.Device{Num: dev.Num, Name: dev.Name}) {
		t.Errorf("list %+v, %v", all, err)
	}
	deps, err := c.Deps(dev.Device)
	if err != nil || !slices.Equal(deps, nums[:1]) {
		t.Errorf("lies on %v, %v", deps, err)
	}
	tableIs := func(what string, get func(dm.Device) (dm.Table, error), want dm.Table) {
		t.Helper()
		if got, err := get(dev.Device); err != nil || !got.Is(want) || got.Size() != want.Size() {
			t.Errorf("%s: table %+v, %v; want %+v", what, got, err, want)
		}
	}
	tableIs("made", c.Live, first)
	tableIs("made", c.Inactive, nil)
	// A stretch of each, so that there are several targets.
	half := uint64(diskSize / 2 / 512)
	two := dm.Table{
		{Length: half, Type: "linear", Args: fmt.Appendf(nil, "%s %d", nums[1], half)},
		{Start: half, Length: half, Type: "linear", Args: fmt.Appendf(nil, "%s 0", nums[0])},
	}
	if err := c.Load(dev.Device, two); err != nil {
		t.Fatal(err)
	}
	tableIs("loaded", c.Live, first)
	tableIs("loaded", c.Inactive, two)
	if err := c.Clear(dev.Device); err != nil {
		t.Fatal(err)
	}
	tableIs("cleared", c.Inactive, nil)
	// So many that the answer does not fit at once.
	var many dm.Table
	for i := range uint64(200) {
		many = append(many, dm.Target{Start: i, Length: 1, Type: "linear", Args: fmt.Appendf(nil, "%s %d", nums[0], i)})
	}
	if err := c.Load(dev.Device, many); err != nil {
		t.Fatal(err)
	}
	tableIs("many targets", c.Inactive, many)

	if err := c.Load(dev.Device, second); err != nil {
		t.Fatal(err)
	}
	shows("loaded", 'a')
	if err := c.Swap(guest.Context(t), dev.Device); err != nil {
		t.Fatal(err)
	}
	shows("swapped", 'b')
	tableIs("swapped", c.Live, second)
	tableIs("swapped", c.Inactive, nil)
	byNumber := dm.Device{Num: dev.Num}
	// An order leaves a device alone with which another program is not done, or to which it has
	// given another table.
	own := makeDM(t, c, "test-own", second)
	left := func(what string) {
		t.Helper()
		for _, o := range []dm.Order{{Step: dm.StepLoad, Device: dev.Device, From: own.Device, To: nums[0]}, {Step: dm.StepCopy, Device: dev.Device, From: own.Device, To: nums[1]}} {
			if _, err := o.Do(); !errors.Is(err, dm.ErrChanging) || !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "/dev/mapper/test-dm") {
				t.Errorf("%s of %s: %v", o.Step, what, err)
			}
		}
	}
	if err := c.Load(dev.Device, two); err != nil {
		t.Fatal(err)
	}
	left("a device with a table that waits")
	back := dm.Order{Step: dm.StepClear, Device: dev.Device, From: own.Device, To: nums[0]}
	if _, err := back.Do(); !errors.Is(err, dm.ErrChanging) {
		t.Errorf("clear of a table of somebody else: %v", err)
	}
	tableIs("left alone", c.Inactive, two)
	for _, from := range []dm.Device{{UUID: "TEST-gone"}, own.Device} {
		if err := c.Load(dev.Device, first); err != nil {
			t.Fatal(err)
		}
		back.From = from
		if _, err := back.Do(); err != nil {
			t.Errorf("clear of the orders' own table: %v", err)
		}
		tableIs("cleared", c.Inactive, nil)
	}
	for _, live := range []dm.Table{first, two} {
		if err := errors.Join(c.Load(dev.Device, live), c.Swap(guest.Context(t), dev.Device)); err != nil {
			t.Fatal(err)
		}
		left("a device with another table")
		tableIs("with another table", c.Live, live)
		tableIs("with another table", c.Inactive, nil)
	}
	if err := errors.Join(c.Load(dev.Device, second), c.Swap(guest.Context(t), dev.Device)); err != nil {
		t.Fatal(err)
	}
	for _, o := range []dm.Order{{Step: dm.StepLoad, Device: dev.Device, From: own.Device, To: nums[0]}, {Step: dm.StepCopy, Device: dev.Device, From: own.Device, To: nums[1]}} {
		if _, err := o.Do(); err != nil {
			t.Errorf("%s of a device with the table that it should have: %v", o.Step, err)
		}
		if _, err := back.Do(); err != nil {
			t.Errorf("clear after %s: %v", o.Step, err)
		}
		tableIs("cleared after "+string(o.Step), c.Inactive, nil)
	}
	// Nor does it swap what another program has waiting, or has suspended meanwhile, and it resumes
	// only where nothing waits.
	swap := dm.Order{Step: dm.StepSwap, Device: dev.Device, From: own.Device, To: nums[0], Limit: time.Minute}
	resume := dm.Order{Step: dm.StepResume, Device: dev.Device}
	for _, x := range []struct {
		live, waits dm.Table
		suspended   bool
	}{
		{second, nil, false}, {second, two, false}, {two, first, false},
		{second, nil, true}, {second, two, true}, {second, first, true},
	} {
		what := fmt.Sprintf("live %v, waits %v, suspended %v", x.live, x.waits, x.suspended)
		err := errors.Join(c.Load(dev.Device, x.live), c.Swap(guest.Context(t), dev.Device))
		if x.waits != nil {
			err = errors.Join(err, c.Load(dev.Device, x.waits))
		}
		if x.suspended {
			err = errors.Join(err, c.Suspend(guest.Context(t), dev.Device, dm.SuspendOptions{LockFS: true}))
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := swap.Do(); !errors.Is(err, dm.ErrChanging) || !strings.Contains(err.Error(), "/dev/mapper/test-dm") {
			t.Errorf("swap, %s: %v", what, err)
		}
		stays := x.suspended && x.waits != nil
		if i, err := resume.Do(); errors.Is(err, dm.ErrChanging) != stays || err == nil && i.Suspended {
			t.Errorf("resume, %s: %+v, %v", what, i, err)
		}
		if i, err := c.Info(dev.Device); err != nil || i.Suspended != stays {
			t.Errorf("after both, %s: %+v, %v", what, i, err)
		}
		tableIs("after both, "+what, c.Live, x.live)
		tableIs("after both, "+what, c.Inactive, x.waits)
		if err := errors.Join(c.Clear(dev.Device), c.Resume(dev.Device)); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct {
		step dm.Step
		live dm.Table
	}{{dm.StepLoad, first}, {dm.StepCopy, second}} {
		if _, err := (dm.Order{Step: x.step, Device: dev.Device, From: own.Device, To: nums[0]}).Do(); err != nil {
			t.Error(err)
		}
		if _, err := swap.Do(); err != nil {
			t.Errorf("swap after %s: %v", x.step, err)
		}
		tableIs("swapped after "+string(x.step), c.Live, x.live)
		tableIs("swapped after "+string(x.step), c.Inactive, nil)
	}
	if i, err := c.Info(byNumber); err != nil || i.Device != dev.Device || i.Suspended {
		t.Errorf("by its number: %+v, %v", i, err)
	}

	for _, o := range []dm.SuspendOptions{{}, {NoFlush: true}, {LockFS: true}, {NoFlush: true, LockFS: true}} {
		if err := c.Suspend(guest.Context(t), byNumber, o); err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		if i, err := c.Info(byNumber); err != nil || !i.Suspended {
			t.Errorf("%+v: %+v, %v", o, i, err)
		}
		left("a suspended device")
		if err := c.Resume(byNumber); err != nil {
			t.Fatal(err)
		}
	}
	shows("resumed", 'b')

	fails := func(what string, err error, errno unix.Errno, named string) {
		t.Helper()
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), named) {
			t.Errorf("%s: %v; want %v and %s", what, err, errno, named)
		}
	}
	f, err := os.Open(node(dev))
	if err != nil {
		t.Fatal(err)
	}
	if i, err := c.Info(dev.Device); err != nil || i.Opens != 1 {
		t.Errorf("open: %+v, %v", i, err)
	}
	fails("remove what is open", c.Remove(dev.Device), unix.EBUSY, "/dev/mapper/test-dm")
	f.Close()
	_, err = c.Make("test-dm", "TEST-other", first, 0)
	fails("a name that is taken", err, unix.EBUSY, "/dev/mapper/test-dm")
	_, err = c.Make("test-other", "TEST-bad", dm.Table{{Length: 8, Type: "nonsense"}}, 0)
	fails("a table that is none", err, unix.EINVAL, "/dev/mapper/test-other")
	if _, err = c.Info(dm.Device{UUID: "TEST-bad"}); !errors.Is(err, unix.ENXIO) {
		t.Errorf("a device that could not be made whole is there: %v", err)
	}
	_, err = c.Make(strings.Repeat("n", 128), "TEST-long", first, 0)
	fails("a long name", err, unix.ENAMETOOLONG, "nnn")
	gone := dm.Device{Num: blockdev.Num{Major: dev.Num.Major, Minor: 1000}}
	for what, err := range map[string]error{"swap": c.Swap(guest.Context(t), gone), "load": c.Load(gone, first), "clear": c.Clear(gone), "remove": c.Remove(gone)} {
		fails(what+" what is not there", err, unix.ENXIO, gone.Num.String())
	}
}

// TestSwapGivesUp: a swap of a device whose disk does not answer ends in time, and what was
// under way goes on on the old table.
func TestSwapGivesUp(t *testing.T) {
	guest.Need(t)
	c := controlDM(t)
	disks := guest.RAMDisks(t, 2, diskSize)
	lower := makeDM(t, c, "test-lower", dm.Linear(diskSize, numOf(t, disks[0])))
	dev := makeDM(t, c, "test-upper", dm.Linear(diskSize, lower.Num))
	if err := c.Load(dev.Device, dm.Linear(diskSize, numOf(t, disks[1]))); err != nil {
		t.Fatal(err)
	}
	if err := c.Suspend(guest.Context(t), lower.Device, dm.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Resume(lower.Device) })
	write := func(at int64) <-chan error {
		done := make(chan error, 1)
		f := direct.MustOpen(t, node(dev), unix.O_RDWR)
		b := direct.Pages(t, 4096)
		copy(b, "written")
		go func() {
			done <- f.WriteAt(b, at)
			f.Close()
		}()
		return done
	}
	before := write(0)
	guest.WaitFor(t, "a write under way", func() bool {
		b, err := os.ReadFile("/sys/block/dm-" + fmt.Sprint(dev.Num.Minor) + "/inflight")
		fields := strings.Fields(string(b))
		return err == nil && len(fields) == 2 && fields[1] != "0"
	})
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	err := c.Swap(ctx, dev.Device)
	cancel()
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "/dev/mapper/test-upper") {
		t.Errorf("swap: %v", err)
	}
	if i, err := c.Info(dev.Device); err != nil || i.Suspended || !i.Inactive {
		t.Errorf("after the swap that gave up: %+v, %v", i, err)
	}
	during := write(4096)
	if err := c.Resume(lower.Device); err != nil {
		t.Fatal(err)
	}
	for _, w := range []<-chan error{before, during} {
		if err := <-w; err != nil {
			t.Errorf("write: %v", err)
		}
	}
	if err := c.Swap(guest.Context(t), dev.Device); err != nil {
		t.Errorf("swap of a disk that answers again: %v", err)
	}
	if err := <-write(8192); err != nil {
		t.Error(err)
	}
	for i, want := range []string{"written", "\x00"} {
		f := direct.MustOpen(t, disks[i], unix.O_RDONLY)
		b := direct.Pages(t, 12288)
		if err := f.ReadAt(b, 0); err != nil || !bytes.HasPrefix(b, []byte(want)) || !bytes.HasPrefix(b[4096:], []byte(want)) {
			t.Errorf("disk %d: %q %q, %v", i, b[:8], b[4096:4104], err)
		}
		if at8k := bytes.HasPrefix(b[8192:], []byte("written")); at8k != (i == 1) {
			t.Errorf("disk %d: what was written after the swap: %v", i, at8k)
		}
		f.Close()
	}
}
