package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

const cbtInfoText = "block_size=65536\ndevice_capacity=1073741824\nblock_count=16384\ngeneration_id=" + id2 + "\nchanges_number=3\n"

func TestCBTCommands(t *testing.T) {
	runGolden(t, []golden{
		{"ublk-blksnap cbt info vdb", []any{"vdb"}, cbtInfoText + "take=" + id2 + ":3\nhistory=new\nhistory_reason=written\nhistory_text=the disk was written to\n"},
		{"ublk-blksnap cbt map vdb", []any{"vdb"}, "\x00\x01\x02"},
		{"ublk-blksnap cbt changes vdb --since " + take(2).String(), []any{control.ChangesRequest{Device: "vdb", Since: take(2)}}, "0:128\n512:256\n"},
		{"ublk-blksnap cbt mark vdb 0:1 8:16", []any{control.MarkRequest{Device: "vdb", Ranges: []control.Range{{Sector: 0, Count: 1}, {Sector: 8, Count: 16}}}}, ""},
	})
	f := newFake()
	f.cbt.History = control.History{Continued: true}
	if _, out, _ := execute(f, "ublk-blksnap", "cbt", "info", "vdb"); !strings.HasSuffix(out, ":3\nhistory=continued\n") {
		t.Errorf("a history that goes on: %s", out)
	}
	f.cbt.PowerFailure = control.PowerFailure{Covered: true, ZoneSize: 1 << 20, ZoneCount: 1024, Logged: 3}
	if _, out, _ := execute(f, "ublk-blksnap", "cbt", "info", "vdb"); !strings.HasSuffix(out, "\npower_failure=covered\nzone_size=1048576\nzone_count=1024\nlogged_zones=3\n") {
		t.Errorf("a log: %s", out)
	}
	f.cbt.PowerFailure = control.PowerFailure{Reason: "no space"}
	if _, out, _ := execute(f, "ublk-blksnap", "cbt", "info", "vdb"); !strings.HasSuffix(out, "\npower_failure=uncovered\npower_failure_text=no space\n") {
		t.Errorf("no log: %s", out)
	}
	if _, out, _ := execute(f, "blksnap", "cbtinfo", "--device", "vdb"); strings.Contains(out, "power_failure") {
		t.Errorf("blksnap's own verb tells of it: %s", out)
	}
	f.device.History = control.History{Reason: control.HistoryWritten, Text: "why"}
	if status, out, errs := execute(f, "ublk-blksnap", "add", "vdb"); status != 0 || out != "/dev/ublk-blksnap/vdb\n" ||
		errs != "ublk-blksnap: vdb: change tracking begins anew, the next backup copies everything: why\n" {
		t.Errorf("added with a new generation: %d, %s%s", status, out, errs)
	}
	runRefused(t, map[string]string{
		"ublk-blksnap cbt changes vdb": "ublk-blksnap: changes: since which take?",
		"ublk-blksnap cbt changes vdb --since 3": `ublk-blksnap: changes: --since: "3" names no take: ` +
			`write GENERATION:N, as "snapshot info" and "cbt info" print it`,
		"ublk-blksnap cbt changes vdb --since 3 --generation x": "ublk-blksnap: changes: unknown flag: --generation",
		"ublk-blksnap cbt mark vdb":                             "ublk-blksnap: mark: 1 argument given",
		"ublk-blksnap cbt mark vdb 0:1 8":                       `ublk-blksnap: mark vdb: "8" is not a range`,
		"ublk-blksnap cbt mark vdb 0:0":                         `ublk-blksnap: mark vdb: range "0:0" is empty`,
	})
}

func TestCBTMapToFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "map")
	for _, args := range [][]string{
		{"ublk-blksnap", "cbt", "map", "vdb", "-o", file},
		{"blksnap", "readcbtmap", "-d", "vdb", "-f", file},
	} {
		os.Remove(file)
		status, out, errs := execute(newFake(), args...)
		b, err := os.ReadFile(file)
		if status != 0 || out != "" || errs != "" || err != nil || string(b) != "\x00\x01\x02" {
			t.Errorf("%v: status %d, %q, %q, file %q, %v", args, status, out, errs, b, err)
		}
	}
	status, _, errs := execute(newFake(), "ublk-blksnap", "cbt", "map", "vdb", "-o", filepath.Join(file, "x"))
	if status != 1 || errs == "" {
		t.Errorf("a file that cannot be written: status %d, %q", status, errs)
	}
}
