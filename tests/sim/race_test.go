//go:build race

package sim

// underRace: the simulator is one goroutine, in which there is little for the
// race detector to find; TestLinearizable is for it.
const underRace = true
