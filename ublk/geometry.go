package ublk

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Geometry is the shape of a disk, as its users see it. All sizes are in bytes.
type Geometry struct {
	Size          int64
	LogicalBlock  int // smallest request
	PhysicalBlock int // smallest request without a read-modify-write in the disk
	IOMin         int // smallest request that performs well; 0 unknown
	IOOpt         int // best size of a request; 0 unknown

	MaxDiscard         int64 // largest discard; 0: none
	DiscardGranularity int64
	DiscardAlignment   int64 // of the first granule
	MaxWriteZeroes     int64 // largest write-zeroes; 0: none

	Rotational    bool
	VolatileCache bool // completed writes need a flush to be durable
	FUA           bool // a write can be made durable by itself
	ReadOnly      bool

	// DMAMask has the bits that must be 0 in the addresses of payloads.
	// VirtBoundaryMask has those that must be 0 where a payload's inner segments
	// meet. Both matter only if payloads go to the disk as they come.
	DMAMask          int64
	VirtBoundaryMask int64

	// StableWrites: a payload must not change while it is being written, because the
	// disk makes a checksum or parity of it. The driver cannot promise that for the
	// pages of a request, so they are copied.
	StableWrites bool
}

// ErrZoned: the disk is zoned, which cannot be passed through.
var ErrZoned = errors.New("zoned disks are not supported")

