package blockdev

import (
	"fmt"
	"slices"
	"unsafe"
)

// This file registers memory with the ring while the queue runs.

// Pin implements Pinner. mem takes a place behind the configured buffers.
func (q *RingQueue) Pin(mem []byte) (index int32, err error) {
	n := slices.Index(q.pinned, nil)
	if n < 0 {
		return NoIndex, fmt.Errorf("pin %d bytes: %d buffers are pinned, the most there can be", len(mem), q.cfg.Pins)
	}
	place := len(q.cfg.Buffers) + n
	if err := q.ring.UpdateBuffers(uint32(place), [][]byte{mem}); err != nil {
		return NoIndex, err
	}
	q.pinned[n] = unsafe.Pointer(unsafe.SliceData(mem))
	return int32(place), nil
}

// Unpin implements Pinner.
func (q *RingQueue) Unpin(index int32) {
	// Entries that name the place have to reach the kernel first. An operation that
	// gets its entry later looks whether the place is still its own (bufIndex).
	if err := q.ring.Submit(); err != nil {
		panic(fmt.Sprintf("queue %s: %v", q.cfg.Name, err))
	}
	if err := q.ring.UpdateBuffers(uint32(index), [][]byte{nil}); err != nil {
		panic(fmt.Sprintf("queue %s: empty place %d: %v", q.cfg.Name, index, err)) // the place is ours, and has memory
	}
	q.pinned[int(index)-len(q.cfg.Buffers)] = nil
}

// bufIndex is the place of b in the table, or NoIndex if b's memory is not pinned any
// more.
func (q *RingQueue) bufIndex(b Buf) int {
	n := int(b.Index) - len(q.cfg.Buffers)
	if n >= 0 && n < len(q.pinned) && q.pinned[n] != b.Mem {
		return NoIndex
	}
	return int(b.Index)
}
