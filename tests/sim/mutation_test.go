package sim

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/bugs"
	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/mutation"
)

// TestBugsFit: every deliberate bug still finds the lines that it changes.
func TestBugsFit(t *testing.T) {
	if _, err := bugs.Overlay(os.DirFS("../..")); err != nil {
		t.Error(err)
	}
}

// built skips a test of what only a build with the deliberate bugs has.
func built(t *testing.T) {
	if !mutation.Built {
		t.Skip("this build has no deliberate bugs and no places to die: make sim, or " +
			"go run ./tests/sim/overlay && go test -overlay .cache/bugs/overlay.json ./tests/sim")
	}
}

// TestDeathAtEveryStore kills the process before and after every store to
// memory that outlives it.
func TestDeathAtEveryStore(t *testing.T) {
	built(t)
	everyDeath(t, func(c *Config, n int) { c.KillPoint = n })
}

// maxSeeds is within how many seeds every bug must be found.
const maxSeeds = 3000

// native are the bugs that need two threads at once: TestNativeMutations.
var native = []string{"CopyTwice", "StoredLate"}

// flagBug is for processes that TestNativeMutations starts.
var flagBug = flag.String("sim.bug", "", "run with that bug, on real threads")

// mixThreads begins a test on real threads: with the bug that is asked for, and
// for a longer one with threads that make way for each other. The result ends it.
func mixThreads() (end func()) {
	mutation.Set(*flagBug)
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
		mutation.Set("")
	}
}

// TestNativeMutations proves that TestLinearizable finds bugs, each in a process
// of its own: it may panic or hang. Without a bug it finds none.
func TestNativeMutations(t *testing.T) {
	built(t)
	run := func(bug string, most, patience time.Duration) (found bool, out []byte) {
		out, err := exec.Command(os.Args[0], "-test.run=^TestLinearizable$", "-sim.bug="+bug,
			fmt.Sprintf("-sim.native=%v", most), fmt.Sprintf("-test.timeout=%v", patience)).CombinedOutput()
		return err != nil, out
	}
	if found, out := run("", 5*time.Second, 5*time.Minute); found {
		t.Errorf("the sound engine fails:\n%s", out)
	}
	for _, b := range native {
		// Long if it survives, and soon if it hangs.
		found, out := false, []byte(nil)
		for range 10 {
			if found, out = run(b, 5*time.Second, 15*time.Second); found {
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
// engine's deliberate ones fails a seed. What found it before is tried first.
func TestMutations(t *testing.T) {
	built(t)
	known := readFound(t)
	defer known.save(t)
	for _, bug := range bugs.All() {
		if bug.Name == "CopyTwice" {
			continue // one thread at a time cannot show it
		}
		t.Run(bug.Name, func(t *testing.T) {
			mutation.Set(bug.Name)
			defer mutation.Set("")
			found := func(what string, c Case) bool {
				_, f := Run(c, nil)
				if f == nil {
					return false
				}
				t.Logf("found by %s: %.200v", what, f)
				known.keep(bug.Name, c)
				mutation.Set("")
				if _, f := Run(c, nil); f != nil {
					t.Errorf("the sound engine fails that too: %v", f)
				}
				return true
			}
			if c, ok := known.cases[bug.Name]; ok && !*flagSearch && found("what is in "+foundPath, c) {
				return
			}
			seeds := func(from, to uint64) bool {
				for seed := from; seed <= to; seed++ {
					c := generateBare(seed, 150)
					if bug.Log || bug.Steps {
						if c = Generate(seed, 150); bug.Log && c.Zone == 0 || bug.Steps && c.Records == 0 {
							continue
						}
					}
					if found(fmt.Sprintf("seed %d", seed), c) {
						return true
					}
				}
				return false
			}
			deaths := func() (caught bool) {
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
				return caught
			}
			// What goes wrong at the n-th step of a scene.
			logs := func() (caught bool) {
				for i, text := range logScenes {
					scene, err := ParseCase(text)
					if err != nil {
						t.Fatal(err)
					}
					for how := range 8 {
						for n, more := 1, true; more && !caught; n++ {
							c := scene
							switch how {
							case 0:
								c.PowerStep = n
							case 1, 2:
								c.FaultOn, c.FaultAfter, c.FaultCount, c.FaultErr = how, n-1, 1, 5
							default:
								c.Order += uint64(how)
								c.Kills, c.KillStep = 1, n
							}
							s, f := Run(c, nil)
							more = s.Deaths > 0 || s.Faults > 0 || how == 0 && s.Steps >= uint64(n)
							caught = f != nil && found(fmt.Sprintf("log scene %d, %d at %d", i, how, n), c)
						}
					}
				}
				return caught
			}
			// A death, or a loss of power, at the n-th step of the records.
			records := func() (caught bool) {
				for how := range uint64(9) {
					for i, text := range recordScenes {
						scene, err := ParseCase(text)
						if err != nil {
							t.Fatal(err)
						}
						scene.Order += how / 3
						for n, more := 1, true; more && !caught; n++ {
							c := scene
							switch how % 3 {
							case 0:
								c.Kills, c.KillStep = 1, n
							case 1:
								c.PowerStep = n
							case 2:
								c.Kills, c.KillPoint = 1, n
							}
							s, f := Run(c, nil)
							more = s.Deaths > 0 || how%3 == 1 && s.Steps >= uint64(n)
							caught = f != nil && found(fmt.Sprintf("record scene %d, %d at %d", i, how, n), c)
						}
					}
				}
				return caught
			}
			// And a death within the take-over after that.
			again := func() (caught bool) {
				for i, text := range slices.Backward(recordScenes) {
					scene, err := ParseCase(text)
					if err != nil {
						t.Fatal(err)
					}
					eachTakeOver(scene, 1, func(c *Config, n int) { c.KillPoint = n }, func(c Case, f *Failure) bool {
						caught = f != nil && found(fmt.Sprintf("record scene %d, at %d and again at %d", i, c.KillPoint, c.KillAgain), c)
						return !caught
					})
					if caught {
						return true
					}
				}
				return false
			}
			if bug.Log && logs() || bug.Steps && (records() || again()) {
				return
			}
			if !seeds(1, maxSeeds/3) && !deaths() && !seeds(maxSeeds/3+1, maxSeeds) {
				t.Errorf("the engine that %s survives %d seeds, and the death at every store", bug.Why, maxSeeds)
			}
		})
	}
}

// TestRegressionsFail: a case of seeds/ that names the mutation which brings its
// bug back fails with it. So it still guards something.
func TestRegressionsFail(t *testing.T) {
	built(t)
	eachSeed(t, func(t *testing.T, text string, c Case) {
		i := slices.IndexFunc(bugs.All(), func(b bugs.Bug) bool {
			return strings.Contains(text, "# mutation: "+b.Name+"\n")
		})
		if i < 0 {
			t.Fatal("no line says \"# mutation: …\"")
		}
		mutation.Set(bugs.All()[i].Name)
		defer mutation.Set("")
		if f := inOrders(c); f == nil {
			t.Error("that bug is not found any more")
		} else {
			t.Logf("%.200v", f)
		}
	})
}
