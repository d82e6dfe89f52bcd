package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

func TestConfigCommands(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
	for path, content := range map[string]string{good: "queues = 3\n", bad: "queues = 1\nquues = 3\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	runGolden(t, []golden{
		{"ublk-blksnap config check " + good, nil, good + ": ok\n"},
		{"ublk-blksnap config check --config " + good, nil, good + ": ok\n"},
	})
	disks := filepath.Join(dir, "disks.conf")
	if err := os.WriteFile(disks, []byte("[[device]]\nname = \"data\"\npath = \"/dev/disk/by-id/none\"\nqueues = 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	runGolden(t, []golden{
		{"ublk-blksnap config check " + disks, nil, disks + ": ok\nnote: " + disks + ":1: /dev/disk/by-id/none is not there now\n" +
			"note: udev keeps nobody from these disks: that is for the disks of /etc/ublk-blksnap.conf\n"},
	})
	if _, out, _ := execute(newFake(), "ublk-blksnap", "config", "show", disks); !strings.HasSuffix(out, "\n\n# "+disks+":1\n[[device]]\nname = \"data\"\npath = '/dev/disk/by-id/none'\nqueues = 2\n") {
		t.Errorf("show prints %s", out)
	}
	runRefused(t, map[string]string{
		"ublk-blksnap config check " + bad: "ublk-blksnap: " + bad + ":2: quues: no such parameter\n",
		"ublk-blksnap config show " + bad:  "ublk-blksnap: " + bad + ":2: quues: no such parameter\n",
	})
	runFailing(t, statusNotFound, map[string]string{
		"ublk-blksnap config check " + dir + "/nothing": "ublk-blksnap: read configuration: open " + dir + "/nothing: no such file",
	})

	// What show prints is a configuration file that says the same.
	status, out, _ := execute(newFake(), "ublk-blksnap", "config", "show", good)
	if status != 0 {
		t.Fatal(status)
	}
	shown := filepath.Join(dir, "shown")
	if err := os.WriteFile(shown, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := readConfig(good)
	if err != nil {
		t.Fatal(err)
	}
	b, err := readConfig(shown)
	if err != nil || a != b || a.Queues != 3 {
		t.Errorf("%+v\n%+v, %v", a, b, err)
	}
}

// TestExampleIsWhatShowPrints: the installed file documents every parameter in
// the same words.
func TestExampleIsWhatShowPrints(t *testing.T) {
	example, err := os.ReadFile("../../dist/ublk-blksnap.conf")
	if err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	cfg := daemon.DefaultConfig()
	writeConfig(&shown, &cfg)
	if !strings.HasSuffix(string(example), "\n\n"+shown.String()) {
		t.Error("dist/ublk-blksnap.conf does not end with what \"ublk-blksnap config show\" prints")
	}
}

func TestDaemonFlags(t *testing.T) {
	parse := func(args ...string) (daemon.Config, error) {
		flags := daemon.DefaultConfig()
		params := flags.Params()
		c := &cobra.Command{}
		for _, q := range params {
			c.Flags().Var(q.Value, q.Flag(), q.Doc)
		}
		if err := c.ParseFlags(args); err != nil {
			return flags, err
		}
		cfg := daemon.DefaultConfig()
		cfg.Queues, cfg.QueueDepth = 4, 16 // as from a file
		return cfg, override(&cfg, c.Flags(), params)
	}
	cfg, err := parse("--queues", "2", "--mode=copy", "--diff-buffer-pool-size=16M")
	if err != nil || cfg.Queues != 2 || cfg.QueueDepth != 16 || cfg.Mode != control.ModeCopy || cfg.DiffBufferPoolSize != 16<<20 {
		t.Errorf("%+v, %v", cfg, err)
	}
	for arg, want := range map[string]string{
		"--queue-depth=5000":       "--queue-depth: 5000 is not within 1 to 4096",
		"--chunk-maximum-shift=12": "--chunk-maximum-shift: 12 is below chunk_minimum_shift 16",
		"--chunk-minimum-shift=27": "--chunk-minimum-shift: 27 is not within 12 to 26",
		"--state-size=10x":         `invalid argument "10x" for "--state-size"`,
	} {
		if _, err := parse(arg); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", arg, err, want)
		}
	}
}

func TestDaemonWithBadConfig(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("queues = 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	runRefused(t, map[string]string{
		"ublk-blksnap daemon --config " + bad: "ublk-blksnap: " + bad + ":1: queues: 0 is not within 1 to 256",
		"ublk-blksnap daemon x":               "ublk-blksnap: daemon: 1 argument given",
		"ublk-blksnap daemon --queues=none":   `ublk-blksnap: daemon: invalid argument "none" for "--queues"`,
	})
}
