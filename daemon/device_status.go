package daemon

import (
	"context"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Devices implements control.API.
func (d *Daemon) Devices(context.Context) ([]control.Device, error) {
	out := []control.Device{}
	for _, dev := range d.sortedDevices() {
		out = append(out, d.describe(dev))
	}
	return out, nil
}

func (d *Daemon) describe(dev *device) control.Device {
	d.mu.Lock()
	out := dev.Device
	d.mu.Unlock()
	out.Snapshots = d.holders(dev)
	return out
}

// DeviceStatus implements control.API.
func (d *Daemon) DeviceStatus(ctx context.Context, ref string) (control.DeviceStatus, error) {
	dev, release, err := d.hold(ref)
	if err != nil {
		return control.DeviceStatus{}, fail(err, "status of %s", ref)
	}
	defer release()
	s := control.DeviceStatus{Device: d.describe(dev), State: "unknown", Operations: map[string]control.Operation{}, Unregistered: dev.ublk.Unregistered()}
	if info, err := dev.ublk.Info(ctx); err == nil {
		s.State = info.State.String()
	}
	for q := range dev.Queues {
		c := dev.filter.Counters(q)
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
	if info, err := dev.cbt.Info(); err == nil {
		c := cbtInfo(info)
		c.History, c.PowerFailure = s.History, dev.powerFailure()
		s.CBT = &c
	}
	return s, nil
}
