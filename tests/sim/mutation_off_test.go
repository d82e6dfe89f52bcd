//go:build !mutation

package sim

import "testing"

func TestMutations(t *testing.T) {
	t.Skip("deliberate bugs and deaths at every store are built with a tag only: make sim, or go test -tags mutation ./tests/sim")
}

// mixThreads is for builds that can have bugs.
func mixThreads() (end func()) { return func() {} }
