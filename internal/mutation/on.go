//go:build mutation

package mutation

import "sync/atomic"

// Enabled says whether this build has the switches.
const Enabled = true

var (
	active  atomic.Int64
	onPoint atomic.Pointer[func()]
	onYield atomic.Pointer[func()]
)

// Is says whether bug b is switched on.
func Is(b Bug) bool { return b != None && Bug(active.Load()) == b }

// Set switches b on and any other off.
func Set(b Bug) { active.Store(int64(b)) }

// Point is a place to die.
func Point() {
	if f := onPoint.Load(); f != nil {
		(*f)()
	}
}

// Yield is a place where another thread may come in between.
func Yield() {
	if f := onYield.Load(); f != nil {
		(*f)()
	}
}

// OnYield makes f called at every Yield and at every Point, on whatever thread;
// nil for none.
func OnYield(f func()) {
	OnPoint(f)
	onYield.Store(onPoint.Load())
}

// OnPoint makes f called at every Point; nil for none. f may panic to die
// there.
func OnPoint(f func()) {
	if f == nil {
		onPoint.Store(nil)
		return
	}
	onPoint.Store(&f)
}
