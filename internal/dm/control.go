package dm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Control is device-mapper's door, /dev/mapper/control.
type Control struct{ file *os.File }

// Open opens it. If the kernel has no device-mapper, the error is os.ErrNotExist.
func Open() (*Control, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		err = fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open device-mapper: %w", err)
	}
	return &Control{f}, nil
}

// Close closes it.
func (c *Control) Close() { c.file.Close() }

// Device says which device is meant. With a UUID that is enough, because no two devices have
// the same; one without is meant by its number.
type Device struct {
	Num  blockdev.Num `json:"num"`
	UUID string       `json:"uuid,omitempty"`
	Name string       `json:"name,omitempty"` // for people
}

func (d Device) String() string {
	if d.Name != "" {
		return "/dev/mapper/" + d.Name
	}
	return "device-mapper device " + d.Num.String()
}

// Info is what the kernel says of a device.
type Info struct {
	Device
	Opens     int // how often it is open, mounted, or under another device
	Suspended bool
	ReadOnly  bool
	Live      bool // it has a live table
	Inactive  bool // and one that waits
}

// UdevFlags tell the rules of device-mapper for udev (DM_UDEV_… in libdevmapper.h) what to
// leave out.
type UdevFlags uint16

// Unseen has udev look for nothing on a device: no links by content, no volume and no array
// is put together from it, and systemd has no unit for it.
const Unseen UdevFlags = 1<<1 | 1<<2 | 1<<3 | 1<<6

// Version is that of the kernel's interface.
func (c *Control) Version() (v [3]uint32, err error) {
	r := newRequest(Device{})
	if err := c.do(uapi.DM_VERSION, r); err != nil {
		return v, fmt.Errorf("ask device-mapper for its version: %w", err)
	}
	return r.head().Version, nil
}

// Make makes a device with a name and a UUID that no other has, and gives it its table. It is
// there whole, or not at all.
func (c *Control) Make(name, uuid string, t Table, flags UdevFlags) (Info, error) {
	r := newRequest(Device{UUID: uuid})
	if len(name) >= uapi.DM_NAME_LEN || len(uuid) >= uapi.DM_UUID_LEN {
		return Info{}, fmt.Errorf("make /dev/mapper/%s: %w", name, unix.ENAMETOOLONG)
	}
	copy(r.head().Name[:], name)
	if err := c.do(uapi.DM_DEV_CREATE, r); err != nil {
		return Info{}, fmt.Errorf("make /dev/mapper/%s: %w", name, err)
	}
	made := r.info()
	err := c.Load(made.Device, t)
	if err == nil {
		r = newRequest(made.Device)
		r.head().EventNr = uint32(flags) << 16
		if err = c.do(uapi.DM_DEV_SUSPEND, r); err == nil {
			return r.info(), nil
		}
		err = fmt.Errorf("give %s its table: %w", made.Device, err)
	}
	return Info{}, errors.Join(err, c.Remove(made.Device))
}

// Remove removes a device that nobody has open; EBUSY.
func (c *Control) Remove(d Device) error {
	if err := c.do(uapi.DM_DEV_REMOVE, newRequest(d)); err != nil {
		return fmt.Errorf("remove %s: %w", d, err)
	}
	return nil
}

// Info says what a device is; ENXIO if there is none.
func (c *Control) Info(d Device) (Info, error) {
	r := newRequest(d)
	if err := c.do(uapi.DM_DEV_STATUS, r); err != nil {
		return Info{}, fmt.Errorf("look at %s: %w", d, err)
	}
	return r.info(), nil
}

