package cbtmap

import (
	"errors"
	"fmt"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

const (
	minShift = sector.Shift // a block is at least a sector
	maxShift = 31           // and its size fits the 32 bits readers have for it

	maxBlocks = 1<<32 - 1 // as does their number
)

// ErrParams is wrapped by the errors for Params that cannot be met.
var ErrParams = errors.New("impossible change tracking parameters")

// ErrSize is wrapped by the errors for a device size that cannot be tracked.
var ErrSize = errors.New("impossible device size")

// Params choose the block size of a map. It is the smallest power of two, from
// 1<<MinimumShift bytes up, that needs no more than MaximumCount blocks; and
// 1<<MaximumShift if none does: then there are more than MaximumCount blocks.
type Params struct {
	MinimumShift uint8 // 9 to 31
	MaximumShift uint8 // MinimumShift to 31
	MaximumCount int64 // blocks, at least 1
}

// DefaultParams are blksnap's: blocks of 64 KiB to 64 MiB, 2 Mi of them.
func DefaultParams() Params {
	return Params{MinimumShift: 16, MaximumShift: 26, MaximumCount: 2097152}
}

// Validate says what makes p impossible, wrapping ErrParams.
func (p Params) Validate() error {
	switch {
	case p.MinimumShift < minShift || p.MinimumShift > maxShift:
		return fmt.Errorf("%w: minimum shift %d is not within %d to %d", ErrParams, p.MinimumShift, minShift, maxShift)
	case p.MaximumShift > maxShift:
		return fmt.Errorf("%w: maximum shift %d is above %d", ErrParams, p.MaximumShift, maxShift)
	case p.MaximumShift < p.MinimumShift:
		return fmt.Errorf("%w: maximum shift %d is below minimum shift %d", ErrParams, p.MaximumShift, p.MinimumShift)
	case p.MaximumCount < 1:
		return fmt.Errorf("%w: maximum count %d is below 1", ErrParams, p.MaximumCount)
	}
	return nil
}

// geometry is what follows from a device size and Params.
type geometry struct {
	size  int64 // bytes
	shift uint8 // a block is 1<<shift bytes
	count int64 // blocks, the last one may be short
}

func (p Params) geometry(size int64) (geometry, error) {
	if err := p.Validate(); err != nil {
		return geometry{}, err
	}
	if size <= 0 || size%sector.Size != 0 {
		return geometry{}, fmt.Errorf("%w: %d bytes is not a positive number of sectors", ErrSize, size)
	}
	g := geometry{size: size, shift: p.MinimumShift}
	for {
		g.count = (size-1)>>g.shift + 1
		if g.count <= p.MaximumCount || g.shift >= p.MaximumShift {
			break
		}
		g.shift++
	}
	if g.count > maxBlocks {
		return geometry{}, fmt.Errorf("%w: %d bytes is more than %d blocks of %d bytes", ErrSize, size, maxBlocks, int64(1)<<g.shift)
	}
	return g, nil
}

// span is the length of one padded map in memory, in bytes.
func (g geometry) span() int64 { return (g.count + 63) &^ 63 }

func (g geometry) memorySize() int64 { return headerSize + 2*g.span() }

// MemorySize is the memory, in bytes, that a map of a device of size bytes takes.
func MemorySize(size int64, p Params) (int64, error) {
	g, err := p.geometry(size)
	return g.memorySize(), err
}

// contains says whether [off, off+length) lies on the device.
func (g geometry) contains(off, length int64) bool {
	return off >= 0 && length >= 0 && length <= g.size && off <= g.size-length
}

// clip returns the part of [off, off+length) that lies on the device.
func (g geometry) clip(off, length int64) (int64, int64) {
	if off < 0 && length > 0 {
		off, length = 0, length+off
	}
	if off < 0 || off >= g.size || length <= 0 {
		return 0, 0
	}
	return off, min(length, g.size-off)
}
