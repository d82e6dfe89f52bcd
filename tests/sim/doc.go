// Package sim runs the engine (cbtmap, intentlog, diffarea, filter, snapimage), unchanged, in a
// world of simulated disks, and checks everything that its clients see against a
// plain model.
//
//	seed ──> Config, steps ──> world: clients ──> filter, images ──> disks, storage
//	                             │                                     (blockdevtest)
//	                             └ model: what each sector may hold, what must be marked
//
// One thread does everything. A seed decides which completion comes next, which
// operation fails, when the power fails, and between which two stores the process
// dies. So the seed of a failed run repeats that run, and the run can be made
// smaller. README.md tells which check proves what, and how the deliberate bugs of
// tests/sim/bugs prove that the checks can fail.
package sim
