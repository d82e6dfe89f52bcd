package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func TestBlksnapCommands(t *testing.T) {
	create := func(devices []string, storage []control.Storage) []any {
		return []any{control.CreateRequest{Devices: devices, Storage: storage, Attach: true}}
	}
	mark := []any{control.MarkRequest{Device: "vdb", Ranges: []control.Range{{Sector: 0, Count: 8}, {Sector: 16, Count: 8}}}}
	goldens := []golden{
		{"attach -d /dev/vdb", []any{control.AddRequest{Path: "/dev/vdb", Attach: control.AttachPossible}}, "Attached successfully\n"},
		{"attach --device=/dev/vdb", []any{control.AddRequest{Path: "/dev/vdb", Attach: control.AttachPossible}}, "Attached successfully\n"},
		{"detach -d /dev/vdb", []any{control.RemoveRequest{Device: "/dev/vdb"}}, ""},
		{"cbtinfo -d vdb", []any{"vdb"}, cbtInfoText},
		{"markdirtyblock -d vdb -r 0:8 16:8", mark, ""},
		{"markdirtyblock -d vdb -r 0:8 -r 16:8", mark, ""},
		{"markdirtyblock --ranges 0:8 16:8 --device vdb", mark, ""},
		{"snapshot_create -d vdb", create([]string{"vdb"}, nil), id1 + "\n"},
		{"snapshot_create -d vdb -d vdc", create([]string{"vdb", "vdc"}, nil), id1 + "\n"},
		{"snapshot_create --device vdb vdc --file /d --limit 10g", create([]string{"vdb", "vdc"}, []control.Storage{{Path: "/d", Limit: 10 << 30, OverwriteFile: true}}), id1 + "\n"},
		{"snapshot_add -i " + id1 + " -d vdb", []any{control.SnapshotDeviceRequest{ID: id1, Device: "vdb", Attach: true}}, ""},
		{"snapshot_appendstorage -i " + id1 + " -f /s", []any{control.StorageRequest{ID: id1, Storage: control.Storage{Path: "/s", OverwriteFile: true}}}, ""},
		{"snapshot_take --id=" + id1, []any{control.TakeRequest{ID: id1}}, ""},
		{"snapshot_destroy -i " + id1, []any{control.DestroyRequest{ID: id1, Force: true}}, ""},
		{"snapshot_info -d vdb", []any{"vdb", "snapshots"}, "error_code=-28\nimage=/dev/ublk-blksnap/images/vdb-" + id2 + "\n"},
		{"snapshot_info -d vdb -f image", []any{"vdb", "snapshots"}, "/dev/ublk-blksnap/images/vdb-" + id2 + "\n"},
		{"snapshot_info -d vdb --field error_code", []any{"vdb", "snapshots"}, "-28\n"},
		{"snapshot_collect", []any{"snapshots"}, id1 + "\n" + id2 + "\n\n"},
		{"snapshot_waitevent -i " + id1 + " -t 1500", []any{control.WaitRequest{ID: id1, Timeout: 1500 * time.Millisecond}},
			"result=ok\ntime=1735787045000000000\nevent=low_free_space\nrequested_nr_sect=2097152\n"},
		{"snapshot_watcher -i " + id1, nil, "Start snapshot watcher.\n" +
			"1735787045000000000 - low_free_space requested_nr_sect=2097152\n" +
			"1735787045000000000 - The snapshot was corrupted for device [254:16] with error \"No space left on device\".\n" +
			"Snapshot watcher finished.\n"},
		// boost::program_options takes long options that are cut short.
		{"markdirtyblock --range 0:8 16:8 --dev vdb", mark, ""},
		{"attach --d /dev/vdb", []any{control.AddRequest{Path: "/dev/vdb", Attach: control.AttachPossible}}, "Attached successfully\n"},
		{"snapshot_create --dev=vdb --fi=/d --lim=1G", create([]string{"vdb"}, []control.Storage{{Path: "/d", Limit: 1 << 30, OverwriteFile: true}}), id1 + "\n"},
		{"snapshot_info --device vdb --fi image", []any{"vdb", "snapshots"}, "/dev/ublk-blksnap/images/vdb-" + id2 + "\n"},
		{"snapshot_waitevent --i " + id1 + " --time 0", []any{control.WaitRequest{ID: id1}},
			"result=ok\ntime=1735787045000000000\nevent=low_free_space\nrequested_nr_sect=2097152\n"},
	}
	for _, name := range []string{"blksnap ", "ublk-blksnap "} {
		for _, g := range goldens {
			runGolden(t, []golden{{name + g.line, g.asked, g.out}})
		}
	}
	runRefused(t, map[string]string{
		"blksnap detach":                                     `blksnap: detach: required flag(s) "device" not set`,
		"blksnap snapshot_take -i 17":                        "blksnap: snapshot_take: --id 17: not a UUID",
		"blksnap snapshot_destroy -i x":                      "blksnap: snapshot_destroy: --id x: not a UUID",
		"blksnap snapshot_waitevent -i " + id1:               `blksnap: snapshot_waitevent: required flag(s) "timeout" not set`,
		"blksnap snapshot_waitevent -i " + id1 + " -t -1":    "blksnap: snapshot_waitevent: invalid argument",
		"blksnap snapshot_create -d vdb -f /s -l 10x":        `blksnap: snapshot_create: invalid argument "10x" for "-l, --limit"`,
		"blksnap markdirtyblock -d vdb":                      "blksnap: markdirtyblock: give --device and --ranges, or --file",
		"blksnap markdirtyblock -r 0:8":                      "blksnap: markdirtyblock: give --device and --ranges, or --file",
		"blksnap markdirtyblock -d vdb -f x -r 0:8":          "blksnap: markdirtyblock: give --ranges or --file, not both",
		"blksnap markdirtyblock -d vdb -r 8":                 `blksnap: markdirtyblock vdb: "8" is not a range`,
		"blksnap attach -d vdb -d vdc":                       `blksnap: attach: invalid argument "vdc" for "-d, --device" flag: given more than once`,
		"blksnap snapshot_take -i " + id1 + " --id=" + id2:   `blksnap: snapshot_take: invalid argument "` + id2 + `" for "-i, --id" flag: given more than once`,
		"blksnap snapshot_create -d vdb -f /a -d vdc -f /b":  `blksnap: snapshot_create: invalid argument "/b" for "-f, --file" flag: given more than once`,
		"blksnap markdirtyblock -d vdb --rangs 0:8":          "blksnap: markdirtyblock: unknown flag: --rangs",
		"blksnap attach --devices vdb":                       "blksnap: attach: unknown flag: --devices",
		"blksnap markdirtyblock -f /no/such/file":            "blksnap: markdirtyblock: open /no/such/file",
		"blksnap snapshot_info -d vdb -f size":               `blksnap: snapshot_info: no field "size"`,
		"blksnap snapshot_appendstorage -i " + id1:           `blksnap: snapshot_appendstorage: required flag(s) "file" not set`,
		"blksnap snapshot_appendstorage -i " + id1 + " /tmp": "blksnap: snapshot_appendstorage: 1 argument given",
	})
}

