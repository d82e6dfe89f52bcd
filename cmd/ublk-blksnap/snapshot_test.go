package main

import (
	"encoding/json"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func TestSnapshotCommands(t *testing.T) {
	runGolden(t, []golden{
		{"ublk-blksnap snapshot create vdb /dev/vdc --storage /var/tmp --storage /dev/vdd --limit 10g --chunk-size 4K",
			[]any{control.CreateRequest{Devices: []string{"vdb", "/dev/vdc"}, ChunkSize: 4096,
				Storage: []control.Storage{{Path: "/var/tmp", Limit: 10 << 30}, {Path: "/dev/vdd", Limit: 10 << 30}}}}, id1 + "\n"},
		{"ublk-blksnap snapshot create vdb --storage /s --take --no-freeze",
			[]any{control.CreateRequest{Devices: []string{"vdb"}, Storage: []control.Storage{{Path: "/s"}}, Take: true, NoFreeze: true}}, id1 + "\n"},
		{"ublk-blksnap snapshot add " + id1 + " vdb", []any{control.SnapshotDeviceRequest{ID: id1, Device: "vdb"}}, ""},
		{"ublk-blksnap snapshot create vdb --storage /s --overwrite",
			[]any{control.CreateRequest{Devices: []string{"vdb"}, Storage: []control.Storage{{Path: "/s", Overwrite: true}}}}, id1 + "\n"},
		{"ublk-blksnap snapshot append " + id1 + " /s --overwrite",
			[]any{control.StorageRequest{ID: id1, Storage: control.Storage{Path: "/s", Overwrite: true}}}, ""},
		{"ublk-blksnap snapshot append " + id1 + " /s --limit 1M",
			[]any{control.StorageRequest{ID: id1, Storage: control.Storage{Path: "/s", Limit: 1 << 20}}}, ""},
		{"ublk-blksnap snapshot take " + id1, []any{control.TakeRequest{ID: id1}}, "vdb /dev/ublk-blksnap/images/vdb-" + id1 + " " + id2 + ":3\n"},
		{"ublk-blksnap snapshot destroy " + id1 + " " + id2, []any{id1, id2}, ""},
		{"ublk-blksnap snapshot list", []any{"snapshots"}, "" +
			"UUID                                  STATE      CREATED              CHUNK  COPIED  DEVICES  IMAGES\n" +
			id1 + "  taken      2025-01-02 03:04:05  64K    1M      vdb      /dev/ublk-blksnap/images/vdb-" + id1 + "\n" +
			id2 + "  corrupted  2025-01-02 03:04:05  4K     0       vdb      /dev/ublk-blksnap/images/vdb-" + id2 + "\n"},
		{"ublk-blksnap snapshot info " + id1, []any{id1}, "" +
			"uuid:      " + id1 + "\n" +
			"state:     taken\n" +
			"created:   2025-01-02T03:04:05Z\n" +
			"taken:     2025-01-02T03:04:05Z\n" +
			"frozen:    12ms\n" +
			"chunk:     64K\n" +
			"copied:    1048576 bytes\n" +
			"stored:    524288 of 1073741824 bytes\n" +
			"storage:   /var/tmp, at most 1G\n" +
			"storage:   /dev/vdd\n" +
			"image:     vdb (/dev/vdb) at /dev/ublk-blksnap/images/vdb-" + id1 + ", take " + id2 + ":3\n"},
		{"ublk-blksnap snapshot watch --since 7 " + id1, []any{control.WatchRequest{ID: id1, Since: 7}}, "" +
			"2025-01-02T03:04:05Z " + id1 + " taken\n" +
			"2025-01-02T03:04:05Z " + id1 + " low_free_space requested_sectors=2097152\n" +
			"2025-01-02T03:04:05Z " + id1 + " corrupted device=254:16 error_code=-28\n" +
			"2025-01-02T03:04:05Z " + id1 + " destroyed\n"},
	})
	runRefused(t, map[string]string{
		"ublk-blksnap snapshot create vdb --limit 10x":           `ublk-blksnap: create: invalid argument "10x" for "--limit"`,
		"ublk-blksnap snapshot create vdb --chunk-size 0":        `ublk-blksnap: create: invalid argument "0" for "--chunk-size"`,
		"ublk-blksnap snapshot create vdb --no-freeze":           "ublk-blksnap: create: --no-freeze is for the take",
		"ublk-blksnap snapshot create vdb --take":                "ublk-blksnap: create: --take needs a place for what is overwritten: give --storage too\n",
		"ublk-blksnap snapshot add " + id1:                       "ublk-blksnap: add: 1 arguments given",
		"ublk-blksnap snapshot take":                             "ublk-blksnap: take: 0 arguments given",
		"ublk-blksnap snapshot append " + id1 + " /s --limit -1": `ublk-blksnap: append: invalid argument "-1" for "--limit"`,
	})
}

// TestDestroyGoesOn: each one is tried, and each failure said.
func TestDestroyGoesOn(t *testing.T) {
	f := newFake()
	f.err = &control.Error{Code: control.NotFound, Errno: unix.ESRCH, Message: "no such snapshot"}
	status, _, errs := execute(f, "ublk-blksnap", "snapshot", "destroy", id1, id2)
	if status != statusNotFound || len(f.asked) != 2 || errs != "ublk-blksnap: no such snapshot\nublk-blksnap: no such snapshot\n" {
		t.Errorf("status %d, asked %v, said %q", status, f.asked, errs)
	}
	status, out, errs := execute(f, "ublk-blksnap", "snapshot", "destroy", id1, id2, "--json")
	failures := 0
	for d := json.NewDecoder(strings.NewReader(errs)); ; failures++ {
		var e struct{ Error control.Error }
		if err := d.Decode(&e); err != nil {
			break
		} else if e.Error.Code != control.NotFound {
			t.Errorf("%+v", e)
		}
	}
	if status != statusNotFound || failures != 2 || out != "[]\n" {
		t.Errorf("status %d, %d failures, printed %q, said %q", status, failures, out, errs)
	}
	f = newFake()
	var destroyed []string
	_, out, _ = execute(f, "ublk-blksnap", "snapshot", "destroy", id1, id2, "--json")
	if err := json.Unmarshal([]byte(out), &destroyed); err != nil || len(destroyed) != 2 {
		t.Errorf("printed %q", out)
	}
}

// TestBrokenInWords: people read words, not numbers of errors.
func TestBrokenInWords(t *testing.T) {
	f := newFake()
	f.snapshots = f.snapshots[1:]
	_, out, _ := execute(f, "ublk-blksnap", "snapshot", "info", id2)
	if strings.Count(out, "no space left on device (ENOSPC)") != 2 || strings.Contains(out, "-28") {
		t.Errorf("printed\n%s", out)
	}
}
