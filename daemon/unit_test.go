package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStartUnit has a systemctl that writes down what it is asked, in place of
// the machine's.
func TestStartUnit(t *testing.T) {
	dir := t.TempDir()
	asked := filepath.Join(dir, "asked")
	script := "#!/bin/sh\necho \"$@\" >>" + asked + "\n[ \"$1\" = cat ] && exit ${CAT:-0}\necho cannot; exit ${START:-0}\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	defer func(old string) { systemdRuns = old }(systemdRuns)

	for _, c := range []struct {
		name       string
		runs       string
		s          Starter
		cat, start string
		started    bool
		err        string
		asked      string
	}{
		{"service", dir, Starter{Dir: DefaultRunDir}, "0", "0", true, "", "cat ublk-blksnap.service\nstart ublk-blksnap.service\n"},
		{"fails", dir, Starter{Dir: DefaultRunDir}, "0", "1", true, "cannot", "cat ublk-blksnap.service\nstart ublk-blksnap.service\n"},
		{"not installed", dir, Starter{Dir: DefaultRunDir}, "1", "0", false, "", "cat ublk-blksnap.service\n"},
		{"no systemd", dir + "/none", Starter{Dir: DefaultRunDir}, "0", "0", false, "", ""},
		{"another run directory", dir, Starter{Dir: RunDir(dir)}, "0", "0", false, "", ""},
		{"another configuration", dir, Starter{Dir: DefaultRunDir, ConfigPath: "/x"}, "0", "0", false, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			systemdRuns = c.runs
			t.Setenv("CAT", c.cat)
			t.Setenv("START", c.start)
			_ = os.Remove(asked)
			started, err := c.s.startUnit(context.Background())
			if started != c.started || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("started %v, %v; want %v, %q", started, err, c.started, c.err)
			}
			if b, _ := os.ReadFile(asked); string(b) != c.asked {
				t.Errorf("systemctl was asked %q, want %q", b, c.asked)
			}
		})
	}
}
