package daemon

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
)

// A filter comes under a device-mapper device that is in use, and goes again, without its
// users noticing more than a pause. A private device gets the table of theirs, the filter
// stands over that, and one change of tables brings their requests to the filter:
//
//	before                 attached
//	/dev/vg/data           /dev/vg/data ──linear──> /dev/ublkbN ··> private
//	     │ table                                                       │ the same table
//	     v                                                             v
//	   disks                                                         disks
//
// The order is: private device, record, filter, table loaded, tables changed; and back in the
// same way. The kernel changes tables in one step, so whoever looks at the live table knows
// how far it came. A daemon that takes over after a death in the midst of it serves the
// filter, waits for the end of the process that was asked to change the tables, takes back a
// table that waits, and then goes by the live one (finishChange): the filter stays if
// requests come to it, and goes if not.
//
// All that may wait for a disk, which may be a filter of ours, is done by the prober.
//
// Others may change the table as well, as lvextend does. Then requests pass the filter by:
// see attach_watch.go.

// attachedUncovered is why there is no write-intent log: after a power failure the volume is
// in use before it could be attached again.
const attachedUncovered = "change tracking of a volume that was attached while in use begins anew at each attachment"

// attachedNote is the kind of such a filter in its note for udev, which makes no names for it
// and leaves it alone, because all that it holds is found on the public device.
const attachedNote = "attached"

// noteKind is what udev is told that the filter is.
func (dev *device) noteKind() string {
	if dev.attached != nil {
		return attachedNote
	}
	return "filter"
}

// attachment is what a device has that was attached.
type attachment struct {
	public  *disk.Disk // as its users know it
	device  dm.Device  // the same
	private dm.Device
	// changing: this daemon is changing the table, or has to find out how far one that died
	// came. Nothing can be said of the filter's map then.
	changing atomic.Bool
	orders   atomic.Int32 // to device-mapper, that are under way; see order
	// bypassed is why requests do not come to the filter any more, once that is known.
	bypassed atomic.Pointer[string]
	// again is when the watch may try again what it could not, in nanoseconds since 1970.
	again atomic.Int64
}

// attachRecord is what the next daemon has to know of it.
type attachRecord struct {
	Public  originalRecord `json:"public"`
	Device  dm.Device      `json:"device"`
	Private dm.Device      `json:"private"`
	// Changing: the tables are being changed. PID and Process are who may have been asked for
	// it, as in frozenRecord.
	Changing bool   `json:"changing,omitempty"`
	PID      int    `json:"pid,omitempty"`
	Process  string `json:"process,omitempty"`
}

// dmOwner tells private devices of this daemon and its successors from those of others.
func (d *Daemon) dmOwner() uint32 {
	sum := fnv.New32a()
	_, _ = sum.Write([]byte(d.opts.Dir))
	return sum.Sum32()
}

// newAttachment is that of a public device, whose private one there need not be yet.
func (d *Daemon) newAttachment(public *disk.Disk) *attachment {
	uuid := d.host.DMUUID(public)
	return &attachment{
		public:  public,
		device:  dm.Device{Num: public.Num, UUID: uuid, Name: public.DMName},
		private: dm.Device{Name: disk.PrivateName(public.Num), UUID: disk.PrivateUUID(d.dmOwner(), uuid, public.Num)},
	}
}

// shown is the disk by which people know the device.
func (dev *device) shown() *disk.Disk {
	if dev.attached != nil {
		return dev.attached.public
	}
	return dev.disk
}

// attach puts a filter under a public device; see add.
func (d *Daemon) attach(ctx context.Context, dev *device, r control.AddRequest) error {
	a := d.newAttachment(dev.disk)
	d.dropPrivate(a) // of a daemon that died
	made, err := d.order(ctx, a, dm.Order{Step: dm.StepMake, Device: a.private, From: a.device})
	deathpoint.Point()
	if err != nil {
		return err
	}
	a.private = made.Device
	a.changing.Store(true)
	dev.attached = a
	if dev.disk, err = d.privateDisk(a); err == nil {
		err = d.open(ctx, dev, r)
	}
	if err == nil {
		if err = d.insert(ctx, dev); err != nil {
			return d.withdraw(dev, err)
		}
	}
	if err != nil && dev.ublk == nil {
		d.dropPrivate(a)
	}
	return err
}

