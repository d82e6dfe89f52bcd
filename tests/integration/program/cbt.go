package program

import (
	"bytes"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// CBT is what the daemon tells of a device's change map.
func (d *Daemon) CBT(dev control.Device) control.CBTInfo {
	d.t.Helper()
	i, err := d.CBTInfo(guest.Context(d.t), dev.Name)
	if err != nil {
		d.t.Fatal(err)
	}
	return i
}

// Map is a device's change map.
func (d *Daemon) Map(dev control.Device) []byte {
	d.t.Helper()
	var m bytes.Buffer
	i, err := d.CBTMap(guest.Context(d.t), dev.Name, &m)
	if err != nil || int64(m.Len()) != i.BlockCount {
		d.t.Fatalf("a map of %d bytes for %d blocks: %v", m.Len(), i.BlockCount, err)
	}
	return m.Bytes()
}

// Changes are the ranges that changed since a take.
func (d *Daemon) Changes(dev control.Device, since control.Take) (i control.CBTInfo, ranges []control.Range, err error) {
	i, err = d.CBTChanges(guest.Context(d.t), control.ChangesRequest{Device: dev.Name, Since: since}, func(x control.Range) error {
		ranges = append(ranges, x)
		return nil
	})
	return i, ranges, err
}

// Changed are the numbers of the blocks that changed between a take and the
// last one.
func (d *Daemon) Changed(dev control.Device, since control.Take) (blocks []int64, err error) {
	d.t.Helper()
	c, ranges, err := d.Changes(dev, since)
	if err != nil {
		return nil, err
	}
	for i, r := range ranges {
		at, n := int64(r.Sector)*stamp.SectorSize, int64(r.Count)*stamp.SectorSize
		if at%c.BlockSize != 0 || n <= 0 || n%c.BlockSize != 0 && at+n != c.DeviceCapacity {
			d.t.Errorf("range %v is not of blocks of %d", r, c.BlockSize)
		}
		if i > 0 && ranges[i-1].Sector+ranges[i-1].Count >= r.Sector {
			d.t.Errorf("ranges %v and %v are not in order and merged", ranges[i-1], r)
		}
		for b := at / c.BlockSize; b*c.BlockSize < at+n; b++ {
			blocks = append(blocks, b)
		}
	}
	return blocks, nil
}