func TestAttachAgain(t *testing.T) {
	f := newFake()
	f.err = &control.Error{Code: control.Exists, Errno: unix.EALREADY, Message: "already added as vdb"}
	if status, out, errs := execute(f, "blksnap", "attach", "-d", "/dev/vdb"); status != 0 || out != "Already was attached\n" || errs != "" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	// The name of another disk's filter is no reason to think it attached.
	f.err = &control.Error{Code: control.Exists, Errno: unix.EEXIST, Message: "name taken"}
	if status, out, errs := execute(f, "blksnap", "attach", "-d", "/dev/vdb"); status != 1 || out != "" || errs != "blksnap: name taken\n" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	// The ways out are the daemon's own, in words that blksnap's users can follow.
	for fix, want := range map[string]string{
		"unmount it, add it with --boot, and mount it again; or put it under LVM once": "unmount it, add it with ublk-blksnap add --boot, and mount it again; or put it under LVM once",
		"unmount it and add it, without --attach; with --boot it has its filter":       "unmount it and attach it; with ublk-blksnap add --boot it has its filter",
	} {
		f.err = &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "add /dev/vdb: mounted on /mnt", Fix: fix}
		if _, _, errs := execute(f, "blksnap", "attach", "-d", "/dev/vdb"); errs != "blksnap: attach /dev/vdb: mounted on /mnt: "+want+"\n" {
			t.Errorf("%q, want %q", errs, want)
		}
	}
	f.err = &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "add /dev/vdb: used as swap space", Fix: "swapoff /dev/vdb first"}
	if _, _, errs := execute(f, "blksnap", "attach", "-d", "/dev/vdb"); errs != "blksnap: attach /dev/vdb: used as swap space: swapoff /dev/vdb first\n" {
		t.Errorf("%q", errs)
	}
}

