package sim

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/mutation"
)

var (
	flagSeed    = flag.Uint64("sim.seed", 0, "run this seed alone; with -v everything that happens is printed")
	flagCase    = flag.String("sim.case", "", "run the case in this file alone, as -sim.seed does")
	flagSteps   = flag.Int("sim.steps", 150, "steps of a generated workload")
	flagFirst   = flag.Uint64("sim.first", 1, "first seed")
	flagCount   = flag.Uint64("sim.count", 0, "number of seeds; 0: a short fixed set")
	flagMinutes = flag.Float64("sim.minutes", 0, "go on with new seeds for so long, one process a core")
	flagNative  = flag.Duration("sim.native", 0, "go on with real threads for so long")
	flagStride  = flag.Uint64("sim.stride", 1, "take every so many-th seed")
)

// TestMain reads what make sim passes on: SEEDS is one seed or a range of
// them, as in 1-5000, MINUTES for how long to try new ones.
func TestMain(m *testing.M) {
	flag.Parse()
	if seeds := os.Getenv("SEEDS"); seeds != "" {
		from, to, ok := strings.Cut(seeds, "-")
		if !ok {
			to = from
		}
		a, errA := strconv.ParseUint(from, 10, 64)
		b, errB := strconv.ParseUint(to, 10, 64)
		if errA != nil || errB != nil || a > b {
			fmt.Fprintf(os.Stderr, "SEEDS=%s: not a seed or a range of them\n", seeds)
			os.Exit(2)
		}
		*flagFirst, *flagCount = a, b-a+1
	}
	if minutes := os.Getenv("MINUTES"); minutes != "" {
		n, err := strconv.ParseFloat(minutes, 64)
		if err != nil || n < 0 {
			fmt.Fprintf(os.Stderr, "MINUTES=%s: not a number of minutes\n", minutes)
			os.Exit(2)
		}
		*flagMinutes = n
		*flagNative = time.Duration(n * float64(time.Minute) / 10)
		if *flagCount == 0 && *flagFirst == 1 {
			*flagFirst = uint64(time.Now().Unix()) * 100000
		}
	}
	os.Unsetenv("SEEDS")
	os.Unsetenv("MINUTES")
	os.Exit(m.Run())
}

const (
	fixedSeeds = 1500
	shortSeeds = 300
)

// quick says not to run everything, because the race detector makes it all ten times as
// slow.
func quick() bool { return testing.Short() || underRace }

// one runs a single case; -v traces it.
func one(t *testing.T, c Case) {
	var f *Failure
	if testing.Verbose() {
		_, f = Run(c, os.Stderr)
	} else {
		_, f = Run(c, nil)
	}
	if f != nil {
		t.Fatal(f)
	}
}

// report fails the test with a smaller case and how to run it again.
func report(t *testing.T, name string, c Case, f *Failure) {
	t.Helper()
	small, sf := Shrink(c, 20*time.Second)
	if sf == nil {
		t.Errorf("%s: %v\nand the same case does not fail again: the run is not determined by its seed", name, f)
		return
	}
	path := filepath.Join(os.TempDir(), "sim-"+strings.ReplaceAll(name, " ", "-")+".txt")
	text := fmt.Sprintf("# %.300s\n%v", strings.SplitN(sf.Message, "\n", 2)[0], small)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Error(err)
	}
	t.Errorf("%s: %v\nmade smaller: %v\n%s\nreplay: go test %s./tests/sim -run TestSimulation -v -sim.case=%s\n"+
		"once fixed, keep that file in tests/sim/seeds", name, f, sf, small, overlay(), path)
}

func overlay() string {
	if mutation.Built {
		return "-overlay .cache/bugs/overlay.json "
	}
	return ""
}

// TestSimulation runs generated cases: a fixed set, or as the flags say.
func TestSimulation(t *testing.T) {
	if *flagCase != "" {
		text, err := os.ReadFile(*flagCase)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseCase(string(text))
		if err != nil {
			t.Fatal(err)
		}
		one(t, c)
		return
	}
	if *flagSeed != 0 {
		one(t, Generate(*flagSeed, *flagSteps))
		return
	}
	count := *flagCount
	switch {
	case *flagMinutes > 0 && *flagStride == 1 && runtime.NumCPU() > 1:
		each(t)
		return
	case *flagMinutes > 0 && count == 0:
		count = 1 << 62
	case count == 0 && quick():
		count = shortSeeds
	case count == 0:
		count = fixedSeeds
	}
	var total Stats
	began, used := time.Now(), processorTime()
	failed := 0
	seed := *flagFirst
	for n := uint64(0); n < count && failed < 3; n++ {
		if *flagMinutes > 0 && time.Since(began).Minutes() > *flagMinutes {
			break
		}
		c := Generate(seed, *flagSteps)
		s, f := Run(c, nil)
		total.add(s)
		if f != nil {
			failed++
			report(t, fmt.Sprintf("seed %d", seed), c, f)
		}
		seed += *flagStride
	}
	t.Logf("seeds %d to %d: %v; %.0f requests a second of processor time",
		*flagFirst, seed-*flagStride, total, float64(total.Requests)/(processorTime()-used).Seconds())
}

