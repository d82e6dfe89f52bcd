package disk

import (
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Extent is a stretch of a disk, in bytes.
type Extent struct{ Offset, Length int64 }

// The FIEMAP request (linux/fiemap.h, linux/fs.h).
const (
	fsIocFiemap        = 0xc020660b // _IOWR('f', 11, struct fiemap)
	fiemapFlagSync     = 1
	fiemapExtentLast   = 1
	fiemapExtentNoDisk = 2 | 4 // unknown, delayed: no place on the disk yet
	fiemapExtentInline = 0x200 // lies among metadata
	fiemapBatch        = 256
)

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	start, length             uint64
	flags, mapped, count, gap uint32
	extents                   [fiemapBatch]fiemapExtent
}

// Extents says where a file's content lies: on which disk and in which
// stretches, in the order of the file. If the filesystem is on a partition,
// this is the whole disk. It works where a filesystem is on one disk and says
// where its files are; the error is an *Error with ErrUnknown otherwise.
func (h *Host) Extents(f *os.File) (*Disk, []Extent, error) {
	unknown := func(what string) error { return &Error{ErrUnknown, f.Name(), what, ""} }
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, nil, fmt.Errorf("look at %s: %w", f.Name(), err)
	}
	d, err := h.byNumber(blockdev.NumOf(st.Dev))
	if err != nil {
		return nil, nil, unknown("its filesystem is not on one disk")
	}
	base := int64(0)
	if d.Parent != "" {
		start, err := strconv.ParseInt(h.sysText("class/block", d.Name, "start"), 10, 64)
		whole, err2 := h.byNumber(h.wholeOf(d))
		if err != nil || err2 != nil {
			return nil, nil, unknown("the place of partition " + d.Node + " is not known")
		}
		base, d = start*sector.Size, whole
	}
	var out []Extent
	var m fiemap
	for {
		m.length, m.flags, m.count = ^uint64(0)-m.start, fiemapFlagSync, fiemapBatch
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m)))
		if errno != 0 {
			return nil, nil, unknown("its filesystem does not say where it lies: " + errno.Error())
		}
		for _, e := range m.extents[:m.mapped] {
			if e.flags&(fiemapExtentNoDisk|fiemapExtentInline) != 0 {
				return nil, nil, unknown("parts of it have no place of their own on the disk")
			}
			out = append(out, Extent{base + int64(e.physical), int64(e.length)})
			m.start = e.logical + e.length
			if e.flags&fiemapExtentLast != 0 {
				return d, out, nil
			}
		}
		if m.mapped == 0 {
			return d, out, nil
		}
	}
}