func TestWaitEventResults(t *testing.T) {
	for code, want := range map[control.Code]string{
		control.Timeout: "result=timeout\n", control.Interrupted: "result=interrupted\n", control.NotFound: "result=not found\n",
	} {
		f := newFake()
		f.err = &control.Error{Code: code, Message: "x"}
		if status, out, errs := execute(f, "blksnap", "snapshot_waitevent", "-i", id1, "-t", "0"); status != 0 || out != want || errs != "" {
			t.Errorf("%s: status %d, %q, %q", code, status, out, errs)
		}
	}
	f := newFake()
	f.err = errors.New("broken")
	if status, out, errs := execute(f, "blksnap", "snapshot_waitevent", "-i", id1, "-t", "0"); status != 1 || out != "" || errs != "blksnap: broken\n" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	f = newFake()
	f.events = f.events[1:]
	_, out, _ := execute(f, "blksnap", "snapshot_waitevent", "-i", id1, "-t", "0")
	if out != "result=ok\ntime=1735787045000000000\nevent=corrupted\ndevice=254:16\nerror_code=-28\n" {
		t.Errorf("%q", out)
	}
}

// TestSnapshotInfoOfNone: a device that is attached, in no snapshot or in one that
// is not taken yet, has an image without a name.
func TestSnapshotInfoOfNone(t *testing.T) {
	f := newFake()
	untaken := control.Snapshot{ID: id2, State: control.SnapshotCreated, Images: []control.SnapshotImage{{Device: "vdb", Original: "/dev/vdb"}}}
	for _, snapshots := range [][]control.Snapshot{nil, {untaken}} {
		f.snapshots = snapshots
		if status, out, errs := execute(f, "blksnap", "snapshot_info", "-d", "vdb"); status != 0 || out != "error_code=0\nimage=/dev/\n" || errs != "" {
			t.Errorf("status %d, %q, %q", status, out, errs)
		}
	}
	// One that can be used comes before a newer one that cannot yet.
	f = newFake()
	f.snapshots = []control.Snapshot{f.snapshots[0], untaken}
	if status, out, _ := execute(f, "blksnap", "snapshot_info", "-d", "vdb", "-f", "image"); status != 0 || out != "/dev/ublk-blksnap/images/vdb-"+id1+"\n" {
		t.Errorf("status %d, %q", status, out)
	}
}

// TestWatcherOfNone: to blksnap a snapshot that is gone is the end of watching it.
func TestWatcherOfNone(t *testing.T) {
	for _, err := range []error{nil, &control.Error{Code: control.NotFound, Errno: unix.ESRCH, Message: "no such snapshot"}} {
		f := newFake()
		f.events, f.err = nil, err
		status, out, errs := execute(f, "blksnap", "snapshot_watcher", "-i", id1)
		if status != 0 || out != "Start snapshot watcher.\nThe snapshot no longer exists.\nSnapshot watcher finished.\n" || errs != "" {
			t.Errorf("%v: status %d, %q, %q", err, status, out, errs)
		}
	}
}

