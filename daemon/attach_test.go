package daemon

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestPassedBy: once it is known that requests pass a filter by, its change map has another
// generation, and whoever asks for the device or for a snapshot of it is told, before these end.
func TestPassedBy(t *testing.T) {
	d, dev, s := measured(t)
	d.events = newEventLog()
	now := time.Now()
	s.taken = &now
	dev.attached = &attachment{}
	dev.attached.changing.Store(true) // so that nobody asks the kernel
	before := dev.cbt.Last().GenerationID
	if got := d.describeSnapshot(s); got.State != control.SnapshotTaken || got.Errno != 0 {
		t.Errorf("before: %+v", got)
	}
	dev.attached.changing.Store(false)
	d.bypass(dev, tableOther)
	if got := d.describeSnapshot(s); got.State != control.SnapshotCorrupted || got.Errno == 0 {
		t.Errorf("the snapshot: %+v", got)
	}
	if got := d.describe(dev); !strings.Contains(got.Attention, "do not come to the filter") {
		t.Errorf("the device: %+v", got)
	}
	if dev.cbt.Last().GenerationID == before {
		t.Error("the change map goes on")
	}
	d.tellBroken(s, d.passedBy(s))
	var kinds []string
	for _, e := range d.events.recent {
		kinds = append(kinds, e.Kind)
	}
	if want := []string{control.EventNewGeneration, control.EventCorrupted}; !slices.Equal(kinds, want) {
		t.Errorf("events %q, want %q", kinds, want)
	}
}

// TestAttachMode: what is no way to attach is refused, and not taken for another.
func TestAttachMode(t *testing.T) {
	d := &Daemon{opts: Options{Config: DefaultConfig()}}
	for mode, good := range map[control.AttachMode]bool{control.AttachInUse: true, control.AttachAlways: true, control.AttachPossible: true, control.AttachNever: true, "sideways": false, "Never": false} {
		err := d.applyDefaults(&control.AddRequest{Path: "/dev/none", Queues: 1, Depth: 1, Attach: mode})
		if (err == nil) != good || err != nil && control.CodeOf(err) != control.Invalid {
			t.Errorf("%q: %v", mode, err)
		}
	}
}
