//go:build mutation

package sim

import "github.com/ublk-blksnap/ublk-blksnap/internal/mutation"

// onPoints makes the process die at the mutation points of the case.
func (w *world) onPoints() {
	mutation.OnPoint(func() {
		if w.proc == nil || w.sched.Thread() == nil || w.c.KillPoint == 0 || w.deaths >= w.c.Kills {
			return
		}
		if w.points++; w.points == w.c.KillPoint {
			panic(death{})
		}
	})
}

func (w *world) offPoints() { mutation.OnPoint(nil) }
