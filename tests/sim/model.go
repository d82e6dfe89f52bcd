package sim

import (
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// model is what the world must look like to its clients. It knows requests,
// sectors and takes; no chunk, no word, no log.
type model struct {
	w    *world
	devs []*devModel
}

// devModel is the model of one original disk: its register is in the device,
// here is what the change map must say.
//
// An epoch is the time between two cuts of the device. In the epoch that began
// with take number k a write marks k+1.
type devModel struct {
	w      *world
	dev    int
	epochs []epoch
	last   []int32 // by block: the last epoch in which it changed, -1: never
	owed   []int32 // the same, of all that has to be found changed after a power failure
}

// epoch is the change map's name for an epoch, and which blocks may have been
// written in it.
type epoch struct {
	generation uuid.UUID
	number     uint8
	may        []bool
}

func (m *model) add(dev int) {
	n := (m.w.c.size(dev)-1)>>m.w.c.Block + 1
	d := &devModel{w: m.w, dev: dev, last: make([]int32, n), owed: make([]int32, n)}
	for i := range d.last {
		d.last[i], d.owed[i] = -1, -1
	}
	m.devs = append(m.devs, d)
}

// begin starts an epoch.
func (d *devModel) begin(generation uuid.UUID, number uint8) {
	d.epochs = append(d.epochs, epoch{generation, number, make([]bool, len(d.last))})
	// What is being written now is written in this epoch too.
	for _, other := range d.w.allDevices() {
		if other.dev != d.dev {
			continue
		}
		for _, h := range other.queues {
			for _, r := range h.waiting {
				d.may(r)
			}
			for _, t := range h.tags {
				if t.r != nil {
					d.may(t.r)
				}
			}
		}
	}
}

// resize is for a disk that has grown. Its map begins anew, but a process may die
// before that, and requests come.
func (d *devModel) resize(size int64) {
	n := (size-1)>>d.w.c.Block + 1
	now := &d.epochs[len(d.epochs)-1]
	for int64(len(d.last)) < n {
		d.last = append(d.last, -1)
		d.owed = append(d.owed, -1)
		now.may = append(now.may, true)
	}
}

// renew starts an epoch if a new process has found the map in another one.
func (d *devModel) renew(info cbtmap.Info) {
	if e := d.epochs[len(d.epochs)-1]; e.generation != info.GenerationID || e.number != info.ChangesNumber {
		d.begin(info.GenerationID, info.ChangesNumber)
	}
}

// allMay notes that the present epoch began with every block marked.
func (d *devModel) allMay() {
	may := d.epochs[len(d.epochs)-1].may
	for b := range may {
		may[b] = true
	}
}

func (d *devModel) blocks(off, n int64) (first, last int64) {
	return off >> d.w.c.Block, (off + n - 1) >> d.w.c.Block
}

// may notes that a request can mark its blocks in the present epoch.
func (d *devModel) may(r *request) {
	if !r.writes() {
		return
	}
	first, last := d.blocks(r.off, r.len)
	for b := first; b <= last; b++ {
		d.epochs[len(d.epochs)-1].may[b] = true
	}
}

// changed notes that bytes of the disk change at this instant.
func (d *devModel) changed(off, n int64) {
	if n == 0 {
		return
	}
	first, last := d.blocks(off, n)
	for b := first; b <= last; b++ {
		d.last[b] = int32(len(d.epochs) - 1)
	}
}

// checkMap compares the readable map with what has changed: I3, and with
// exactly also that no block is marked for nothing.
func (d *devModel) checkMap(readable []byte, generation uuid.UUID, number uint8, exactly bool) {
	for b, v := range readable {
		if last := d.last[b]; last >= 0 {
			if e := d.epochs[last]; e.generation == generation && v <= e.number && e.number < number {
				d.w.fail("I3: disk%d block %d changed after take %d, its byte says %d at take %d", d.dev, b, e.number, v, number)
			}
		}
		if v > number {
			d.w.fail("I3: disk%d block %d: byte %d above take %d", d.dev, b, v, number)
		}
		if !exactly || v == 0 {
			continue
		}
		for _, e := range d.epochs {
			if e.generation == generation && e.number == v-1 && !e.may[b] {
				d.w.fail("disk%d block %d is marked with %d though nothing was written there after take %d", d.dev, b, v, v-1)
			}
		}
	}
}

// submitted is told each request as a client issues it.
func (m *model) submitted(r *request) {
	if r.writes() {
		m.devs[r.d.dev].may(r)
		m.w.eachZone(r.d.dev, r.off, r.len, func(z *zoneModel) { z.under++ })
		if r.d.image != nil {
			r.epoch = len(m.devs[r.d.dev].epochs) - 1
		}
	}
	if !r.writesData() {
		return
	}
	if r.d.image != nil {
		r.d.image.needs(r)
		return
	}
	for _, s := range m.w.snaps {
		if s == nil {
			continue
		}
		for _, im := range s.images {
			if im.dev == r.d.dev {
				im.needs(r)
			}
		}
	}
}

// finished is told each request as it is completed, and checks what can be
// seen of it.
func (m *model) finished(r *request, buf []byte, errno unix.Errno, now moment) {
	d := r.d
	if errno != 0 {
		m.checkError(r, errno)
	}
	if errno == 0 && r.doomed {
		m.w.fail("I2: %v of %s sector %d+%d succeeds though its operation on the disk failed", r.op, d.name, r.from(), r.len/sectorSize)
	}
	if errno == 0 && r.broken && (r.op == ublk.OpRead || r.op == ublk.OpWrite || r.op == ublk.OpWriteZeroes) {
		m.w.fail("I1: %v of %s sector %d+%d succeeds though the snapshot is broken", r.op, d.name, r.from(), r.len/sectorSize)
	}
	if errno == 0 && d.reg.volatile && r.op == ublk.OpFlush {
		d.reg.flushed(r.start)
	}
	if r.writes() {
		m.w.eachZone(d.dev, r.off, r.len, func(z *zoneModel) { z.under, z.last = z.under-1, now })
		if errno == 0 && r.fua && r.op == ublk.OpWrite {
			d.reg.harden(r.id, r.from(), r.to())
		}
		d.reg.end(r.id, r.from(), r.to(), now, errno != 0 || r.op == ublk.OpDiscard)
		if errno == 0 && d.image == nil {
			m.checkDisk(d, r.from(), r.to(), r.start, now, "an acknowledged write")
		}
		if errno == 0 && d.image != nil && r.op != ublk.OpDiscard {
			dm := m.devs[d.dev]
			first, last := dm.blocks(r.off, r.len)
			for b := first; b <= last; b++ {
				dm.last[b] = max(dm.last[b], int32(r.epoch))
			}
			m.w.checkReadable(d.dev, r.off, r.len, dm.epochs[r.epoch], "an acknowledged write to an image")
			m.w.oblige(d.dev, r.off, r.len, r.epoch)
		}
		return
	}
	if r.op != ublk.OpRead {
		return
	}
	if errno == 0 {
		what := "I2: a read"
		if d.image != nil {
			what = "I1: a read"
		}
		for s := r.from(); s < r.to(); s++ {
			p := buf[(s-r.from())*sectorSize:][:sectorSize]
			m.checkSector(d.reg, d.name, s, p, r.start, what)
		}
	}
	d.reg.endRead(r.start)
}

// checkSector says whether somebody who began to look at start may see p.
func (m *model) checkSector(reg *register, name string, s int64, p []byte, start moment, what string) {
	v := versionOf(p, reg.dev, s)
	if reg.check(s, v, start) {
		return
	}
	text := v.String()
	if v == wrong {
		text = tell(p)
	}
	m.w.fail("%s of %s sector %d finds %s, allowed are %v", what, name, s, text, reg.cell(s).versions(start))
}

// checkDisk looks at the original disk itself.
func (m *model) checkDisk(d *device, from, to int64, start, now moment, what string) {
	p := make([]byte, (to-from)*sectorSize)
	if _, err := m.w.origs[d.dev].ReadAt(p, from*sectorSize); err != nil {
		panic(err)
	}
	for s := from; s < to; s++ {
		// As a read that begins and ends now, but learn nothing from it: what is
		// under way may not have taken effect.
		q := p[(s-from)*sectorSize:][:sectorSize]
		v := versionOf(q, d.dev, s)
		if c := d.reg.cell(s); !c.allows(v, now+1) {
			text := v.String()
			if v == wrong {
				text = tell(q)
			}
			m.w.fail("I2: %s: disk%d sector %d holds %s, allowed are %v", what, d.dev, s, text, c.versions(now+1))
		}
	}
}

// checkLost looks at the original disk after a power failure.
func (m *model) checkLost(d *device) {
	p := make([]byte, d.size)
	if _, err := m.w.origs[d.dev].ReadAt(p, 0); err != nil {
		panic(err)
	}
	for s := int64(0); s < d.size/sectorSize; s++ {
		v := versionOf(p[s*sectorSize:][:sectorSize], d.dev, s)
		if c := d.reg.cell(s); !c.survives(v) {
			m.w.fail("I6: after a power failure disk%d sector %d holds %v; it was %v, and what is durable of that is lost",
				d.dev, s, v, c)
		}
	}
}

// checkMarked says whether what is about to change on a disk is marked in the
// active map, which lies where package cbtmap says.
func (d *devModel) checkMarked(op *blockdev.Op) {
	const activeAt = 512
	w := d.w
	info, err := w.proc.cbts[d.dev].Info()
	if err != nil {
		return // corrupted: nobody will rely on it
	}
	first, last := d.blocks(op.Off, op.Len)
	for b := first; b <= last; b++ {
		if v := w.tmpfs.maps[d.dev][activeAt+b]; v <= info.ChangesNumber {
			w.fail("I3: %v of disk%d at sector %d+%d submitted while block %d is marked with %d, not %d",
				op.Kind, d.dev, op.Off/sectorSize, op.Len/sectorSize, b, v, info.ChangesNumber+1)
		}
	}
}

// checkError says whether a request may fail.
func (m *model) checkError(r *request, errno unix.Errno) {
	w := m.w
	switch {
	case r.d.gone || r.spoilt:
	case r.d.image == nil:
		w.fail("I5: %v of %s sector %d+%d fails: %v", r.op, r.d.name, r.from(), r.len/sectorSize, errno)
	case r.d.image.snap.broken():
	default:
		w.fail("I5: %v of %s sector %d+%d fails though the snapshot is whole: %v", r.op, r.d.name, r.from(), r.len/sectorSize, errno)
	}
}

// image is a disk of a taken snapshot as its clients see it.
type image struct {
	snap   *snapshot
	dev    int
	base   *blockdevtest.Memory // the original at the cut
	device *device
	needed []bool // by sector: a write may have needed its copy
}

// needs notes a write that overwrites what the image shows.
func (im *image) needs(r *request) {
	for s := r.from(); s < min(r.to(), int64(len(im.needed))); s++ {
		im.needed[s] = true
	}
}

func (im *image) String() string { return fmt.Sprintf("image%d.%d", im.snap.slot, im.dev) }

// version is what the original held at the cut.
func (im *image) version(s int64) Version {
	var p [sectorSize]byte
	if _, err := im.base.ReadAt(p[:], s*sectorSize); err != nil {
		panic(err)
	}
	return versionOf(p[:], im.dev, s)
}
