package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func TestSnapshotCommands(t *testing.T) {
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	runGolden(t, []golden{
		{"ublk-blksnap snapshot create vdb /dev/vdc --storage /var/tmp --storage /dev/vdd --limit 10g --chunk-size 4K",
			[]any{control.CreateRequest{Devices: []string{"vdb", "/dev/vdc"}, ChunkSize: 4096,
				Storage: []control.Storage{{Path: "/var/tmp", Limit: 10 << 30}, {Path: "/dev/vdd", Limit: 10 << 30}}}}, id1 + "\n"},
		{"ublk-blksnap snapshot create vdb --storage /s --take --no-freeze --no-hooks",
			[]any{control.CreateRequest{Devices: []string{"vdb"}, Storage: []control.Storage{{Path: "/s"}}, Take: true, NoFreeze: true, NoHooks: true}},
			"/dev/ublk-blksnap/images/vdb-" + id1 + "\n"},
		{"ublk-blksnap snapshot create vdb --storage /s --name nightly --ttl 1d12h --label job=backup --label note=a=b",
			[]any{control.CreateRequest{Devices: []string{"vdb"}, Storage: []control.Storage{{Path: "/s"}}, Name: "nightly", TTL: 36 * time.Hour,
				Labels: map[string]string{"job": "backup", "note": "a=b"}}}, id1 + "\n"},
		{"ublk-blksnap snapshot set latest --ttl 90s", []any{control.SetRequest{ID: "latest", TTL: 90 * time.Second}}, ""},
		{"ublk-blksnap snapshot set nightly --ttl none", []any{control.SetRequest{ID: "nightly"}}, ""},
		{"ublk-blksnap snapshot add " + id1 + " vdb", []any{control.SnapshotDeviceRequest{ID: id1, Device: "vdb"}}, ""},
		{"ublk-blksnap snapshot create vdb --storage /s --overwrite",
			[]any{control.CreateRequest{Devices: []string{"vdb"}, Storage: []control.Storage{{Path: "/s", Overwrite: true}}}}, id1 + "\n"},
		{"ublk-blksnap snapshot append " + id1 + " /s --overwrite",
			[]any{control.StorageRequest{ID: id1, Storage: control.Storage{Path: "/s", Overwrite: true}}}, ""},
		{"ublk-blksnap snapshot append " + id1 + " /s --limit 1M",
			[]any{control.StorageRequest{ID: id1, Storage: control.Storage{Path: "/s", Limit: 1 << 20}}}, ""},
		{"ublk-blksnap snapshot take " + id1, []any{control.TakeRequest{ID: id1}}, "/dev/ublk-blksnap/images/vdb-" + id1 + "\n"},
		{"ublk-blksnap snapshot take nightly --no-hooks", []any{control.TakeRequest{ID: "nightly", NoHooks: true}}, "/dev/ublk-blksnap/images/vdb-" + id1 + "\n"},
		{"ublk-blksnap snapshot take images/../nightly/vdb", []any{control.TakeRequest{ID: here + "/nightly/vdb"}}, "/dev/ublk-blksnap/images/vdb-" + id1 + "\n"},
		{"ublk-blksnap snapshot destroy " + id1 + " " + id2, []any{control.DestroyRequest{ID: id1}, control.DestroyRequest{ID: id2}}, ""},
		{"ublk-blksnap snapshot destroy --force " + id1, []any{control.DestroyRequest{ID: id1, Force: true}}, ""},
		// Each is found before the first one goes.
		{"ublk-blksnap snapshot destroy nightly latest " + id2, []any{"nightly", "latest", control.DestroyRequest{ID: id1}, control.DestroyRequest{ID: id2}}, ""},
		{"ublk-blksnap snapshot list", []any{"snapshots"}, "" +
			"UUID                                  NAME     STATE      CREATED              EXPIRES              CHUNK  COPIED  DEVICES  IMAGES\n" +
			id1 + "  nightly  taken      2025-01-02 03:04:05  2025-01-02 15:04:05  64K    1M      vdb      /dev/ublk-blksnap/images/vdb-" + id1 + "\n" +
			id2 + "  -        corrupted  2025-01-02 03:04:05  -                    4K     0       vdb      /dev/ublk-blksnap/images/vdb-" + id2 + "\n"},
		{"ublk-blksnap snapshot list --label job=backup --label x=1", []any{"snapshots"}, ""},
		{"ublk-blksnap snapshot info nightly --field take", []any{"nightly"}, id2 + ":3\n"},
		{"ublk-blksnap snapshot info nightly --field uuid", []any{"nightly"}, id1 + "\n"},
		{"ublk-blksnap snapshot info nightly --field expires", []any{"nightly"}, "2025-01-02T15:04:05Z\n"},
		{"ublk-blksnap snapshot info nightly --field image --json", []any{"nightly"}, "{\n  \"image\": [\n    \"/dev/ublk-blksnap/images/vdb-" + id1 + "\"\n  ]\n}\n"},
		{"ublk-blksnap snapshot info " + id1, []any{id1}, "" +
			"uuid:      " + id1 + "\n" +
			"name:      nightly\n" +
			"label:     job=backup\n" +
			"state:     taken\n" +
			"created:   2025-01-02T03:04:05Z\n" +
			"taken:     2025-01-02T03:04:05Z\n" +
			"frozen:    12ms\n" +
			"expires:   2025-01-02T15:04:05Z\n" +
			"chunk:     64K\n" +
			"copied:    1048576 bytes\n" +
			"stored:    524288 of 1073741824 bytes\n" +
			"used:      1M of 1G (0%), 3M/s, full in 5m41s\n" +
			"storage:   /var/tmp, at most 1G\n" +
			"storage:   /dev/vdd\n" +
			"image:     vdb (/dev/vdb) at /dev/ublk-blksnap/images/vdb-" + id1 + ", take " + id2 + ":3\n"},
		{"ublk-blksnap snapshot create vdb --auto-append /s --reserve 20%", []any{control.CreateRequest{Devices: []string{"vdb"}, AutoAppend: &control.AutoAppend{Path: "/s", Reserve: 20}}}, id1 + "\n"},
		{"ublk-blksnap snapshot create vdb --auto-append=", []any{control.CreateRequest{Devices: []string{"vdb"}, AutoAppend: &control.AutoAppend{}}}, id1 + "\n"},
		{"ublk-blksnap snapshot watch --since 7 " + id1, []any{control.WatchRequest{ID: id1, Since: 7}}, "" +
			"2025-01-02T03:04:05Z " + id1 + " taken name=nightly\n" +
			"2025-01-02T03:04:05Z " + id1 + " low_free_space requested_sectors=2097152 percent=80 bytes_per_second=3145728 time_left=1m8s\n" +
			"2025-01-02T03:04:05Z " + id1 + " corrupted device=254:16 error_code=-28\n" +
			"2025-01-02T03:04:05Z " + id1 + " destroyed\n"},
	})
	runRefused(t, map[string]string{
		"ublk-blksnap snapshot create vdb --reserve 5%":                    "ublk-blksnap: create: --reserve is for storage that is appended: give --auto-append too\n",
		"ublk-blksnap snapshot create vdb --auto-append /s --reserve 100%": `ublk-blksnap: create: invalid argument "100%" for "--reserve" flag: not a percentage`,
		"ublk-blksnap snapshot create vdb --limit 10x":                     `ublk-blksnap: create: invalid argument "10x" for "--limit"`,
		"ublk-blksnap snapshot create vdb --chunk-size 0":                  `ublk-blksnap: create: invalid argument "0" for "--chunk-size"`,
		"ublk-blksnap snapshot create vdb --no-freeze":                     "ublk-blksnap: create: --no-freeze is for the take",
		"ublk-blksnap snapshot create vdb --no-hooks":                      "ublk-blksnap: create: --no-hooks is for the take",
		"ublk-blksnap snapshot create vdb --take":                          "ublk-blksnap: create: --take needs a place for what is overwritten: give --storage too\n",
		"ublk-blksnap snapshot create vdb --ttl 12":                        `ublk-blksnap: create: invalid argument "12" for "--ttl" flag: no time to live: write 45m, 12h`,
		"ublk-blksnap snapshot create vdb --label a":                       "ublk-blksnap: create: --label a: write KEY=VALUE",
		"ublk-blksnap snapshot list --label a=1 --label a=2":               "ublk-blksnap: list: --label a=2: write KEY=VALUE, and each key once",
		"ublk-blksnap snapshot set nightly":                                "ublk-blksnap: set: nothing to change: give --ttl\n",
		"ublk-blksnap snapshot set nightly --ttl -1h":                      `ublk-blksnap: set: --ttl: "-1h" is no time to live`,
		"ublk-blksnap snapshot info nightly --field size":                  `ublk-blksnap: info: no field "size": use device, expires, image, name, state, take, uuid`,
		"ublk-blksnap snapshot add " + id1:                                 "ublk-blksnap: add: 1 argument given",
		"ublk-blksnap snapshot take":                                       "ublk-blksnap: take: 0 arguments given",
		"ublk-blksnap snapshot append " + id1 + " /s --limit -1":           `ublk-blksnap: append: invalid argument "-1" for "--limit"`,
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

// TestOverdueIsTold: a list says why a snapshot is there whose time is over.
func TestOverdueIsTold(t *testing.T) {
	f := newFake()
	f.snapshots[0].Overdue = "the image of vdb: mounted on /mnt"
	status, out, errs := execute(f, "ublk-blksnap", "snapshot", "list")
	if status != 0 || !strings.Contains(out, "nightly") ||
		errs != "ublk-blksnap: snapshot nightly: its time is over, and it is destroyed when nobody uses it: the image of vdb: mounted on /mnt\n" {
		t.Errorf("status %d, printed %q, said %q", status, out, errs)
	}
}

// TestWarningsAreTold: what a hook did wrong is said, beside the images.
func TestWarningsAreTold(t *testing.T) {
	for _, line := range []string{"snapshot take nightly", "snapshot create vdb --storage /s --take"} {
		f := newFake()
		f.snapshots[0].Warnings = []string{"hook db after the take: failed"}
		status, out, errs := execute(f, strings.Fields("ublk-blksnap "+line)...)
		if status != 0 || !strings.HasPrefix(out, "/dev/") || errs != "ublk-blksnap: warning: hook db after the take: failed\n" {
			t.Errorf("%s: status %d, printed %q, said %q", line, status, out, errs)
		}
	}
}

// TestStorageWarnings: what is wrong with storage that was given is said once, and nothing of storage from before.
func TestStorageWarnings(t *testing.T) {
	f := newFake()
	f.snapshots[0].Storage = []control.Storage{{Path: "/a", Warning: "far away"}, {Path: "/b", Warning: "wet"}, {Path: "/a", Warning: "far away"}}
	if _, _, errs := execute(f, "ublk-blksnap", "snapshot", "append", "nightly", "/a"); errs != "ublk-blksnap: warning: storage /a: far away\n" {
		t.Errorf("said %q", errs)
	}
}

// TestEmptyColumns: what there is not is a dash in a list, for people and for whoever counts columns.
func TestEmptyColumns(t *testing.T) {
	f := newFake()
	f.snapshots = f.snapshots[1:]
	f.snapshots[0].Images = nil
	if _, out, _ := execute(f, "ublk-blksnap", "snapshot", "list"); !strings.HasSuffix(out, "  0       -        -\n") {
		t.Errorf("printed\n%s", out)
	}
}

// TestCutOff: who uses force reads what that broke, and scripts find nothing more in the output. blksnap's own verb, which
// always forces, is as silent as blksnap is.
func TestCutOff(t *testing.T) {
	cut := control.CutOff{Users: []string{"mounted on /srv", "the image of vdb: opened by cp (process 7)"}, Snapshots: []string{"nightly"}}
	for line, want := range map[string]string{
		"remove --force vdb": "ublk-blksnap: remove vdb: I/O fails from now on: mounted on /srv\n" +
			"ublk-blksnap: remove vdb: I/O fails from now on: the image of vdb: opened by cp (process 7)\n" +
			"ublk-blksnap: remove vdb: snapshot nightly is destroyed\n",
		"snapshot destroy --force " + id1: "ublk-blksnap: destroy snapshot " + id1 + ": I/O fails from now on: mounted on /srv\n" +
			"ublk-blksnap: destroy snapshot " + id1 + ": I/O fails from now on: the image of vdb: opened by cp (process 7)\n" +
			"ublk-blksnap: destroy snapshot " + id1 + ": snapshot nightly is destroyed\n",
		"snapshot_destroy -i " + id1: "",
	} {
		f := newFake()
		f.cutOff = cut
		if status, out, errs := execute(f, strings.Fields("ublk-blksnap "+line)...); status != 0 || out != "" || errs != want {
			t.Errorf("%s: status %d, printed %q, said %q, want %q", line, status, out, errs, want)
		}
	}
}

// TestStorageIsSaid: a person reads how far new storage grows, of whichever command; a script does not.
func TestStorageIsSaid(t *testing.T) {
	for line, want := range map[string]string{
		"snapshot append nightly /srv/more": "ublk-blksnap: storage /srv/more, at most 5G, leaves 1G of its filesystem free\n",
		"snapshot create vdb --storage /srv/more": "ublk-blksnap: storage /var/tmp, at most 1G\n" +
			"ublk-blksnap: storage /srv/more, at most 5G, leaves 1G of its filesystem free\n",
	} {
		for _, person := range []bool{true, false} {
			f := newFake()
			f.snapshots[0].Storage = []control.Storage{{Path: "/var/tmp", Limit: 1 << 30}, {Path: "/srv/more", Most: 5 << 30, Spare: 1 << 30}}
			var o, e bytes.Buffer
			p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }, terminal: func(io.Writer) bool { return person }}
			said := want
			if !person {
				said = ""
			}
			if status := p.run(context.Background(), strings.Fields("ublk-blksnap "+line)); status != 0 || e.String() != said {
				t.Errorf("%s, person %v: status %d, said %q, want %q", line, person, status, e.String(), said)
			}
		}
	}
}