// privateDisk is the private device as the disk of a filter. Messages call it by the public
// one's name.
func (d *Daemon) privateDisk(a *attachment) (*disk.Disk, error) {
	bdev, err := d.host.ByNumber(a.private.Num)
	if err == nil {
		bdev.Path, bdev.DMName = a.public.Path, a.public.DMName
	}
	return bdev, err
}

// insert brings the requests of the public device to the filter.
func (d *Daemon) insert(ctx context.Context, dev *device) error {
	a := dev.attached
	d.step("attach %s: change its table", dev.Name)
	_, err := d.order(ctx, a, dm.Order{Step: dm.StepLoad, Device: a.device, From: a.private, To: dev.ublk.Num})
	deathpoint.Point()
	if errors.Is(err, unix.EBUSY) {
		return d.tablesError(dev, err)
	}
	if err == nil {
		err = d.swap(ctx, a, dev.ublk.Num)
	}
	if err != nil {
		if err = d.clearAfter(ctx, a, dev.ublk.Num, err); errors.Is(err, unix.EBUSY) {
			err = d.tablesError(dev, err)
		}
		return err
	}
	if state, err := d.tableState(a, dev.ublk.Num); err != nil || state != tableOurs {
		return errors.Join(tableChanging("another program has changed the table of %s at the same time", a.device), err)
	}
	a.changing.Store(false)
	if err := d.changeAttachRecord(dev, false); err != nil {
		d.opts.Log.Warn("not all of a device is on record", "name", dev.Name, "error", err)
	}
	return nil
}

// withdraw takes a device away that could not be inserted because of err. If it is not known
// how far that came, it stays until it is: then dev.ublk does.
func (d *Daemon) withdraw(dev *device, err error) error {
	if dev.attached.orders.Load() > 0 {
		return err
	}
	if e := d.giveBack(context.Background(), dev.attached, dev.ublk.Num); e != nil {
		return errors.Join(err, e)
	}
	if e := d.takeDown(dev, false); e != nil {
		return errors.Join(err, e)
	}
	dev.ublk = nil
	return err
}

// giveBack gives the public device the table that it had. The filter is of no use after that.
func (d *Daemon) giveBack(ctx context.Context, a *attachment, filter disk.Num) error {
	state, err := d.tableState(a, filter)
	if err != nil || state != tableOurs {
		return err
	}
	_, err = d.order(ctx, a, dm.Order{Step: dm.StepCopy, Device: a.device, From: a.private, To: filter})
	deathpoint.Point()
	if errors.Is(err, unix.EBUSY) {
		return err
	}
	if err == nil {
		err = d.swap(ctx, a, filter)
	}
	if err != nil {
		err = d.clearAfter(ctx, a, filter, err)
		if state, e := d.tableState(a, filter); e == nil && state != tableOurs {
			return nil
		}
	}
	return err
}

// detachTables is giveBack of a device, with a record of it.
func (d *Daemon) detachTables(ctx context.Context, dev *device) error {
	a := dev.attached
	d.step("detach %s: change its table", dev.Name)
	a.changing.Store(true)
	if err := d.changeAttachRecord(dev, true); err != nil {
		a.changing.Store(false)
		return err
	}
	err := d.giveBack(ctx, a, dev.ublk.Num)
	if err != nil {
		if a.orders.Load() == 0 { // else it is found out when what was begun has ended
			a.changing.Store(false)
			_ = d.changeAttachRecord(dev, false)
		}
		return d.tablesError(dev, err)
	}
	return nil
}

func (d *Daemon) tablesError(dev *device, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY): // dm.ErrChanging
		return tableChanging("%v", err)
	case !errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: fmt.Sprintf("the requests of %s that are under way do not end: %v", dev.Original, err),
		Fix: "nothing has changed; try again when the disk answers"}
}

// tableChanging is the error of whoever comes in the midst of another program's change of a
// table, and may try it again: EAGAIN.
func tableChanging(format string, args ...any) error {
	return &control.Error{Code: control.Busy, Errno: unix.EAGAIN, Message: fmt.Sprintf(format, args...), Fix: "try again when that is done"}
}

