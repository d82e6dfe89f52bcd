//go:build mutation

package sim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/mutation"
)

// TestDeathAtEveryStore kills the process before and after every store to
// memory that outlives it.
func TestDeathAtEveryStore(t *testing.T) {
	everyDeath(t, func(c *Config, n int) { c.KillPoint = n })
}

// maxSeeds is within how many seeds every bug must be found.
const maxSeeds = 3000

// native are the bugs that need two threads at once: TestNativeMutations.
var native = []mutation.Bug{mutation.CopyTwice, mutation.StoredLate}

// flagBug is for processes that TestNativeMutations starts.
var flagBug = flag.String("sim.bug", "", "run with that bug, on real threads")

// mixThreads begins a test on real threads: with the bug that is asked for, and
// for a longer one with threads that make way for each other. The result ends it.
func mixThreads() (end func()) {
	for _, b := range mutation.All() {
		if b.String() == *flagBug {
			mutation.Set(b)
		}
	}
	if *flagNative > 0 {
		mutation.OnYield(func() {
			switch n := rand.Uint64N(16); {
			case n == 0:
				time.Sleep(time.Duration(rand.Uint64N(50)) * time.Microsecond)
			case n < 6:
				runtime.Gosched()
			}
		})
	}
	return func() {
		mutation.OnYield(nil)
		mutation.Set(mutation.None)
	}
}

// TestNativeMutations proves that TestLinearizable finds bugs, each in a process
// of its own: it may panic or hang. Without a bug it finds none.
func TestNativeMutations(t *testing.T) {
	run := func(bug string, most, patience time.Duration) (found bool, out []byte) {
		out, err := exec.Command(os.Args[0], "-test.run=^TestLinearizable$", "-sim.bug="+bug,
			fmt.Sprintf("-sim.native=%v", most), fmt.Sprintf("-test.timeout=%v", patience)).CombinedOutput()
		return err != nil, out
	}
	if found, out := run("none", 5*time.Second, 5*time.Minute); found {
		t.Errorf("the sound engine fails:\n%s", out)
	}
	for _, b := range native {
		// Long if it survives, and soon if it hangs.
		found, out := false, []byte(nil)
		for range 10 {
			if found, out = run(b.String(), 5*time.Second, 15*time.Second); found {
				break
			}
		}
		if !found {
			t.Errorf("%v survives", b)
		}
		t.Logf("%v: %.300s", b, out)
	}
}

// TestMutations proves that the checks of this package find bugs: each of the
// engine's deliberate ones fails a seed.
func TestMutations(t *testing.T) {
	for _, bug := range mutation.All() {
		if bug == mutation.CopyTwice {
			continue // one thread at a time cannot show it
		}
		t.Run(bug.String(), func(t *testing.T) {
			mutation.Set(bug)
			defer mutation.Set(mutation.None)
			found := func(what string, c Case) bool {
				_, f := Run(c, nil)
				if f == nil {
					return false
				}
				t.Logf("found by %s: %.200v", what, f)
				mutation.Set(mutation.None)
				if _, f := Run(c, nil); f != nil {
					t.Errorf("the sound engine fails that too: %v", f)
				}
				return true
			}
			for seed := uint64(1); seed <= maxSeeds; seed++ {
				if found(fmt.Sprintf("seed %d", seed), Generate(seed, 150)) {
					return
				}
			}
			caught := false
			eachSmall(t, func(name string, c Case) bool {
				c.Kills = 1
				for c.KillPoint = 1; !caught; c.KillPoint++ {
					if s, f := Run(c, nil); f == nil && s.Deaths == 0 {
						break
					}
					caught = found(fmt.Sprintf("%s killed at store %d", name, c.KillPoint), c)
				}
				return !caught
			})
			if !caught {
				t.Errorf("%v survives %d seeds, and the death at every store", bug, maxSeeds)
			}
		})
	}
}

// TestRegressionsFail: a case of seeds/ that names the mutation which brings its
// bug back fails with it. So it still guards something.
func TestRegressionsFail(t *testing.T) {
	eachSeed(t, func(t *testing.T, text string, c Case) {
		var bug mutation.Bug
		for _, b := range mutation.All() {
			if strings.Contains(text, "# mutation: "+b.String()+"\n") {
				bug = b
			}
		}
		if bug == mutation.None {
			t.Fatal("no line says \"# mutation: …\"")
		}
		mutation.Set(bug)
		defer mutation.Set(mutation.None)
		if f := inOrders(c); f == nil {
			t.Errorf("%v is not found any more", bug)
		} else {
			t.Logf("%.200v", f)
		}
	})
}