// processorTime is what the process has used.
func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// each runs TestSimulation once for each core, with a share of the seeds. Each run has a
// process of its own, because a process can have only one place to die.
func each(t *testing.T) {
	var wait sync.WaitGroup
	n := runtime.NumCPU()
	for i := 0; i < n; i++ {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSimulation$", "-test.v", "-test.timeout=0",
			fmt.Sprintf("-sim.first=%d", *flagFirst+uint64(i)), fmt.Sprintf("-sim.stride=%d", n),
			fmt.Sprintf("-sim.count=%d", *flagCount/uint64(n)),
			fmt.Sprintf("-sim.minutes=%g", *flagMinutes), fmt.Sprintf("-sim.steps=%d", *flagSteps))
		wait.Add(1)
		go func() {
			defer wait.Done()
			out, err := cmd.CombinedOutput()
			out = bytes.TrimSpace(out)
			if err != nil {
				t.Errorf("%v\n%s", err, out)
				return
			}
			t.Logf("%s", out)
		}()
	}
	wait.Wait()
}

// small is a generated case for tests that run it again and again with one thing
// changed: a snapshot early on, and everything near it.
func small(seed uint64) Case {
	c := Generate(seed*uint64(profiles), 24)
	c.Size0, c.Size1, c.Size2, c.Sector = 61, 40, 24, 1
	c.Depth, c.Queues, c.IQueues = 4, 2, 1
	c.Devices = 1 + int(seed%2)
	c.Records = 0
	if c.Zone = 0; seed%3 == 0 {
		c.Zone = 12
	}
	start := []Step{
		{Verb: Create, Arg: 1<<c.Devices - 1, Off: uint32(seed % 2), Len: 1 + uint32(seed%3), Queue: uint8(seed)},
		{Verb: Write, Off: 3, Len: 9},
		{Verb: Take, Gap: 2},
	}
	for i := range c.Steps {
		s := &c.Steps[i]
		s.Snap %= 2
		if s.Gap != settled {
			s.Gap = min(s.Gap, 4)
		}
		if s.Verb == Stick || s.Verb == Slow || s.Verb == Fill {
			s.Verb, s.Len = ImageRead, 30
		}
	}
	c.Steps = append(start, c.Steps...)
	return c
}

// eachSmall calls f with every small case, until it returns false.
func eachSmall(t *testing.T, f func(name string, c Case) bool) {
	t.Helper()
	generated, cases := uint64(6), scenes
	if quick() {
		generated, cases = 2, scenes[:1]
	}
	cases = slices.Concat(cases, logScenes, recordScenes)
	for seed := uint64(1); seed <= generated; seed++ {
		if !f(fmt.Sprintf("small %d", seed), small(seed)) {
			return
		}
	}
	for i, text := range cases {
		c, err := ParseCase(text)
		if err != nil {
			t.Fatal(err)
		}
		if !f(fmt.Sprintf("scene %d", i), c) {
			return
		}
	}
}

// TestScenes: the scenes are what they are said to be.
func TestScenes(t *testing.T) {
	for i, text := range scenes {
		c, err := ParseCase(text)
		if err != nil {
			t.Fatal(err)
		}
		s, f := Run(c, nil)
		if f != nil {
			t.Errorf("case %d: %v", i, f)
		}
		if s.Takes < 2 || s.Storages < 3 || s.Breaks > 0 {
			t.Errorf("case %d is no such case: %v, %d storages", i, s, s.Storages)
		}
	}
}

// TestFaultAtEveryOperation lets the n-th operation fail, for n = 0, 1, 2 …
// until there is none left, with every errno and every effect.
func TestFaultAtEveryOperation(t *testing.T) {
	runs := 0
	eachSmall(t, func(name string, c Case) bool {
		kinds := 2 * 3 * 3
		if quick() {
			kinds = 2 * 3
		}
		for kind := range kinds {
			on, effect, errno := 1+kind%2, kind/2%3, []int{5, 28, 12}[kind/6]
			for n := 0; ; n++ {
				c.FaultOn, c.FaultAfter, c.FaultCount, c.FaultErr, c.FaultEffect = on, n, 1, errno, effect
				s, f := Run(c, nil)
				runs++
				if f != nil {
					report(t, fmt.Sprintf("%s fault %d on %d errno %d effect %d", name, n, on, errno, effect), c, f)
					return false
				}
				if s.Faults == 0 {
					break
				}
			}
		}
		return true
	})
	t.Logf("%d runs", runs)
}