// swap makes the table that waits in the public device its live one. Its users wait
// meanwhile, as for a frozen filesystem.
func (d *Daemon) swap(ctx context.Context, a *attachment, filter disk.Num) error {
	_, err := d.order(ctx, a, dm.Order{Step: dm.StepSwap, Device: a.device, From: a.private, To: filter, Limit: d.opts.Config.FreezeTimeout})
	deathpoint.Point()
	return err
}

// clearTable takes back what this daemon, or one that died, has had wait in the public device.
func (d *Daemon) clearTable(ctx context.Context, a *attachment, filter disk.Num) (dm.Info, error) {
	return d.order(ctx, a, dm.Order{Step: dm.StepClear, Device: a.device, From: a.private, To: filter})
}

// clearAfter is clearTable after an order that failed with err. If that was because of another
// program, whose table may wait there now, this is not said twice.
func (d *Daemon) clearAfter(ctx context.Context, a *attachment, filter disk.Num, err error) error {
	_, e := d.clearTable(ctx, a, filter)
	if errors.Is(err, unix.EBUSY) && errors.Is(e, unix.EBUSY) {
		return err
	}
	return errors.Join(err, e)
}

// dropPrivate removes the private device, if it is there.
func (d *Daemon) dropPrivate(a *attachment) {
	for until := time.Now().Add(settleLimit); ; time.Sleep(20 * time.Millisecond) {
		_, err := d.order(context.Background(), a, dm.Order{Step: dm.StepRemove, Device: a.private})
		deathpoint.Point()
		switch {
		case err == nil, errors.Is(err, unix.ENXIO):
			return
		case errors.Is(err, unix.EBUSY) && time.Now().Before(until): // a passer-by
			continue
		}
		d.opts.Log.Warn("a private device stays, until its volume is attached again or a daemon starts", "device", a.private.String(), "error", err)
		return
	}
}

// order has the prober change one of the two devices of an attachment. Without a prober it is
// done here. Whoever asked for it may go away, but not what was begun. While something is under
// way that took too long, a.orders is not 0.
func (d *Daemon) order(ctx context.Context, a *attachment, o dm.Order) (dm.Info, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.opts.Config.DiskTimeout+o.Limit)
	defer cancel()
	type done struct {
		info dm.Info
		err  error
	}
	a.orders.Add(1)
	r, err := bounded.Call(ctx, func() (r done) {
		defer a.orders.Add(-1)
		r.err = disk.ErrGone
		if d.opts.Prober != nil {
			r.info, r.err = d.opts.Prober.DM(context.Background(), o)
		}
		if errors.Is(r.err, disk.ErrGone) {
			r.info, r.err = o.Do()
		}
		return r
	}, func(done) {})
	if err != nil {
		return dm.Info{}, fmt.Errorf("%s of %s: %w", o.Step, o.Device, err)
	}
	return r.info, r.err
}

// tableState is what the requests of a public device come to.
type tableState int

const (
	tableOurs  tableState = iota // our filter
	tableOther                   // something else
	tableGone                    // there is no such device any more
)

// tableState asks the kernel, which answers at once.
func (d *Daemon) tableState(a *attachment, filter disk.Num) (tableState, error) {
	type answer struct {
		state tableState
		err   error
	}
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	r, err := bounded.Call(ctx, func() (r answer) {
		r.state, r.err = lookAtTable(a, filter)
		return r
	}, func(answer) {})
	return r.state, errors.Join(r.err, err)
}

func lookAtTable(a *attachment, filter disk.Num) (tableState, error) {
	c, err := dm.Open()
	if err != nil {
		return tableOther, err
	}
	defer c.Close()
	i, err := c.Info(a.device)
	if errors.Is(err, unix.ENXIO) || err == nil && i.Num != a.device.Num {
		return tableGone, nil
	}
	var t dm.Table
	if err == nil {
		t, err = c.Live(a.device)
	}
	if err != nil {
		return tableOther, err
	}
	defer t.Wipe()
	if t.Is(dm.Linear(t.Size(), filter)) {
		return tableOurs, nil
	}
	return tableOther, nil
}

