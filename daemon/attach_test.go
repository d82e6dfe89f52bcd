package daemon

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

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
