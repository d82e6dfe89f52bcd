package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func TestConfigFile(t *testing.T) {
	c := DefaultConfig()
	err := c.parse("f", `
# a comment
queues = 4
queue_depth = 32
mode = "copy"
diff_buffer_pool_size = "16M"
state_size = 2147483648
freeze_timeout = "500ms"
chunk_minimum_shift = 12
`)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.Queues, want.QueueDepth, want.Mode = 4, 32, control.ModeCopy
	want.DiffBufferPoolSize, want.StateSize, want.FreezeTimeout, want.ChunkMinimumShift = 16<<20, 2<<30, 500*time.Millisecond, 12
	if c != want {
		t.Fatalf("got %+v\nwant %+v", c, want)
	}
}

func TestConfigErrors(t *testing.T) {
	for content, want := range map[string]string{
		"\nquues = 4": "f:2: quues: no such parameter",
		"queues = 1\n\nqueue_deep = 4\nqueue_depth = 3": "f:3: queue_deep: no such parameter",
		"[cbt]\nx = 1":             "f:1: cbt: no such parameter",
		"queues = ":                "f:1: ",
		"queues = 0":               "f:1: queues: 0 is not within 1 to 256",
		"queues = -1":              `f:1: queues: "-1" is not a whole number`,
		"queues = 1.5":             "f:1: queues: not a number",
		"queues = [1]":             "f:1: queues: not a number",
		`mode = "fast"`:            `f:1: mode: "fast" is not a mode: write auto, copy or zerocopy`,
		"recovery = true":          "f:1: recovery: is gone, as every device outlives its daemon now: remove the line",
		`state_size = "10x"`:       `f:1: state_size: "10x" is not a size`,
		"queue_depth = 4097":       "f:1: queue_depth: 4097 is not within 1 to 4096",
		"chunk_minimum_shift = 11": "f:1: chunk_minimum_shift: 11 is not within 12 to 26",
		"chunk_minimum_shift = 20\nchunk_maximum_shift = 18":       "f:2: chunk_maximum_shift: 18 is below chunk_minimum_shift 20",
		"tracking_block_maximum_shift = 15":                        "f:1: tracking_block_maximum_shift: 15 is below tracking_block_minimum_shift 16",
		"tracking_block_maximum_count = 0":                         "f:1: tracking_block_maximum_count: 0 is not within 1 to",
		"chunk_minimum_shift = 26\ndiff_buffer_pool_size = \"1M\"": "f:2: diff_buffer_pool_size: 1M holds no chunk of chunk_minimum_shift 26",
		"state_size = \"100M\"":                                    "f:1: state_size: 100M is less than twice diff_buffer_pool_size 64M",
		"diff_storage_minimum = 8":                                 "f:1: diff_storage_minimum: 8 sectors hold no chunk of chunk_minimum_shift 16",
		`freeze_timeout = "1ms"`:                                   "f:1: freeze_timeout: 1ms is not within 100ms to 1h0m0s",
		`log_level = "loud"`:                                       `f:1: log_level: "loud" is not a level`,
		"queues = 1\nqueues = 2":                                   "f:2: ",
	} {
		c := DefaultConfig()
		err := c.parse("f", content)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", content, err, want)
		}
	}
}

func TestDefaultConfigIsValid(t *testing.T) {
	c := DefaultConfig()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := c.CBTParams().Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestReadConfigWithoutFile(t *testing.T) {
	c := DefaultConfig()
	if err := c.ReadConfig(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file asked for by name may not be missing")
	}
	if _, err := os.Stat(DefaultConfigPath); os.IsNotExist(err) {
		if err := c.ReadConfig(DefaultConfigPath); err != nil {
			t.Errorf("no default file: %v", err)
		}
	}
}

// TestExampleConfig: the file that is installed says what holds without it.
func TestExampleConfig(t *testing.T) {
	b, err := os.ReadFile("../dist/ublk-blksnap.conf")
	if err != nil {
		t.Fatal(err)
	}
	// Every value differs from the default first, so that each must be read.
	var c Config
	if err := c.parse("ublk-blksnap.conf", string(b)); err != nil {
		t.Fatal(err)
	}
	if c != DefaultConfig() {
		t.Errorf("the example file says %+v\nthe defaults are %+v", c, DefaultConfig())
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("queues = 4\nmode = \"copy\"")
	f.Add("[a]\nb = 1")
	f.Fuzz(func(t *testing.T, content string) {
		c := DefaultConfig()
		if c.parse("f", content) == nil {
			if err := c.Validate(); err != nil {
				t.Fatalf("accepted %q: %v", content, err)
			}
		}
	})
}

// TestUnit: systemd never kills a daemon that refused to stop because its disks
// are in use, and gives it no namespace of its own.
func TestUnit(t *testing.T) {
	b, err := os.ReadFile("../dist/ublk-blksnap.service")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, want := range []string{"KillMode=process", "SendSIGKILL=no"} {
		if !slices.Contains(lines, want) {
			t.Errorf("the unit does not say %s", want)
		}
	}
	for _, line := range lines {
		if key, _, _ := strings.Cut(line, "="); strings.HasPrefix(key, "Private") || strings.HasPrefix(key, "Protect") {
			t.Errorf("the unit says %s, which hides the state's mount", line)
		}
	}
}