// TestLostToBlksnap: to blksnap a snapshot that a restart has ended does not exist.
func TestLostToBlksnap(t *testing.T) {
	lost := control.Event{Snapshot: id1, Kind: control.EventLost}
	for args, want := range map[string]string{
		"snapshot_watcher -i " + id1:        "Start snapshot watcher.\nThe snapshot no longer exists.\nSnapshot watcher finished.\n",
		"snapshot_waitevent -t 0 -i " + id1: "result=not found\n",
	} {
		f := newFake()
		f.events = []control.Event{lost, lost}
		if status, out, errs := execute(f, strings.Fields("blksnap "+args)...); status != 0 || out != want || errs != "" {
			t.Errorf("%s: status %d, %q, %q", args, status, out, errs)
		}
	}
}

// TestBlksnapsWords: what to do is said in the commands that blksnap has.
func TestBlksnapsWords(t *testing.T) {
	for _, c := range []struct {
		args []string
		err  control.Error
		want string
	}{
		{[]string{"detach", "-d", "vdb"}, control.Error{Message: "remove vdb: held by snapshot " + id1, Fix: "destroy it first: ublk-blksnap snapshot destroy " + id1},
			"detach vdb: held by snapshot " + id1 + ": destroy it first: blksnap snapshot_destroy -i " + id1},
		{[]string{"cbtinfo", "-d", "/dev/vdb"}, control.Error{Message: "change map of /dev/vdb: has no filter", Fix: "add it first: ublk-blksnap add /dev/vdb"},
			"change map of /dev/vdb: has no filter: attach it first: blksnap attach -d /dev/vdb"},
		{[]string{"attach", "-d", "/dev/vdb"}, control.Error{Message: "add /dev/vdb: being removed", Fix: "end that first: ublk-blksnap remove vdb"},
			"attach /dev/vdb: being removed: end that first: blksnap detach -d vdb"},
		{[]string{"attach", "-d", "/dev/vdb"}, control.Error{Message: "add /dev/vdb: left over", Fix: "remove that one first: ublk-blksnap remove --force /dev/ublkb3"},
			"attach /dev/vdb: left over: remove that one first: ublk-blksnap remove --force /dev/ublkb3"},
		{[]string{"cbtinfo", "-d", "/dev/vdb"}, control.Error{Message: "change map of /dev/vdb: lost with the daemon before", Fix: "add it again: ublk-blksnap add /dev/vdb --name data"},
			"change map of /dev/vdb: lost with the daemon before: attach it again: blksnap attach -d /dev/vdb"},
		{[]string{"snapshot_collect"}, control.Error{Message: "no daemon runs", Fix: "start it with systemctl start ublk-blksnap, ublk-blksnap add or ublk-blksnap daemon"},
			"no daemon runs: start it with systemctl start ublk-blksnap, blksnap attach or ublk-blksnap daemon"},
		{[]string{"attach", "-d", "/dev/vdb"}, control.Error{Message: "add /dev/vdb: the name vdb is taken", Fix: "choose another with --name"},
			"attach /dev/vdb: the name vdb is taken: choose another, with ublk-blksnap add --name"},
	} {
		f := newFake()
		f.err = &c.err
		if status, _, errs := execute(f, append([]string{"blksnap"}, c.args...)...); status != 1 || errs != "blksnap: "+c.want+"\n" {
			t.Errorf("%v: status %d, said %q, want %q", c.args, status, errs, c.want)
		}
	}
}

// TestMarkFile marks the blocks of a real file; where the filesystem does not
// tell its disk, the reason must be said and nothing marked.
func TestMarkFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFake()
	status, out, errs := execute(f, "blksnap", "markdirtyblock", "-f", file)
	if status != 0 {
		if !strings.HasPrefix(errs, "blksnap: markdirtyblock: "+file+": ") || len(f.asked) > 0 {
			t.Errorf("said %q, asked %v", errs, f.asked)
		}
		t.Logf("not on a disk here: %s", errs)
		return
	}
	r := f.asked[0].(control.MarkRequest)
	sectors := uint64(0)
	for _, x := range r.Ranges {
		sectors += x.Count
	}
	if sectors*512 < 100_000 || !strings.HasPrefix(out, "device="+r.Device+"\nrange="+r.Ranges[0].String()+"\n") {
		t.Errorf("marked %+v, printed %q", r, out)
	}
}