// ReadGeometry is the Geometry of the block device, a disk or a partition, at
// path.
func ReadGeometry(path string) (Geometry, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Geometry{}, fmt.Errorf("read geometry of %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Geometry{}, fmt.Errorf("read geometry of %s: %w", path, unix.ENOTBLK)
	}
	return readGeometry("/sys", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

// readGeometry is ReadGeometry for a device number, from the sysfs at sys.
func readGeometry(sys string, major, minor uint32) (Geometry, error) {
	name := fmt.Sprintf("%d:%d", major, minor)
	dir, err := filepath.EvalSymlinks(filepath.Join(sys, "dev/block", name))
	if err != nil {
		return Geometry{}, fmt.Errorf("read geometry of block device %s: %w", name, err)
	}
	r := sysReader{dir: dir, queue: filepath.Join(dir, "queue")}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		// A partition has its disk's queue, and its own size and alignment.
		r.queue = filepath.Join(filepath.Dir(dir), "queue")
	}
	g := Geometry{
		Size:               r.number(r.dir, "size", required) * sector.Size,
		LogicalBlock:       int(r.number(r.queue, "logical_block_size", required)),
		PhysicalBlock:      int(r.number(r.queue, "physical_block_size", 0)),
		IOMin:              int(r.number(r.queue, "minimum_io_size", 0)),
		IOOpt:              int(r.number(r.queue, "optimal_io_size", 0)),
		MaxDiscard:         r.number(r.queue, "discard_max_bytes", 0),
		DiscardGranularity: r.number(r.queue, "discard_granularity", 0),
		DiscardAlignment:   r.number(r.dir, "discard_alignment", 0),
		MaxWriteZeroes:     r.number(r.queue, "write_zeroes_max_bytes", 0),
		Rotational:         r.number(r.queue, "rotational", 0) != 0,
		FUA:                r.number(r.queue, "fua", 0) != 0,
		ReadOnly:           r.number(r.dir, "ro", required) != 0,
		DMAMask:            r.number(r.queue, "dma_alignment", sector.Size-1),
		VirtBoundaryMask:   r.number(r.queue, "virt_boundary_mask", 0),
		StableWrites:       r.number(r.queue, "stable_writes", 0) != 0,
	}
	g.VolatileCache = r.text(r.queue, "write_cache") == "write back"
	if r.err != nil {
		return Geometry{}, fmt.Errorf("read geometry of block device %s: %w", name, r.err)
	}
	if z := r.text(r.queue, "zoned"); z != "" && z != "none" {
		return Geometry{}, fmt.Errorf("read geometry of block device %s: %s: %w", name, z, ErrZoned)
	}
	return g, nil
}

// required says that an attribute has no default.
const required = -1

// sysReader reads attributes and keeps the first error.
type sysReader struct {
	dir, queue string
	err        error
}

func (r *sysReader) text(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// number is an attribute; def if the kernel does not have it.
func (r *sysReader) number(dir, name string, def int64) int64 {
	s := r.text(dir, name)
	if s == "" && def != required {
		return def
	}
	// Some drivers report limits of 2^63 and more.
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("attribute %s: %q is no number", name, s)
	}
	return int64(min(v, math.MaxInt64))
}

const (
	// maxRangeSectors is the longest discard or write-zeroes: its length in
	// bytes must fit into 32 bits.
	maxRangeSectors = math.MaxUint32 >> sector.Shift
	// maxIOLimit is the largest payload of the driver.
	maxIOLimit = 1 << uapi.UBLK_IO_BUF_BITS
)

// params is the Geometry in the driver's terms, for a device whose requests are at
// most maxIO bytes. With zeroCopy payloads reach the disk as they come, so the device
// has the disk's demands on memory.
func (g *Geometry) params(maxIO int, zeroCopy bool) (uapi.UblkParams, error) {
	page := os.Getpagesize()
	fail := func(format string, args ...any) (uapi.UblkParams, error) {
		return uapi.UblkParams{}, fmt.Errorf("ublk parameters: "+format, args...)
	}
	if maxIO < page || maxIO > maxIOLimit || maxIO%page != 0 {
		return fail("largest request of %d bytes: want a multiple of %d up to %d", maxIO, page, maxIOLimit)
	}
	if g.Size < sector.Size || g.Size%sector.Size != 0 {
		return fail("size of %d bytes: want a multiple of %d", g.Size, sector.Size)
	}
	logical, ok := exactShift(int64(g.LogicalBlock))
	if !ok || logical < 9 || g.LogicalBlock > page {
		return fail("logical blocks of %d bytes: want a power of two from %d to %d", g.LogicalBlock, sector.Size, page)
	}
	physical, ok := exactShift(int64(g.PhysicalBlock))
	if !ok || physical < logical {
		physical = logical
	}
	p := uapi.UblkParams{
		Len:   uint32(unsafe.Sizeof(uapi.UblkParams{})),
		Types: uapi.UBLK_PARAM_TYPE_BASIC,
		Basic: uapi.UblkParamBasic{
			LogicalBsShift:  logical,
			PhysicalBsShift: physical,
			IOMinShift:      max(hintShift(g.IOMin), physical),
			// 2^0 bytes: the kernel rounds it down to "unknown".
			IOOptShift: hintShift(g.IOOpt),
			MaxSectors: uint32(maxIO / sector.Size),
			DevSectors: uint64(g.Size / sector.Size),
		},
	}
	b := &p.Basic
	if g.ReadOnly {
		b.Attrs |= uapi.UBLK_ATTR_READ_ONLY
	}
	if g.Rotational {
		b.Attrs |= uapi.UBLK_ATTR_ROTATIONAL
	}
	if g.VolatileCache {
		b.Attrs |= uapi.UBLK_ATTR_VOLATILE_CACHE
		if g.FUA {
			b.Attrs |= uapi.UBLK_ATTR_FUA
		}
	}
	if g.MaxDiscard > 0 || g.MaxWriteZeroes > 0 {
		p.Types |= uapi.UBLK_PARAM_TYPE_DISCARD
		p.Discard = uapi.UblkParamDiscard{
			// The driver takes no zero here, whether or not there is discard.
			DiscardGranularity:    uint32(min(max(g.DiscardGranularity, int64(g.LogicalBlock)), math.MaxInt32)),
			DiscardAlignment:      uint32(min(g.DiscardAlignment, math.MaxInt32)),
			MaxDiscardSectors:     rangeSectors(g.MaxDiscard, g.LogicalBlock),
			MaxWriteZeroesSectors: rangeSectors(g.MaxWriteZeroes, g.LogicalBlock),
			MaxDiscardSegments:    1,
		}
	}
	if zeroCopy {
		if g.DMAMask > 0 && g.DMAMask < int64(page) && g.DMAMask&(g.DMAMask+1) == 0 {
			p.Types |= uapi.UBLK_PARAM_TYPE_DMA_ALIGN
			p.DMA.Alignment = uint32(g.DMAMask)
		}
		b.VirtBoundaryMask = uint64(g.VirtBoundaryMask)
	}
	return p, nil
}

// rangeSectors is the limit of n bytes in sectors: at most what the driver
// can take, and whole logical blocks.
func rangeSectors(n int64, logical int) uint32 {
	n = min(n, maxRangeSectors*sector.Size)
	return uint32(n / int64(logical) * int64(logical) / sector.Size)
}

// exactShift is log2 of n, which must be a power of two.
func exactShift(n int64) (uint8, bool) {
	if n <= 0 || n&(n-1) != 0 {
		return 0, false
	}
	return uint8(bits.TrailingZeros64(uint64(n))), true
}

// hintShift is log2 of the largest power of two that divides n: requests that
// are multiples of n (a stripe of three disks, say) are multiples of that too.
func hintShift(n int) uint8 {
	if n <= 0 {
		return 0
	}
	return uint8(min(bits.TrailingZeros64(uint64(n)), 30))
}