// TestNoMemory refuses the n-th chunk table, for every n.
func TestNoMemory(t *testing.T) {
	runs := 0
	eachSmall(t, func(name string, c Case) bool {
		for n := 1; ; n++ {
			c.NoMemory = n
			s, f := Run(c, nil)
			runs++
			if f != nil {
				report(t, fmt.Sprintf("%s table %d", name, n), c, f)
				return false
			}
			if s.Tables < n {
				return true
			}
		}
	})
	t.Logf("%d runs", runs)
}

// TestDeathAtEveryStep kills the process after n steps of the scheduler, for
// every n, and its successor after as many.
func TestDeathAtEveryStep(t *testing.T) {
	everyDeath(t, func(c *Config, n int) { c.KillStep = n })
}

// TestDeathInTakeOver kills the process after n steps of the records' scenes, and its
// successor at each step of its taking over.
func TestDeathInTakeOver(t *testing.T) {
	runs, stride := 0, 1
	if quick() || !mutation.Built { // make test runs both builds
		stride = 31
	}
	for i, text := range recordScenes {
		scene, err := ParseCase(text)
		if err != nil {
			t.Fatal(err)
		}
		eachTakeOver(scene, stride, func(c *Config, n int) { c.KillStep = n }, func(c Case, f *Failure) bool {
			if runs++; f != nil {
				report(t, fmt.Sprintf("record scene %d killed at %d and %d", i, c.KillStep, c.KillAgain), c, f)
			}
			return f == nil
		})
	}
	t.Logf("%d runs", runs)
}

// eachTakeOver runs a case with a death at every place, at says at which of them, and for
// each of these with a second one at each step of the taking over, as far as result says yes.
func eachTakeOver(c Case, stride int, at func(c *Config, n int), result func(c Case, f *Failure) bool) {
	c.Kills = 1
	for n := 1; ; n += stride {
		at(&c.Config, n)
		c.KillAgain = 0
		once, f := Run(c, nil)
		if !result(c, f) || once.Deaths == 0 {
			return
		}
		for c.KillAgain = 1; c.KillAgain <= int(once.TakeOver); c.KillAgain++ {
			if _, f := Run(c, nil); !result(c, f) {
				return
			}
		}
	}
}

func everyDeath(t *testing.T, at func(c *Config, n int)) {
	runs := 0
	eachSmall(t, func(name string, c Case) bool {
		for kills := 1; kills <= 2; kills++ {
			for n := 1; ; n++ {
				c.Kills = kills
				at(&c.Config, n)
				s, f := Run(c, nil)
				runs++
				if f != nil {
					report(t, fmt.Sprintf("%s kills %d at %d", name, kills, n), c, f)
					return false
				}
				if s.Deaths == 0 {
					break
				}
			}
		}
		return true
	})
	t.Logf("%d runs", runs)
}

// TestPowerFailureAtEveryStep cuts the power after n steps.
func TestPowerFailureAtEveryStep(t *testing.T) {
	runs := 0
	eachSmall(t, func(name string, c Case) bool {
		for i := range c.Steps {
			if s := &c.Steps[i]; s.Verb == ImageRead {
				s.Verb = Flush
			} else if s.Verb == Write {
				s.FUA = s.FUA || i%2 == 0
			}
		}
		for n := 1; ; n++ {
			c.PowerStep = n
			s, f := Run(c, nil)
			runs++
			if f != nil {
				report(t, fmt.Sprintf("%s power %d", name, n), c, f)
				return false
			}
			if s.Steps < uint64(n) {
				return true
			}
		}
	})
	t.Logf("%d runs", runs)
}

// TestRunsAreDetermined: a seed that is to be replayed must do the same again.
func TestRunsAreDetermined(t *testing.T) {
	for seed := uint64(1); seed < 2*uint64(profiles); seed++ {
		var a, b bytes.Buffer
		Run(Generate(seed, *flagSteps), &a)
		Run(Generate(seed, *flagSteps), &b)
		if !bytes.Equal(a.Bytes(), b.Bytes()) {
			t.Errorf("seed %d: two runs differ", seed)
		}
	}
}
