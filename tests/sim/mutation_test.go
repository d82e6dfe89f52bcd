//go:build mutation

package sim

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/mutation"
)

// TestDeathAtEveryStore kills the process before and after every store to
// memory that outlives it.
func TestDeathAtEveryStore(t *testing.T) {
	everyDeath(t, func(c *Config, n int) { c.KillPoint = n })
}

// maxSeeds is within how many seeds every bug must be found.
const maxSeeds = 3000

// TestMutations proves that the checks of this package find bugs: each of the
// engine's deliberate ones fails a seed.
func TestMutations(t *testing.T) {
	for _, bug := range mutation.All() {
		t.Run(bug.String(), func(t *testing.T) {
			mutation.Set(bug)
			defer mutation.Set(mutation.None)
			for seed := uint64(1); seed <= maxSeeds; seed++ {
				if _, f := Run(Generate(seed, 150), nil); f != nil {
					t.Logf("found by seed %d: %.200v", seed, f)
					mutation.Set(mutation.None)
					if _, f := Run(Generate(seed, 150), nil); f != nil {
						t.Errorf("the sound engine fails seed %d too: %v", seed, f)
					}
					return
				}
			}
			t.Errorf("%v survives %d seeds", bug, maxSeeds)
		})
	}
}
