//go:build deathpoints

package snapshots

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
)

// TestDeath kills a process at each of its death points in turn, and then the next
// one as it takes over. The last one finds everything right, and leaves nothing.
func TestDeath(t *testing.T) {
	at := func(n int) string { return fmt.Sprintf("%s=%d", deathpoint.DieAt, n) }
	each := func(t *testing.T, first func(t *testing.T) life, what string) {
		points := 0
		for n := 1; ; n++ {
			died := false
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				l := first(t)
				var steps []string
				steps, died = l.live(t, what, at(n))
				if !died {
					return
				}
				points++
				next, _ := l.live(t, "serve")
				if !slices.Contains(next, "over") {
					t.Errorf("the next one came to %v", next)
				}
				taken := slices.Contains(steps, "take") && !slices.Contains(steps, "written")
				if what == "run" && taken && !slices.Contains(next, "taken") {
					t.Errorf("it was taken, and the next one found it %v", next)
				}
				if b, err := os.ReadFile(l.path("disk")); what == "run" && slices.Contains(steps, "write") && (err != nil || b[0] != 'A') {
					t.Errorf("the disk lost a write: %q, %v", b[0], err)
				}
				l.checkGone(t)
			})
			if !died || t.Failed() {
				break
			}
		}
		if points < 5 {
			t.Errorf("only %d death points", points)
		}
		t.Logf("%d death points", points)
	}
	for _, kind := range lifeKinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			each(t, func(t *testing.T) life { return newLife(t, kind) }, "run")
		})
	}
	t.Run("two", func(t *testing.T) {
		t.Parallel()
		each(t, func(t *testing.T) life { return newLife(t, "lender", "new") }, "run")
	})
	for _, until := range []string{"append", "write", "abort"} {
		t.Run("taking over after "+until, func(t *testing.T) {
			t.Parallel()
			each(t, func(t *testing.T) life {
				l := newLife(t, lifeKinds...)
				l.Until = until
				l.live(t, "run")
				l.Until = ""
				return l
			}, "serve")
		})
	}
}