// List is all devices, by number and name.
func (c *Control) List() ([]Device, error) {
	data, _, err := c.read(uapi.DM_LIST_DEVICES, Device{}, 0)
	if err != nil {
		return nil, fmt.Errorf("list the devices of device-mapper: %w", err)
	}
	const nameAt = unsafe.Offsetof(uapi.DMNameList{}.Next) + 4
	var out []Device
	for at := 0; at+int(nameAt) < len(data); {
		entry := data[at:]
		if n := blockdev.NumOf(binary.NativeEndian.Uint64(entry)); n != (blockdev.Num{}) { // else there are none
			out = append(out, Device{Num: n, Name: text(entry[nameAt:])})
		}
		next := int(binary.NativeEndian.Uint32(entry[unsafe.Offsetof(uapi.DMNameList{}.Next):]))
		if next == 0 {
			break
		}
		at += next
	}
	return out, nil
}

// Deps are the devices that the live table of a device lies on.
func (c *Control) Deps(d Device) ([]blockdev.Num, error) {
	data, _, err := c.read(uapi.DM_TABLE_DEPS, d, 0)
	if err != nil {
		return nil, fmt.Errorf("look what %s lies on: %w", d, err)
	}
	first := int(unsafe.Sizeof(uapi.DMTargetDeps{}))
	if len(data) < first {
		return nil, nil
	}
	var out []blockdev.Num
	for i := range int(binary.NativeEndian.Uint32(data)) {
		out = append(out, blockdev.NumOf(binary.NativeEndian.Uint64(data[first+8*i:])))
	}
	return out, nil
}

// Live is a device's table; empty if it has none.
func (c *Control) Live(d Device) (Table, error) { return c.table(d, 0) }

// Inactive is the table that a device has waiting; empty if there is none.
func (c *Control) Inactive(d Device) (Table, error) {
	i, err := c.Info(d)
	if err != nil || !i.Inactive {
		return nil, err
	}
	return c.table(d, uapi.DM_QUERY_INACTIVE_TABLE_FLAG)
}

func (c *Control) table(d Device, flags uint32) (Table, error) {
	// NOFLUSH: some targets would write their metadata first.
	data, n, err := c.read(uapi.DM_TABLE_STATUS, d, flags|uapi.DM_STATUS_TABLE_FLAG|uapi.DM_NOFLUSH_FLAG|uapi.DM_SECURE_DATA_FLAG)
	defer clear(data)
	var t Table
	if err == nil {
		t, err = decode(data, n)
	}
	if err != nil {
		return nil, fmt.Errorf("read the table of %s: %w", d, err)
	}
	return t, nil
}

// Load has a table wait, in place of one that waits already.
func (c *Control) Load(d Device, t Table) error {
	data, err := t.encode()
	if err == nil {
		r := newRequest(d, data...)
		clear(data)
		defer clear(r)
		r.head().TargetCount, r.head().Flags = uint32(len(t)), r.head().Flags|uapi.DM_SECURE_DATA_FLAG
		err = c.do(uapi.DM_TABLE_LOAD, r)
	}
	if err != nil {
		return fmt.Errorf("load a table into %s: %w", d, err)
	}
	return nil
}

// Clear removes the table that waits, if there is one.
func (c *Control) Clear(d Device) error {
	if err := c.do(uapi.DM_TABLE_CLEAR, newRequest(d)); err != nil {
		return fmt.Errorf("clear the table that waits in %s: %w", d, err)
	}
	return nil
}

// Swap puts the table that waits in the place of the live one; see the package's comment. If
// ctx ends first, the live one stays, and the other waits on. The filesystem on the device is
// not frozen for it.
func (c *Control) Swap(ctx context.Context, d Device) error {
	r := newRequest(d)
	r.head().Flags |= uapi.DM_SKIP_LOCKFS_FLAG
	err := c.wait(ctx, uapi.DM_DEV_SUSPEND, r)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("give %s its other table: %w", d, err)
	if i, e := c.Info(d); e == nil && i.Suspended && !i.Inactive && !errors.Is(err, context.DeadlineExceeded) {
		// The other table does not fit, and is gone. If one waits, somebody else has suspended the device.
		err = errors.Join(err, c.Resume(d))
	}
	return err
}

// SuspendOptions say what a suspend does to what is under way.
type SuspendOptions struct {
	NoFlush bool // it is not waited for where the target can hold it back
	LockFS  bool // the filesystem on the device is frozen first
}

