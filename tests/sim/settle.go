package sim

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// settle steps until nothing is under way, and sees to it that what is stuck
// goes on: everything must end by itself.
func (w *world) settle() {
	for {
		for w.step() {
		}
		if w.powerFailed {
			return
		}
		w.checkWaits()
		if w.sched.Steps()%2 == 0 && w.giveUp() || w.unstick() {
			continue
		}
		if w.idle() {
			return
		}
		w.fail("I8: %s", w.whatHangs())
	}
}

// checkWaits is for when nothing goes on but for what is stuck: reads and
// flushes of a disk wait for that disk, never for the storage of a snapshot;
// changes wait for that only as long as its owner has not given it up, and for
// other disks at a cut. All wait for a log that begins, until that is given up.
func (w *world) checkWaits() {
	if w.proc == nil {
		return
	}
	lost := !w.proc.cutting
	for _, s := range w.snaps {
		if s != nil && s.waiting() {
			lost = false
		}
	}
	for _, k := range w.proc.living() {
		if waits, _ := k.log.Waiting(); waits {
			lost = false
		}
	}
	for i, d := range w.devices {
		if w.sched.Stuck(w.origs[i]) || w.proc.away(i) {
			continue
		}
		for _, h := range d.queues {
			for _, t := range h.tags {
				if r := t.r; r != nil && (lost || r.op == ublk.OpRead || r.op == ublk.OpFlush) {
					w.fail("I5: %v of %s at sector %d+%d waits for something else than its disk", r.op, d.name, r.from(), r.len/sectorSize)
				}
			}
		}
	}
}

// giveUp gives up the snapshots that wait for what is stuck, as the daemon does
// after a while; false if there are none.
func (w *world) giveUp() bool {
	any := false
	for _, s := range w.snaps {
		if w.proc != nil && s != nil && s.waiting() {
			any = true
			w.fired++
			w.proc.control.After(0, func() {
				w.tracef("give up %v", s)
				s.snap.Break(unix.ETIMEDOUT)
			})
		}
	}
	if w.proc == nil {
		return any
	}
	for _, k := range w.proc.living() {
		if waits, _ := k.log.Waiting(); waits && k.log.State() != intentlog.Off {
			any = true
			w.gaveUp = true
			w.tracef("give up the log of disk%d", k.s.dev)
			k.giveUp()
		}
	}
	return any
}

// idle says whether nobody waits for anything.
func (w *world) idle() bool {
	return w.outstanding == 0 && w.proc != nil && w.proc.idle() && w.done
}

func (w *world) whatHangs() string {
	if w.proc != nil && !w.proc.idle() {
		return fmt.Sprintf("nothing is under way, yet %s has not ended; %d requests wait", w.proc.current, w.outstanding)
	}
	for _, d := range w.allDevices() {
		for _, h := range d.queues {
			for _, t := range h.tags {
				if t.r != nil {
					return fmt.Sprintf("nothing is under way, yet %v of %s at sector %d+%d was not completed", t.r.op, d.name, t.r.from(), t.r.len/sectorSize)
				}
			}
		}
	}
	return fmt.Sprintf("nothing is under way, yet %d requests wait", w.outstanding)
}

// unstick lets all files go on; false if none was stuck.
func (w *world) unstick() bool {
	any := false
	for _, m := range w.files() {
		if w.sched.Stuck(m) {
			any = true
			w.sched.Unstick(m)
		}
	}
	return any
}
