//go:build !mutation

package sim

func (w *world) onPoints()  {}
func (w *world) offPoints() {}
