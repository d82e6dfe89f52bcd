// Package mutation switches the engine's deliberate bugs on. It also hears of the places where the engine's process can
// die, and of those where another thread can come in between. The engine does not import it. Only the copies of the
// engine's files do, which package bugs makes, and only test builds with that overlay have those copies.
package mutation

import "sync/atomic"

// Built says whether this build has the copies. The overlay sets it.
var Built bool

var (
	active  atomic.Pointer[string]
	onPoint atomic.Pointer[func()]
	onYield atomic.Pointer[func()]
)

// Set switches one bug on and any other off; "" is none.
func Set(bug string) {
	if bug == "" {
		active.Store(nil)
		return
	}
	active.Store(&bug)
}

// Is says whether a bug is switched on.
func Is(bug string) bool {
	on := active.Load()
	return on != nil && *on == bug
}

// OnPoint makes f called at every Point; nil for none. f may panic to die
// there.
func OnPoint(f func()) { set(&onPoint, f) }

// OnYield makes f called at every Yield and at every Point, on whatever thread;
// nil for none.
func OnYield(f func()) {
	set(&onPoint, f)
	set(&onYield, f)
}

func set(hook *atomic.Pointer[func()], f func()) {
	if f == nil {
		hook.Store(nil)
		return
	}
	hook.Store(&f)
}

func call(hook *atomic.Pointer[func()]) {
	if f := hook.Load(); f != nil {
		(*f)()
	}
}

// OnLock makes f called at every Yield alone, on whatever thread; nil for none.
func OnLock(f func()) { set(&onYield, f) }

// Point is a place to die.
func Point() { call(&onPoint) }

// Yield is a place where another thread may come in between.
func Yield() { call(&onYield) }

// StoreUint64 is that of sync/atomic between two places to die.
func StoreUint64(addr *uint64, v uint64) {
	Point()
	atomic.StoreUint64(addr, v)
	Point()
}

// CompareAndSwapUint64 is that of sync/atomic between two places to die.
func CompareAndSwapUint64(addr *uint64, old, new uint64) bool {
	Point()
	defer Point()
	return atomic.CompareAndSwapUint64(addr, old, new)
}
