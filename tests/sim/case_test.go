package sim

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// orders is in how many orders of things a case of seeds/ runs: what the engine
// does in between changes, and with it what one order means.
const orders = 24

// eachSeed calls f with every case of seeds/ and its text, in its own order.
func eachSeed(t *testing.T, f func(t *testing.T, text string, c Case)) {
	files, err := filepath.Glob("seeds/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d seeds, %v", len(files), err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			c, err := ParseCase(string(text))
			if err != nil {
				t.Fatal(err)
			}
			f(t, string(text), c)
		})
	}
}

// inOrders runs a case in its own order and in others until it fails.
func inOrders(c Case) *Failure {
	r := blockdevtest.NewRandom(c.Order)
	for range orders {
		if _, f := Run(c, nil); f != nil {
			return f
		}
		c.Order = r.Uint64() | 1
	}
	return nil
}

// TestRegressions runs what once failed, before anything else.
func TestRegressions(t *testing.T) {
	eachSeed(t, func(t *testing.T, _ string, c Case) {
		if f := inOrders(c); f != nil {
			t.Error(f)
		}
	})
}

func TestCaseText(t *testing.T) {
	for seed := uint64(1); seed < 20; seed++ {
		c := Generate(seed, 50)
		d, err := ParseCase(c.String())
		if err != nil {
			t.Fatal(err)
		}
		if d.String() != c.String() || d.Config != c.Config {
			t.Errorf("seed %d: reads back as another case", seed)
		}
	}
	for _, bad := range []string{"", "config Devices=9", "config Devices=1 Foo=2", "config Devices=1\nfly dev=1",
		"config Devices=1\nread dev=x", "config Devices=1\norder q"} {
		if _, err := ParseCase(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
