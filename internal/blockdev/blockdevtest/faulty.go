package blockdevtest

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// Effect says how much of an operation is done before it fails.
type Effect uint8

const (
	// NoEffect fails the operation before it has done anything.
	NoEffect Effect = iota
	// PartEffect does the first half of its sectors.
	PartEffect
	// FullEffect does all of it, and fails all the same.
	FullEffect
)

// Fault picks operations and says how they fail.
type Fault struct {
	Kinds []blockdev.Kind // empty: any kind
	File  blockdev.File   // nil: any file
	// Fits, if there is one, says whether the fault is for op.
	Fits func(op *blockdev.Op) bool
	// Off and Len are the bytes that the operation must touch; Len 0: any.
	Off, Len int64
	// After is how many operations that fit are let through first, and Count
	// how many fail then; Count 0 means all of them.
	After, Count int
	Err          unix.Errno
	Effect       Effect
}

func (f *Fault) fits(op *blockdev.Op) bool {
	if f.File != nil && f.File != op.File {
		return false
	}
	if f.Len != 0 && op.Kind != blockdev.Flush && (op.Off >= f.Off+f.Len || op.Off+op.Len <= f.Off) {
		return false
	}
	if f.Fits != nil && !f.Fits(op) {
		return false
	}
	for _, k := range f.Kinds {
		if k == op.Kind {
			return true
		}
	}
	return len(f.Kinds) == 0
}

// Faults is a list of faults shared by any number of queues.
type Faults struct {
	// OnFire is told each operation that is going to fail; nil or set before
	// the queues are used.
	OnFire func(op *blockdev.Op)

	mu    sync.Mutex
	list  []*fault
	fired int
}

type fault struct {
	Fault
	seen int
}

// Add puts a fault on the list; its counting starts now.
func (fs *Faults) Add(f Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.list = append(fs.list, &fault{Fault: f})
}

// Clear empties the list.
func (fs *Faults) Clear() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.list = nil
}

// Fired is how many operations have failed by a fault.
func (fs *Faults) Fired() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.fired
}

// pick is the fault that op meets, or nil. Every fault that fits counts op.
func (fs *Faults) pick(op *blockdev.Op) *Fault {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var hit *Fault
	for _, f := range fs.list {
		if !f.fits(op) {
			continue
		}
		n := f.seen
		f.seen++
		if hit == nil && n >= f.After && (f.Count == 0 || n < f.After+f.Count) {
			hit = &f.Fault
		}
	}
	if hit != nil {
		fs.fired++
	}
	return hit
}

// Faulty is a Queue that passes operations on to another one, except those
// that meet a fault.
type Faulty struct {
	inner  blockdev.Queue
	faults *Faults
}

// NewFaulty puts faults in front of inner.
func NewFaulty(inner blockdev.Queue, faults *Faults) *Faulty {
	return &Faulty{inner: inner, faults: faults}
}

// Post passes t on.
func (q *Faulty) Post(t *blockdev.Task) { q.inner.Post(t) }

// Submit starts op, or lets it fail.
func (q *Faulty) Submit(op *blockdev.Op) {
	f := q.faults.pick(op)
	if f == nil {
		q.inner.Submit(op)
		return
	}
	if q.faults.OnFire != nil {
		q.faults.OnFire(op)
	}
	errno := f.Err
	fail := func() {
		op.Err = errno
		op.Done(op)
	}
	part := *op
	if f.Effect == PartEffect {
		part.Len = op.Len / sector.Size / 2 * sector.Size
	}
	if f.Effect == NoEffect || f.Effect == PartEffect && (part.Len == 0 || op.Kind == blockdev.Flush) {
		q.inner.Post(&blockdev.Task{Run: fail})
		return
	}
	part.Done = func(*blockdev.Op) { fail() }
	q.inner.Submit(&part)
}
