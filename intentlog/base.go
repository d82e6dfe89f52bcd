package intentlog

import (
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// headSize is the size of a base's head, in bytes.
const headSize = sector.Size

// head is the first sector of a base.
type head struct {
	id    uuid.UUID // of the log
	epoch uint64
	info  cbtmap.Info
	sum   uint32 // of the marks
}

func encodeBase(id uuid.UUID, epoch uint64, h cbtmap.History) []byte {
	b := make([]byte, headSize, headSize+len(h.Marks))
	order.PutUint64(b, baseMagic)
	order.PutUint64(b[8:], epoch)
	copy(b[16:], h.GenerationID[:])
	order.PutUint64(b[32:], uint64(h.ChangesNumber))
	order.PutUint64(b[40:], uint64(h.DeviceCapacity))
	order.PutUint64(b[48:], uint64(h.BlockSize))
	order.PutUint64(b[56:], uint64(crc32.Checksum(h.Marks, castagnoli)))
	seal(b, id, 0)
	return append(b, h.Marks...)
}

func decodeHead(b []byte) (h head, err error) {
	if len(b) < headSize {
		return h, fmt.Errorf("%w: base of %d bytes", ErrDamaged, len(b))
	}
	b = b[:headSize]
	if h.id, err = unseal(b, 0); err != nil {
		return h, err
	}
	number, sum := order.Uint64(b[32:]), order.Uint64(b[56:])
	h.epoch, h.sum = order.Uint64(b[8:]), uint32(sum)
	copy(h.info.GenerationID[:], b[16:])
	h.info.ChangesNumber = uint8(number)
	h.info.DeviceCapacity, h.info.BlockSize = int64(order.Uint64(b[40:])), int64(order.Uint64(b[48:]))
	switch {
	case order.Uint64(b) != baseMagic:
		return h, fmt.Errorf("%w: unknown version of the base", ErrDamaged)
	case number > maxNumber || sum>>32 != 0 || h.epoch == 0 || h.epoch > maxEpoch ||
		h.info.DeviceCapacity <= 0 || h.info.BlockSize <= 0 || h.info.BlockSize&(h.info.BlockSize-1) != 0:
		return h, fmt.Errorf("%w: head of the base", ErrDamaged)
	}
	h.info.BlockCount = (h.info.DeviceCapacity-1)/h.info.BlockSize + 1
	return h, nil
}

// Recover is what a change map goes on with after a power failure (see
// [cbtmap.Map.Restore]): from the base that was durable, and the content of the log's
// file. It holds every change of the disk. Outside of the zones that were written since
// the base, it is exact. It fails with ErrDamaged or ErrForeign.
func Recover(base, log []byte) (h cbtmap.History, err error) {
	fail := func(err error) (cbtmap.History, error) {
		return cbtmap.History{}, fmt.Errorf("recover change map: %w", err)
	}
	head, err := decodeHead(base)
	if err != nil {
		return fail(err)
	}
	l, err := decode(log)
	if err != nil {
		return fail(err)
	}
	if head.id != l.id || head.info.DeviceCapacity != l.size {
		return fail(fmt.Errorf("%w: base of %v, log %v", ErrForeign, head.id, l.id))
	}
	marks := base[headSize:]
	if int64(len(marks)) != head.info.BlockCount || crc32.Checksum(marks, castagnoli) != head.sum {
		return fail(fmt.Errorf("%w: marks of the base", ErrDamaged))
	}
	h.Info = head.info
	if l.generation == h.GenerationID {
		h.ChangesNumber = max(h.ChangesNumber, l.number)
	}
	// What is above belongs to a take that has not happened.
	highest := h.ChangesNumber + 1
	h.Marks = make([]byte, len(marks))
	for i, m := range marks {
		h.Marks[i] = min(m, highest)
	}
	for z := range zones(l.size, l.zoneShift) {
		e := entry(l.content, z)
		mark := min(e.mark(), highest)
		switch {
		case e.epoch() < head.epoch:
			continue
		case e.epoch() > head.epoch:
			mark = highest
		}
		first := z << l.zoneShift / h.BlockSize
		last := (min((z+1)<<l.zoneShift, l.size) - 1) / h.BlockSize
		for i := first; i <= last; i++ {
			h.Marks[i] = max(h.Marks[i], mark)
		}
	}
	return h, nil
}

// Base begins an epoch and copies the map, which is the one that the log follows.
// Marks go on meanwhile. The result is to be written where the last base is, by a
// rename and durably. After that call Committed. The log must be on, and Start have
// called back; otherwise the error is ErrOff. It is cbtmap.ErrCorrupted if the map is.
func (l *Log) Base(m *cbtmap.Map) ([]byte, error) {
	for {
		id, epoch, err := l.beginEpoch()
		if err != nil {
			return nil, fmt.Errorf("make base: %w", err)
		}
		h, err := m.Copy()
		switch {
		case err == nil:
			return encodeBase(id, epoch, h), nil
		case !errors.Is(err, cbtmap.ErrGeneration):
			return nil, fmt.Errorf("make base: %w", err)
		}
		// A generation has begun meanwhile.
	}
}
