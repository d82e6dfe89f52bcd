package sim

import (
	"flag"
	"os"
	"regexp"
	"testing"
)

var (
	flagSeed  = flag.Uint64("sim.seed", 0, "run this seed alone, with -v traced")
	flagSteps = flag.Int("sim.steps", 150, "steps of a generated workload")
)

func TestSeeds(t *testing.T) {
	if *flagSeed != 0 {
		c := Generate(*flagSeed, *flagSteps)
		var f *Failure
		if testing.Verbose() {
			_, f = Run(c, os.Stderr)
		} else {
			_, f = Run(c, nil)
		}
		if f != nil {
			t.Fatal(f)
		}
		return
	}
	var total Stats
	fails := map[string]int{}
	for seed := uint64(1); seed < 4000; seed++ {

		s, f := Run(Generate(seed, *flagSteps), nil)
		total.add(s)
		if f != nil {
			key := regexp.MustCompile("[0-9]+").ReplaceAllString(f.Message, "N")
			if len(key) > 100 {
				key = key[:100]
			}
			if fails[key]++; fails[key] < 3 {
				t.Errorf("seed %d: %v", seed, f)
			}
		}
	}
	t.Logf("%+v", total)
}