// attachedRecord is the record of a device that is being attached.
func (d *Daemon) attachedRecord(a *attachment) *attachRecord {
	r := &attachRecord{Public: originalOf(a.public), Device: a.device, Private: a.private}
	r.changes(d)
	return r
}

// changes notes that the tables are about to be changed, and by whom.
func (r *attachRecord) changes(d *Daemon) {
	r.Changing, r.PID = true, os.Getpid()
	if d.opts.Prober != nil {
		r.PID = d.opts.Prober.PID()
	}
	r.Process = processIdentity(r.PID)
}

// changeAttachRecord puts on record whether the tables of a device are being changed.
func (d *Daemon) changeAttachRecord(dev *device, changing bool) error {
	r, err := d.readDeviceRecord(dev.Name)
	if err != nil {
		return err
	}
	if r.Attached == nil {
		return fmt.Errorf("%s: it is not on record as attached", dev.Name)
	}
	if r.Attached.Changing = false; changing {
		r.Attached.changes(d)
	}
	err = d.writeDeviceRecord(r)
	deathpoint.Point()
	return err
}

// attachmentOf is what is on record of a device that a dead daemon had attached.
func (d *Daemon) attachmentOf(r *attachRecord) *attachment {
	a := &attachment{device: r.Device, private: r.Private}
	a.changing.Store(r.Changing)
	var err error
	if a.public, err = r.Public.find(d.host); err != nil { // it is gone, and the filter will go too
		n, _ := disk.ParseNum(r.Public.Number)
		a.public = &disk.Disk{Path: r.Public.Path, Name: r.Public.Name, Node: "/dev/" + r.Public.Name, Num: n, DMName: r.Device.Name}
	}
	return a
}

// attachmentOver is what lies over a filter of a dead daemon, of which nothing need be known
// but its number; nil if nothing does.
func (d *Daemon) attachmentOver(id int) (*attachment, disk.Num) {
	filter, err := d.host.Lookup("/dev/" + diskName(id))
	if err != nil {
		return nil, disk.Num{}
	}
	for _, public := range d.host.Holders(filter) {
		if public.DMName == "" {
			continue
		}
		a := d.newAttachment(public)
		if state, err := d.tableState(a, filter.Num); err == nil && state == tableOurs {
			return a, filter.Num
		}
	}
	return nil, disk.Num{}
}

// takeDownUsed removes a device whose requests do not end, so that its public device cannot
// have its table back before: they fail first.
func (d *Daemon) takeDownUsed(dev *device) error {
	dev.removing = true
	filter := dev.ublk.Num
	if err := d.removeUblk(dev.ublk, ""); err != nil {
		return d.removalError(dev, err)
	}
	if err := d.giveBack(context.Background(), dev.attached, filter); err != nil {
		return fmt.Errorf("%s cannot have its table back: %w", dev.attached.device, err)
	}
	return d.takeDown(dev, false)
}

// giveBackForced gives what lay over a filter that has gone the table of before, and removes
// the private device.
func (d *Daemon) giveBackForced(ctx context.Context, a *attachment, filter disk.Num) {
	if a == nil {
		return
	}
	if err := d.giveBack(ctx, a, filter); err != nil {
		d.opts.Log.Error("a volume cannot have its table back: its requests fail", "device", a.device.String(), "private", a.private.String(), "error", err)
		return
	}
	d.dropPrivate(a)
}

// dropPrivates removes the private devices that no device on record has.
func (d *Daemon) dropPrivates() {
	if len(d.damaged) > 0 {
		return // one may be of these
	}
	used := map[disk.Num]bool{}
	for _, dev := range d.sortedDevices() {
		used[dev.disk.Num] = true
	}
	for _, s := range append(d.sortedWaiting(), d.gone...) {
		if n, err := disk.ParseNum(s.record.Original.Number); err == nil {
			used[n] = true
		}
	}
	for _, a := range d.host.Attached() {
		private := dm.Device{Num: a.Private.Num, UUID: d.host.DMUUID(a.Private), Name: a.Private.DMName}
		if !used[private.Num] && disk.IsPrivate(d.dmOwner(), private.UUID) {
			d.dropPrivate(&attachment{private: private})
		}
	}
}
