package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// TestDeathInGrow: the daemon dies while it has a filter grow, under a snapshot. The next one
// has it grow to the end, all of the disk counts as changed, and it says why.
func TestDeathInGrow(t *testing.T) {
	guest.NeedKernel(t, 6, 16, "UPDATE_SIZE")
	v := newVictim(t)
	text, err := os.ReadFile("/sys/block/" + filepath.Base(v.disk) + "/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	file := strings.TrimSpace(string(text))
	resize := func(size int64) {
		t.Helper()
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
		guest.Run(t, "losetup", "-c", v.disk)
	}
	const grown = 2 * victimSize
	everyStepOf(t, 10, 0, func(n int) bool {
		v.dies(n)
		dev := v.device()
		v.write(uint64(n))
		s := v.Take(64<<10, dev)
		before := v.CBT(dev)
		died := v.try(func() error {
			resize(grown)
			guest.WaitFor(t, "the growth, or the death", func() bool {
				i, err := v.CBTInfo(guest.Context(t), dev.Name)
				return v.Ended(0) || err == nil && guest.SizeOf(t, dev.Path) == grown && i.History.Reason == control.HistoryOtherSize && i.PowerFailure.Covered
			})
			return nil
		})
		guest.WaitFor(t, "the growth", func() bool { return guest.SizeOf(t, dev.Path) == grown })
		guest.WaitFor(t, "a new generation, and why", func() bool {
			now := v.CBT(dev)
			return now.GenerationID != before.GenerationID && now.DeviceCapacity == grown && now.History.Reason == control.HistoryOtherSize
		})
		v.shows(s.Images[0].Path, uint64(n))
		f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
		if err := f.WriteAt(direct.Pages(t, 8192), victimSize-4096); err != nil {
			t.Errorf("n = %d: a write across the end of before: %v", n, err)
		}
		f.Close()
		v.shows(s.Images[0].Path, uint64(n))
		v.clean()
		resize(victimSize)
		return died
	})
}
