package sim

import (
	"regexp"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// Shrink makes a failing case smaller, as long as it goes on failing in the same
// way, for at most limit: by the same invariant, or what else the message begins
// with.
func Shrink(c Case, limit time.Duration) (Case, *Failure) {
	s := shrinker{best: c, until: time.Now().Add(limit), random: blockdevtest.NewRandom(c.Order)}
	_, s.failure = Run(c, nil)
	if s.failure == nil {
		return c, nil
	}
	s.drop(s.failure.Step, len(c.Steps)) // what never began
	for again := true; again && !s.late(); {
		again = s.pass()
	}
	return s.best, s.failure
}

type shrinker struct {
	best    Case
	failure *Failure
	until   time.Time
	random  blockdevtest.Random
}

// kind is what the message begins with: "I4", "panic", "snapshot".
func (f *Failure) kind() string { return regexp.MustCompile(`^\w+`).FindString(f.Message) }

func (s *shrinker) late() bool { return time.Now().After(s.until) }

// try runs a case in the order of the best one and, as what was left out has
// shifted every choice, in some others.
func (s *shrinker) try(c Case) bool {
	for i := 0; i < 8 && !s.late(); i++ {
		if i > 0 {
			c.Order = s.random.Uint64() | 1
		}
		if _, f := Run(c, nil); f != nil && f.kind() == s.failure.kind() {
			s.best, s.failure = c, f
			return true
		}
	}
	return false
}

// drop leaves out the steps from … to-1.
func (s *shrinker) drop(from, to int) bool {
	if from >= to || to > len(s.best.Steps) {
		return false
	}
	c := s.best
	c.Steps = append(append([]Step(nil), s.best.Steps[:from]...), s.best.Steps[to:]...)
	return s.try(c)
}

// pass tries everything once; true if something helped.
func (s *shrinker) pass() (helped bool) {
	for n := len(s.best.Steps) / 2; n > 0 && !s.late(); n /= 2 {
		for at := len(s.best.Steps) - n; at >= 0; at -= n {
			helped = s.drop(at, at+n) || helped
			at = min(at, len(s.best.Steps))
		}
	}
	for _, simpler := range []func(*Config){
		func(c *Config) { c.Devices = 1 },
		func(c *Config) { c.Devices = min(c.Devices, 2) },
		func(c *Config) { c.Queues = 1 },
		func(c *Config) { c.IQueues = 1 },
		func(c *Config) { c.Storages = 1 },
		func(c *Config) { c.Fixed = 0 },
		func(c *Config) { c.FaultOn = 0 },
		func(c *Config) { c.Kills, c.KillStep, c.KillPoint = 0, 0, 0 },
		func(c *Config) { c.Kills = min(c.Kills, 1) },
		func(c *Config) { c.KillAgain = 0 },
		func(c *Config) { c.Depth = max(c.Depth/2, 1) },
		func(c *Config) { c.Size0 = max(c.Size0/2/max(c.Sector, 1)*max(c.Sector, 1), 16) },
	} {
		c := s.best
		simpler(&c.Config)
		if c.Config != s.best.Config {
			helped = s.try(c) || helped
		}
	}
	for i := 0; i < len(s.best.Steps) && !s.late(); i++ {
		for _, simpler := range []func(*Step){
			func(t *Step) { t.Gap = 0 },
			func(t *Step) { t.FUA = false },
			func(t *Step) { t.Queue = 0 },
			func(t *Step) { t.Off &^= 7 },
			func(t *Step) { t.Len = min(t.Len, 1) },
			func(t *Step) { t.Len = min(t.Len, 8) },
		} {
			c := s.best
			c.Steps = append([]Step(nil), s.best.Steps...)
			simpler(&c.Steps[i])
			if c.Steps[i] != s.best.Steps[i] {
				helped = s.try(c) || helped
			}
		}
	}
	return helped
}
