package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
		"ublk-blksnap remove vdb --boot --config " + config:              "ublk-blksnap: remove vdb: the configuration names no such disk",
		"ublk-blksnap add /dev/none --boot --config " + config:           "ublk-blksnap: add /dev/none: no such device",
		"ublk-blksnap add /dev/none --boot --dry-run --config " + config: "ublk-blksnap: add /dev/none: no such device",
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

// TestAddedBefore: a filter that stands is kept for the boot too, unless it came under a disk in use.
func TestAddedBefore(t *testing.T) {
	f := newFake()
	f.err = &control.Error{Code: control.Exists, Errno: unix.EALREADY, Message: "already added as vdb"}
	if d, err := addedBefore(context.Background(), f, control.AddRequest{Path: "/dev/vdb"}, f.err); err != nil || d.Name != "vdb" {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := addedBefore(context.Background(), f, control.AddRequest{Path: "/dev/vdb", Name: "other"}, f.err); !errors.Is(err, f.err) {
		t.Errorf("another name: %v", err)
	}
	f.status.Attached = true
	for _, dry := range []bool{false, true} {
		_, err := addedBefore(context.Background(), f, control.AddRequest{Path: "/dev/vdb", DryRun: dry}, f.err)
		if control.CodeOf(err) != control.Busy || !strings.Contains(err.Error(), "add /dev/vdb: the filter vdb came under it") || !strings.Contains(err.Error(), "remove vdb, unmount it, add it with --boot") {
			t.Errorf("attached: %v", err)
		}
	}
}

func TestDevicePath(t *testing.T) {
	dir := t.TempDir()
	inDirectory(t, dir)
	for _, err := range []error{
		os.WriteFile("file", nil, 0o600), os.Mkdir("folder", 0o700), os.Symlink("nothing", "dangling"), os.Symlink("/dev/null", "character"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	wants := map[string]string{
		"vdb": "vdb", "/dev/vdb": "/dev/vdb", "./vdb": dir + "/vdb", "": "", "/dev/../dev/vdb": "/dev/vdb",
		"file": "file", "folder": "folder", "dangling": "dangling", "character": "character", "./file": dir + "/file",
	}
	if node := blockDevice(t); node != "" {
		if err := os.Symlink(node, "disk"); err != nil {
			t.Fatal(err)
		}
		wants["disk"] = dir + "/disk"
	}
	for s, want := range wants {
		if got, err := devicePath(s); err != nil || got != want {
			t.Errorf("devicePath(%q) = %q, %v; want %q", s, got, err, want)
		}
	}
}

// inDirectory has the rest of the test work in a directory.
func inDirectory(t *testing.T, dir string) {
	t.Helper()
	old, err := os.Getwd()
	if err == nil {
		err = os.Chdir(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chdir(old) })
}

// blockDevice is the node of one, empty if this machine shows none.
func blockDevice(t *testing.T) string {
	nodes, err := os.ReadDir("/dev")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Type()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
			return "/dev/" + n.Name()
		}
	}
	return ""
}

// TestAddFileHere: what lies in the working directory is asked for only if no disk has its
// name, so that its owner hears that it is no disk.
func TestAddFileHere(t *testing.T) {
	inDirectory(t, t.TempDir())
	if err := os.WriteFile("disk.img", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := filepath.Abs("disk.img")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"ublk-blksnap add disk.img", "blksnap attach -d disk.img"} {
		f := newFake()
		if status, _, errs := execute(f, strings.Fields(line)...); status != 0 || len(f.asked) != 1 || f.asked[0].(control.AddRequest).Path != "disk.img" {
			t.Errorf("%s: status %d, said %q, asked %v", line, status, errs, f.asked)
		}
		f = newFake()
		f.err = &control.Error{Code: control.NotFound, Message: "no such device"}
		if execute(f, strings.Fields(line)...); len(f.asked) != 2 || f.asked[1].(control.AddRequest).Path != here {
			t.Errorf("%s, which no disk is called: asked %v", line, f.asked)
		}
		f.asked = nil
		if execute(f, strings.Fields(strings.ReplaceAll(line, "disk.img", "nothing"))...); len(f.asked) != 1 {
			t.Errorf("%s, of what is not here: asked %v", line, f.asked)
		}
	}
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
	// Of a disk that has its filter already there is no plan.
	f.device.Plan = nil
	if status, out, _ := execute(f, "ublk-blksnap", "add", "/dev/vdb", "--dry-run"); status != 0 || out != "/dev/vdb has its filter already, vdb\n" {
		t.Errorf("status %d, printed %q", status, out)
	}
}

// TestDryRunWithoutDaemon: no daemon is started, because that would put filters over the disks
// that the configuration names; which those are is told.
func TestDryRunWithoutDaemon(t *testing.T) {
	config := filepath.Join(t.TempDir(), "x.conf")
	for text, want := range map[string]string{
		"": "ublk-blksnap: add vdb: nothing was looked at: no daemon runs on /run/x, and --dry-run starts none: start it first: systemctl start ublk-blksnap, or ublk-blksnap daemon\n",
		"[[device]]\nname = \"a\"\npath = \"/dev/vg/a\"\n[[device]]\nname = \"b\"\npath = \"/dev/vg/b\"\n": "ublk-blksnap: add vdb: nothing was looked at: no daemon runs on /run/x, and --dry-run starts none: " +
			"start it first: systemctl start ublk-blksnap, or ublk-blksnap daemon; that gives the disks that the configuration names their filters: a, b\n",
	} {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var o, e bytes.Buffer
		p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) {
			return nil, &control.Error{Code: control.Unavailable, Errno: unix.ECONNREFUSED, Message: "no daemon runs on /run/x", Fix: "start it with add"}
		}}
		status := p.run(context.Background(), []string{"ublk-blksnap", "add", "vdb", "--dry-run", "--config", config})
		if status != statusNoDaemon || o.Len() > 0 || e.String() != want {
			t.Errorf("status %d, printed %q, said %q; want %q", status, &o, &e, want)
		}
	}
}
