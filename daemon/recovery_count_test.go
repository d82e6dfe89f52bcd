package daemon

import (
	"os"
	"testing"
)

// TestCountRecovery: a daemon that gave way to another program has not died.
func TestCountRecovery(t *testing.T) {
	d := &Daemon{opts: Options{Dir: RunDir(t.TempDir()), Log: quiet()}}
	if err := os.MkdirAll(d.opts.Dir.State(), 0o700); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		died bool
		want int
	}{{false, 0}, {true, 1}, {false, 1}, {true, 2}} {
		if n := d.countRecovery(c.died); n != c.want {
			t.Errorf("step %d: counted %d, want %d", i, n, c.want)
		}
	}
}
