package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func TestDeviceCommands(t *testing.T) {
	runGolden(t, []golden{
		{"ublk-blksnap add /dev/vdb", []any{control.AddRequest{Path: "/dev/vdb"}}, "/dev/ublk-blksnap/vdb\n"},
		{"ublk-blksnap add vdb --intent-log=false --intent-log-zone 4M", []any{control.AddRequest{Path: "vdb", IntentLog: new(bool), IntentLogZone: 4 << 20}}, "/dev/ublk-blksnap/vdb\n"},
		{"ublk-blksnap add vdb --name n --queues 2 --depth 3 --mode zerocopy",
			[]any{control.AddRequest{Path: "vdb", Name: "n", Queues: 2, Depth: 3, Mode: control.ModeZeroCopy}}, "/dev/ublk-blksnap/vdb\n"},
		{"ublk-blksnap remove vdb", []any{control.RemoveRequest{Device: "vdb"}}, ""},
		{"ublk-blksnap remove --force /dev/vdb", []any{control.RemoveRequest{Device: "/dev/vdb", Force: true}}, ""},
		{"ublk-blksnap list", []any{"list"}, "" +
			"NAME  ORIGINAL  DEVICE       SIZE  MODE  QUEUES  SNAPSHOTS\n" +
			"vdb   /dev/vdb  /dev/ublkb0  1G    copy  2x64    2\n"},
		{"ublk-blksnap status vdb", []any{"vdb"}, `name:            vdb
original:        /dev/vdb (254:16)
device:          /dev/ublkb0 (259:0)
link:            /dev/ublk-blksnap/vdb
state:           live
size:            1073741824 bytes (1G)
block size:      512 logical, 4096 physical
queues:          2 of depth 64
mode:            copy
added:           2025-01-02T03:04:05Z
snapshots:       ` + id1 + " " + id2 + `
read:            10 requests, 5120 bytes
write:           0 requests, 0 bytes
flush:           3 requests, 0 bytes
discard:         0 requests, 0 bytes
write-zeroes:    0 requests, 0 bytes
errors:          1
in flight:       2
unregistered:    5 requests got an I/O error because the kernel did not register their payload
discards skipped: 4096 bytes that a snapshot needs
change tracking: 16384 blocks of 64K, take ` + id2 + ":3\n"},
	})
	config := filepath.Join(t.TempDir(), "x.conf")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	runFailing(t, statusNotFound, map[string]string{
		"ublk-blksnap remove vdb --boot --config " + config:    "ublk-blksnap: remove vdb: the configuration names no such disk",
		"ublk-blksnap add /dev/none --boot --config " + config: "ublk-blksnap: add /dev/none: no such device",
	})
	runRefused(t, map[string]string{
		"ublk-blksnap add vdb --mode fast":         `ublk-blksnap: add vdb: "fast" is not a mode`,
		"ublk-blksnap add vdb --intent-log-zone x": `ublk-blksnap: add vdb: --intent-log-zone: "x" is not a size`,
		"ublk-blksnap add vdb --queues 0":          "ublk-blksnap: add vdb: --queues 0: must be at least 1",
		"ublk-blksnap add vdb --depth=-5":          "ublk-blksnap: add vdb: --depth -5: must be at least 1",
		"ublk-blksnap status vdb vdc":              "ublk-blksnap: status: 2 arguments given",
		"ublk-blksnap status --interval 3s":        "ublk-blksnap: status: --interval is for --watch",
		"ublk-blksnap status --watch --interval 0": "ublk-blksnap: status: --interval 0s: must be 100ms at least",
		"ublk-blksnap top":                         "ublk-blksnap: top: needs a terminal: use status --watch",
		"ublk-blksnap remove vdb --forced":         "ublk-blksnap: remove: unknown flag: --forced",
		"ublk-blksnap remove --force a b c":        "ublk-blksnap: remove: 3 arguments given",
	})
}

func TestEmptyList(t *testing.T) {
	f := newFake()
	f.device = control.Device{}
	if status, out, errs := execute(f, "ublk-blksnap", "list"); status != 0 || out != "" || errs != "" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	if _, out, _ := execute(f, "ublk-blksnap", "list", "--json"); out != "[]\n" {
		t.Errorf("JSON %q", out)
	}
}

// TestDryRun: what would be made is told, and nothing is kept in mind.
func TestDryRun(t *testing.T) {
	f := newFake()
	f.device.Path, f.device.Link = "", ""
	f.device.History = control.History{Reason: control.HistoryNone, Text: "nothing was kept"}
	f.device.Plan = &control.AddPlan{Memory: 66 << 20, PowerFailure: control.PowerFailure{Covered: true}}
	status, out, errs := execute(f, "ublk-blksnap", "add", "/dev/vdb", "--dry-run", "--queues", "2")
	want := "name:            vdb\noriginal:        /dev/vdb (254:16)\nsize:            1073741824 bytes (1G)\nqueues:          2 of depth 64\n" +
		"mode:            copy\nmemory:          66M\nchange tracking: begins anew: nothing was kept\npower failure:   it goes on\n"
	if status != 0 || out != want || errs != "" || len(f.asked) != 1 || f.asked[0] != (control.AddRequest{Path: "/dev/vdb", Queues: 2, DryRun: true}) {
		t.Errorf("status %d, printed\n%swant\n%ssaid %q, asked %v", status, out, want, errs, f.asked)
	}
	if status, _, errs := execute(f, "ublk-blksnap", "add", "/dev/vdb", "--dry-run", "--boot"); status != statusUsage || !strings.Contains(errs, "--boot is not for a --dry-run") {
		t.Errorf("status %d, said %q", status, errs)
	}
}
