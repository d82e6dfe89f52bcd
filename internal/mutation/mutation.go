// Package mutation is the engine's test-only switches: deliberate bugs, to
// prove that the simulator finds bugs, places to die, to prove that the state
// left behind is good at each of them, and places for other threads to come in
// between.
//
// They exist under the build tag "mutation". Without it Enabled is a constant
// false, so Is, Point and Yield leave no instruction in the program.
package mutation

// Bug is a deliberate bug of the engine.
type Bug int

// None is no bug.
const None Bug = 0
