//go:build !mutation

package mutation

// Enabled says whether this build has the switches.
const Enabled = false

// Is says whether bug b is switched on.
func Is(b Bug) bool { return false }

// Point is a place to die.
func Point() {}

// Yield is a place where another thread may come in between.
func Yield() {}