// Suspend has all I/O of a device wait from now on, until Resume.
func (c *Control) Suspend(ctx context.Context, d Device, o SuspendOptions) error {
	r := newRequest(d)
	flags := uint32(uapi.DM_SUSPEND_FLAG)
	if o.NoFlush {
		flags |= uapi.DM_NOFLUSH_FLAG
	}
	if !o.LockFS {
		flags |= uapi.DM_SKIP_LOCKFS_FLAG
	}
	r.head().Flags |= flags
	if err := c.wait(ctx, uapi.DM_DEV_SUSPEND, r); err != nil {
		return fmt.Errorf("suspend %s: %w", d, err)
	}
	return nil
}

// Resume lets a suspended device go on, with the table that waits if there is one.
func (c *Control) Resume(d Device) error {
	if err := c.do(uapi.DM_DEV_SUSPEND, newRequest(d)); err != nil {
		return fmt.Errorf("resume %s: %w", d, err)
	}
	return nil
}

// request is a struct dm_ioctl and what follows it.
type request []byte

const headSize = int(unsafe.Sizeof(uapi.DMIoctl{}))

func newRequest(d Device, data ...byte) request {
	r := make(request, headSize+len(data))
	h := r.head()
	h.Version[0] = uapi.DM_VERSION_MAJOR
	h.DataSize, h.DataStart = uint32(len(r)), uint32(headSize)
	if d.UUID != "" {
		copy(h.UUID[:len(h.UUID)-1], d.UUID)
	} else {
		h.Dev = unix.Mkdev(d.Num.Major, d.Num.Minor)
	}
	copy(r[headSize:], data)
	return r
}

// head is its beginning. The allocator aligns what is as large as this for any type.
func (r request) head() *uapi.DMIoctl { return (*uapi.DMIoctl)(unsafe.Pointer(unsafe.SliceData(r))) }

func (r request) info() Info {
	h := r.head()
	return Info{
		Device:    Device{Num: blockdev.NumOf(h.Dev), UUID: text(h.UUID[:]), Name: text(h.Name[:])},
		Opens:     int(h.OpenCount),
		Suspended: h.Flags&uapi.DM_SUSPEND_FLAG != 0, ReadOnly: h.Flags&uapi.DM_READONLY_FLAG != 0,
		Live: h.Flags&uapi.DM_ACTIVE_PRESENT_FLAG != 0, Inactive: h.Flags&uapi.DM_INACTIVE_PRESENT_FLAG != 0,
	}
}

// do gives the command, again if a signal interrupts it.
func (c *Control) do(command uint, r request) error { return c.wait(context.Background(), command, r) }

// wait is do until ctx ends: then a signal interrupts the thread that waits in the kernel.
func (c *Control) wait(ctx context.Context, command uint, r request) error {
	if ctx.Done() != nil {
		if err := interruptible(); err != nil {
			return err
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread, ended, quiet := unix.Gettid(), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(quiet)
			interrupt(ctx, thread, ended)
		}()
		defer func() {
			close(ended)
			<-quiet
		}()
	}
	for ctx.Err() == nil {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, c.file.Fd(), uintptr(command), uintptr(unsafe.Pointer(unsafe.SliceData(r))))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
	return ctx.Err()
}

// read gives a command that answers with more than the request had, in as much memory as it
// takes. It returns what follows the head, and how many targets there are.
func (c *Control) read(command uint, d Device, flags uint32) ([]byte, uint32, error) {
	for size := 4096; ; size *= 4 {
		r := newRequest(d, make([]byte, size)...)
		r.head().Flags |= flags
		if err := c.do(command, r); err != nil {
			return nil, 0, err
		}
		if r.head().Flags&uapi.DM_BUFFER_FULL_FLAG == 0 {
			return r[r.head().DataStart:], r.head().TargetCount, nil
		}
		clear(r)
	}
}

// text is what precedes the byte of value 0.
func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}
