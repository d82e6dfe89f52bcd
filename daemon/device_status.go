package daemon

import (
	"context"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Devices implements control.API.
func (d *Daemon) Devices(context.Context) ([]control.Device, error) {
	out := []control.Device{}
	for _, v := range d.sorted() {
		out = append(out, d.describe(v))
	}
	return out, nil
}

func (d *Daemon) describe(v *device) control.Device {
	x := v.Device
	x.Snapshots = d.holding(v)
	return x
}

// DeviceStatus implements control.API.
func (d *Daemon) DeviceStatus(ctx context.Context, ref string) (control.DeviceStatus, error) {
	v, release, err := d.hold(ref)
	if err != nil {
		return control.DeviceStatus{}, fail(err, "status of %s", ref)
	}
	defer release()
	s := control.DeviceStatus{Device: d.describe(v), State: "unknown", Operations: map[string]control.Operation{}, Unregistered: v.dev.Unregistered()}
	if i, err := v.dev.Info(ctx); err == nil {
		s.State = i.State.String()
	}
	for q := range v.Queues {
		c := v.filter.Counters(q)
		for op := ublk.OpRead; op <= ublk.OpWriteZeroes; op++ {
			o := s.Operations[op.String()]
			o.Requests += c.Requests[op].Load()
			o.Bytes += c.Bytes[op].Load()
			s.Operations[op.String()] = o
		}
		s.Errors += c.Errors.Load()
		s.InFlight += c.InFlight.Load()
		s.DiscardsSkipped += c.Skipped.Load()
	}
	if i, err := v.cbt.Info(); err == nil {
		c := cbtInfo(i)
		s.CBT = &c
	}
	return s, nil
}
