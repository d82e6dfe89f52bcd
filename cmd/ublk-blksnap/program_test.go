package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// fakeDaemon answers what a test put into it and remembers what it was asked.
type fakeDaemon struct {
	control.API
	asked []any
	err   error

	device    control.Device
	status    control.DeviceStatus
	snapshots []control.Snapshot
	cbt       control.CBTInfo
	events    []control.Event
	doing     string
	lost      *control.Lost
	config    string
	delay     time.Duration
	cutOff    control.CutOff
}

func (f *fakeDaemon) ask(r any) error {
	f.asked = append(f.asked, r)
	time.Sleep(f.delay)
	return f.err
}

func (f *fakeDaemon) Info(context.Context) (control.Info, error) {
	return control.Info{Lost: f.lost, Activity: f.doing, Config: f.config}, nil
}
func (f *fakeDaemon) AddDevice(_ context.Context, r control.AddRequest) (control.Device, error) {
	return f.device, f.ask(r)
}
func (f *fakeDaemon) RemoveDevice(_ context.Context, r control.RemoveRequest) (control.CutOff, error) {
	return f.cutOff, f.ask(r)
}
func (f *fakeDaemon) Devices(context.Context) ([]control.Device, error) {
	if f.device.Name == "" {
		return []control.Device{}, f.ask("list")
	}
	return []control.Device{f.device}, f.ask("list")
}
func (f *fakeDaemon) DeviceStatus(_ context.Context, d string) (control.DeviceStatus, error) {
	if errors.Is(f.err, unix.EALREADY) {
		return f.status, nil // attach asks for it after that
	}
	return f.status, f.ask(d)
}
func (f *fakeDaemon) CBTInfo(_ context.Context, d string) (control.CBTInfo, error) {
	return f.cbt, f.ask(d)
}
func (f *fakeDaemon) CBTMap(_ context.Context, d string, w io.Writer) (control.CBTInfo, error) {
	if err := f.ask(d); err != nil {
		return control.CBTInfo{}, err
	}
	_, err := w.Write([]byte{0, 1, 2})
	return f.cbt, err
}
func (f *fakeDaemon) CBTChanges(_ context.Context, r control.ChangesRequest, each func(control.Range) error) (control.CBTInfo, error) {
	if err := f.ask(r); err != nil {
		return control.CBTInfo{}, err
	}
	return f.cbt, errors.Join(each(control.Range{Sector: 0, Count: 128}), each(control.Range{Sector: 512, Count: 256}))
}
func (f *fakeDaemon) MarkDirty(_ context.Context, r control.MarkRequest) error { return f.ask(r) }
func (f *fakeDaemon) CreateSnapshot(_ context.Context, r control.CreateRequest) (control.Snapshot, error) {
	return f.snapshots[0], f.ask(r)
}
func (f *fakeDaemon) AddToSnapshot(_ context.Context, r control.SnapshotDeviceRequest) (control.Snapshot, error) {
	return control.Snapshot{}, f.ask(r)
}
func (f *fakeDaemon) AppendStorage(_ context.Context, r control.StorageRequest) (control.Snapshot, error) {
	return f.snapshots[0], f.ask(r)
}
func (f *fakeDaemon) TakeSnapshot(_ context.Context, r control.TakeRequest) (control.Snapshot, error) {
	return f.snapshots[0], f.ask(r)
}
func (f *fakeDaemon) SetSnapshot(_ context.Context, r control.SetRequest) (control.Snapshot, error) {
	return f.snapshots[0], f.ask(r)
}
func (f *fakeDaemon) DestroySnapshot(_ context.Context, r control.DestroyRequest) (control.CutOff, error) {
	return f.cutOff, f.ask(r)
}
func (f *fakeDaemon) Snapshots(context.Context) ([]control.Snapshot, error) {
	return f.snapshots, f.ask("snapshots")
}
func (f *fakeDaemon) Snapshot(_ context.Context, id string) (control.Snapshot, error) {
	return f.snapshots[0], f.ask(id)
}
func (f *fakeDaemon) WaitEvent(_ context.Context, r control.WaitRequest) (control.Event, error) {
	if err := f.ask(r); err != nil {
		return control.Event{}, err
	}
	return f.events[1], nil
}
func (f *fakeDaemon) Watch(_ context.Context, r control.WatchRequest, each func(control.Event) error) error {
	for _, e := range f.events {
		if err := each(e); err != nil {
			return err
		}
	}
	return f.ask(r)
}

const (
	id1 = "02e091ec-dae8-41ba-9dae-4e66f1473dd6"
	id2 = "6b1f2c9e-0a4e-4a57-8b7e-c3d2e1f0a9b8"
)

// take is a take of the device of newFake.
func take(n uint64) control.Take { return control.Take{Generation: uuid.MustParse(id2), Number: n} }

// newFake is a daemon with one device in two snapshots.
func newFake() *fakeDaemon {
	at := time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)
	d := control.Device{
		Name: "vdb", Original: "/dev/vdb", OriginalNumber: "254:16", Path: "/dev/ublkb0", Link: "/dev/ublk-blksnap/vdb",
		Number: "259:0", Size: 1 << 30, LogicalBlockSize: 512, PhysicalBlockSize: 4096, Queues: 2, Depth: 64,
		Mode: control.ModeCopy, Added: at, Snapshots: []string{id1, id2},
	}
	cbt := control.CBTInfo{DeviceCapacity: 1 << 30, BlockSize: 65536, BlockCount: 16384, GenerationID: id2, ChangesNumber: 3, Take: take(3),
		History: control.History{Reason: control.HistoryWritten, Text: "the disk was written to"}}
	last := take(3)
	image := control.SnapshotImage{Device: "vdb", Original: "/dev/vdb", Path: "/dev/ublkb1",
		Link: "/dev/ublk-blksnap/images/vdb-" + id1, Take: &last}
	expires := at.Add(12 * time.Hour)
	broken := image
	broken.Link, broken.Errno = "/dev/ublk-blksnap/images/vdb-"+id2, -28
	return &fakeDaemon{
		device: d,
		status: control.DeviceStatus{Device: d, State: "live", Errors: 1, InFlight: 2, DiscardsSkipped: 4096, Unregistered: 5,
			Operations: map[string]control.Operation{control.OpRead: {Requests: 10, Bytes: 5120}, control.OpFlush: {Requests: 3}}, CBT: &cbt},
		cbt: cbt,
		snapshots: []control.Snapshot{
			{ID: id1, Name: "nightly", Labels: map[string]string{"job": "backup"}, Expires: &expires, State: control.SnapshotTaken, Created: at, Taken: &at, ChunkSize: 65536, Frozen: 12 * time.Millisecond,
				Images: []control.SnapshotImage{image}, Storage: []control.Storage{{Path: "/var/tmp", Limit: 1 << 30}, {Path: "/dev/vdd"}},
				Usage: control.SnapshotUsage{
					Copied: 1 << 20, Stored: 1 << 19, Capacity: 1 << 30, Limit: 1 << 30, Need: 4 << 30, Rate: 3 << 20, Left: 341 * time.Second,
				}},
			{ID: id2, State: control.SnapshotCorrupted, Created: at, ChunkSize: 4096, Errno: -28, Images: []control.SnapshotImage{broken}},
		},
		events: []control.Event{
			{Seq: 0, Time: at, Snapshot: id1, Name: "nightly", Kind: control.EventTaken},
			{Seq: 1, Time: at, Snapshot: id1, Kind: control.EventLowFreeSpace, Sectors: 2097152, Percent: 80, Rate: 3 << 20, Left: 68 * time.Second},
			{Seq: 2, Time: at, Snapshot: id1, Kind: control.EventCorrupted, Device: "254:16", Errno: -28},
			{Seq: 3, Time: at, Snapshot: id1, Kind: control.EventDestroyed},
		},
	}
}

// execute runs a command line against a fake daemon.
func execute(f *fakeDaemon, args ...string) (status int, out, errs string) {
	return executeAPI(f, args...)
}

func executeAPI(f control.API, args ...string) (status int, out, errs string) {
	var o, e bytes.Buffer
	p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }, driver: func() error { return nil }}
	status = p.run(context.Background(), args)
	return status, o.String(), e.String()
}

// TestRelativePaths: the daemon works in another directory than the command.
func TestRelativePaths(t *testing.T) {
	var o, e bytes.Buffer
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	f := newFake()
	f.config = filepath.Join(filepath.Dir(here), "conf")
	p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }}
	if status := p.run(context.Background(), []string{"ublk-blksnap", "--run-dir", "run", "--config", "../conf", "list"}); status != 0 {
		t.Fatalf("status %d: %s", status, e.String())
	}
	if want := filepath.Join(here, "run"); p.runDir != want {
		t.Errorf("run directory %s, want %s", p.runDir, want)
	}
	if p.configPath != f.config {
		t.Errorf("configuration %s, want %s", p.configPath, f.config)
	}
}

// TestAnotherConfig: a configuration that the daemon does not have is not passed
// over.
func TestAnotherConfig(t *testing.T) {
	for _, line := range []string{"add vdb", "list", "snapshot watch", "snapshot_waitevent -t 0 -i " + id1, "snapshot_watcher -i " + id1} {
		f := newFake()
		f.config = "/etc/ublk-blksnap.conf"
		status, out, errs := execute(f, strings.Fields("ublk-blksnap --config /my/conf "+line)...)
		want := "ublk-blksnap: --config /my/conf: a daemon runs that was started with /etc/ublk-blksnap.conf: stop it first, or leave --config out\n"
		if status == 0 || out != "" || errs != want || len(f.asked) > 0 {
			t.Errorf("%s: status %d, printed %q, said %q, asked %v", line, status, out, errs, f.asked)
		}
	}
}

// TestOnATerminal: a person learns that a list is empty and what takes long, a
// script gets results and errors alone.
func TestOnATerminal(t *testing.T) {
	for line, want := range map[string]string{"list": "no filters\n", "snapshot list": "no snapshots\n", "list --json": "[]\n"} {
		for _, person := range []bool{true, false} {
			var o, e bytes.Buffer
			f := newFake()
			f.device, f.snapshots = control.Device{}, []control.Snapshot{}
			p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }, terminal: func(io.Writer) bool { return person }}
			status := p.run(context.Background(), strings.Fields("ublk-blksnap "+line))
			p.say("starting the daemon")
			said := ""
			if person {
				said = "ublk-blksnap: starting the daemon\n"
			} else if !strings.Contains(line, "json") {
				want = ""
			}
			if status != 0 || o.String() != want || e.String() != said {
				t.Errorf("%s, person %v: status %d, printed %q, said %q", line, person, status, o.String(), e.String())
			}
		}
	}
	if isTerminal(os.NewFile(^uintptr(0), "closed")) || isTerminal(&bytes.Buffer{}) {
		t.Error("what is no terminal is one")
	}
	if pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err != nil || !isTerminal(pty) {
		t.Errorf("a terminal is none, %v", err)
	}
}

// TestInterruptedWatch: who has seen enough makes no error, but says it by the
// status.
func TestInterruptedWatch(t *testing.T) {
	for _, line := range []string{"snapshot watch", "snapshot watch " + id1 + " --json", "snapshot_watcher -i " + id1} {
		var o, e bytes.Buffer
		f := newFake()
		f.events, f.err = nil, &control.Error{Code: control.Interrupted, Errno: unix.EINTR, Message: "ask the daemon: interrupted"}
		p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if status := p.run(ctx, strings.Fields("ublk-blksnap "+line)); status != statusInterrupted || e.Len() > 0 {
			t.Errorf("%s: status %d, said %q", line, status, e.String())
		}
	}
}

// golden is a command line, what the daemon must be asked and what must be
// printed.
type golden struct {
	line  string
	asked []any
	out   string
}

func runGolden(t *testing.T, goldens []golden) {
	t.Helper()
	for _, g := range goldens {
		f := newFake()
		status, out, errs := execute(f, strings.Fields(g.line)...)
		if status != 0 || errs != "" {
			t.Errorf("%s: status %d: %s", g.line, status, errs)
		}
		if out != g.out {
			t.Errorf("%s printed\n%swant\n%s", g.line, out, g.out)
		}
		if !reflect.DeepEqual(f.asked, g.asked) {
			t.Errorf("%s asked for %+v, want %+v", g.line, f.asked, g.asked)
		}
	}
}

// refused are command lines that make no sense: they must fail without the
// daemon being asked, with what they must say.
func runRefused(t *testing.T, refused map[string]string) {
	t.Helper()
	runFailing(t, statusUsage, refused)
}

// runFailing is runRefused with another status; blksnap knows only one.
func runFailing(t *testing.T, wantStatus int, failing map[string]string) {
	t.Helper()
	for line, want := range failing {
		f := newFake()
		status, out, errs := execute(f, strings.Fields(line)...)
		wantStatus := wantStatus
		if strings.HasPrefix(line, "blksnap ") {
			wantStatus = 1
		}
		if status != wantStatus || out != "" || !strings.HasPrefix(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: status %d, printed %q, said %q; want %q", line, status, out, errs, want)
		}
		if len(f.asked) > 0 {
			t.Errorf("%s: the daemon was asked for %+v", line, f.asked)
		}
	}
}

func TestErrorsOfTheDaemon(t *testing.T) {
	f := newFake()
	f.err = &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "add /dev/vdb: mounted on /mnt", Fix: "unmount it first"}
	status, out, errs := execute(f, "ublk-blksnap", "add", "/dev/vdb")
	if status != statusBusy || out != "" || errs != "ublk-blksnap: add /dev/vdb: mounted on /mnt: unmount it first\n" {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
	status, out, errs = execute(f, "ublk-blksnap", "add", "/dev/vdb", "--json")
	var e struct {
		Error map[string]string `json:"error"`
	}
	if err := json.Unmarshal([]byte(errs), &e); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"code": "busy", "errno": "EBUSY", "message": "add /dev/vdb: mounted on /mnt", "fix": "unmount it first"}
	if status != statusBusy || out != "" || !reflect.DeepEqual(e.Error, want) {
		t.Errorf("status %d, %q, %v", status, out, e.Error)
	}
}

// TestExitStatuses: what a script goes by. blksnap's own commands know only that
// they failed, under either name.
func TestExitStatuses(t *testing.T) {
	for _, c := range []struct {
		err    error
		status int
	}{
		{nil, 0},
		{errors.New("whatever"), 1},
		{&control.Error{Code: control.Internal}, 1},
		{&control.Error{Code: control.Exists}, 1},
		{&control.Error{Code: control.Denied}, 1},
		{&control.Error{Code: control.NoSpace}, 1},
		{&control.Error{Code: control.Invalid}, 2},
		{&control.Error{Code: control.NotFound}, 3},
		{&control.Error{Code: control.Unavailable}, 4},
		{&control.Error{Code: control.Busy}, 5},
		{&control.Error{Code: control.GenerationEnded}, 6},
		{&control.Error{Code: control.Corrupted}, 7},
		{&control.Error{Code: control.Timeout}, 8},
		{&control.Error{Code: control.Interrupted}, 130},
	} {
		f := newFake()
		f.err = c.err
		blksnap := min(c.status, 1)
		if c.status == 130 {
			blksnap = 130
		}
		for line, want := range map[string]int{
			"ublk-blksnap list":                       c.status,
			"ublk-blksnap list --json":                c.status,
			"ublk-blksnap snapshot_destroy -i " + id1: blksnap,
			"blksnap snapshot_destroy -i " + id1:      blksnap,
		} {
			if status, _, errs := execute(f, strings.Fields(line)...); status != want {
				t.Errorf("%s with %v: status %d, want %d, said %q", line, c.err, status, want, errs)
			}
		}
	}
	if _, out, _ := execute(newFake(), "ublk-blksnap", "--help"); !strings.Contains(out, statusHelp) {
		t.Errorf("--help does not tell the exit statuses:\n%s", out)
	}
	if status, _, _ := execute(newFake(), "ublk-blksnap", "snapshot_take", "-i", "17"); status != 1 {
		t.Errorf("wrong usage of a command of blksnap's: status %d", status)
	}
}

// TestWhatStartsADaemon: what makes something may start any. What only looks, or
// needs what only a daemon can have, starts one only if a dead one left something that
// waits for it. A stop starts none.
func TestWhatStartsADaemon(t *testing.T) {
	for line, want := range map[string]starts{
		"ublk-blksnap add vdb": startFirst, "ublk-blksnap add vdb --dry-run": startNone, "ublk-blksnap remove vdb": startNext, "ublk-blksnap snapshot create vdb --storage /s": startFirst,
		"blksnap attach -d vdb": startFirst, "blksnap detach -d vdb": startNext, "blksnap snapshot_create -d vdb": startFirst,
		"ublk-blksnap list": startNext, "ublk-blksnap status vdb": startNext, "ublk-blksnap status": startNext, "ublk-blksnap status --watch": startNext, "ublk-blksnap cbt info vdb": startNext, "ublk-blksnap cbt map vdb": startNext,
		"ublk-blksnap cbt changes vdb --since " + take(1).String(): startNext, "ublk-blksnap cbt mark vdb 0:1": startNext,
		"ublk-blksnap snapshot list": startNext, "ublk-blksnap snapshot info " + id1: startNext, "ublk-blksnap snapshot set latest --ttl 1h": startNext, "ublk-blksnap snapshot watch " + id1: startNext,
		"ublk-blksnap snapshot take " + id1: startNext, "ublk-blksnap snapshot add " + id1 + " vdb": startNext,
		"ublk-blksnap snapshot append " + id1 + " /s": startNext, "ublk-blksnap daemon stop": startNone, "ublk-blksnap daemon reload": startNext, "ublk-blksnap snapshot destroy " + id1: startNext,
		"blksnap cbtinfo -d vdb": startNext, "blksnap readcbtmap -d vdb -f /dev/null": startNext, "blksnap markdirtyblock -d vdb -r 0:1": startNext,
		"blksnap snapshot_add -i " + id1 + " -d vdb": startNext, "blksnap snapshot_appendstorage -i " + id1 + " -f /s": startNext,
		"blksnap snapshot_take -i " + id1: startNext, "blksnap snapshot_destroy -i " + id1: startNext, "blksnap snapshot_info -d vdb": startNext,
		"blksnap snapshot_collect": startNext, "blksnap snapshot_waitevent -t 1 -i " + id1: startNext, "blksnap snapshot_watcher -i " + id1: startNext,
	} {
		var o, e bytes.Buffer
		asked := 0
		p := &program{out: &o, err: &e, driver: func() error { return nil }, connect: func(_ context.Context, start starts) (control.API, error) {
			asked++
			if start != want {
				t.Errorf("%s: starts %v, want %v", line, start, want)
			}
			return nil, &control.Error{Code: control.Unavailable, Message: "no daemon runs"}
		}}
		status := p.run(context.Background(), strings.Fields(line))
		if want := map[bool]int{true: 1, false: statusNoDaemon}[strings.HasPrefix(line, "blksnap")]; asked != 1 || status != want || o.String() != "" {
			t.Errorf("%s: asked %d times, status %d, %q %q", line, asked, status, &o, &e)
		}
	}
}

// TestLostIsTold: beside what there is, what could not be taken over.
func TestLostIsTold(t *testing.T) {
	f := newFake()
	f.lost = &control.Lost{PID: 7, Devices: []control.LostDevice{{Name: "old", Original: "/dev/vdc", Path: "/dev/ublkb4", Waits: true, Reason: "no such device"}}}
	for _, line := range []string{"ublk-blksnap list", "ublk-blksnap snapshot list --json"} {
		status, out, errs := execute(f, strings.Fields(line)...)
		if status != 0 || out == "" || errs != "ublk-blksnap: the daemon before (process 7) died; not taken over: the filter old over /dev/vdc (/dev/ublkb4), whose I/O waits: no such device\n" {
			t.Errorf("%s: status %d, %q", line, status, errs)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	var o, e bytes.Buffer
	p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) {
		return nil, &control.Error{Code: control.Denied, Message: "start the daemon: not root", Fix: "run this as root"}
	}}
	if p.run(context.Background(), []string{"ublk-blksnap", "list"}) != 1 || e.String() != "ublk-blksnap: start the daemon: not root: run this as root\n" {
		t.Errorf("%q %q", o.String(), e.String())
	}
}

// TestJSONEverywhere: every command that prints prints JSON with --json.
func TestJSONEverywhere(t *testing.T) {
	for _, line := range []string{
		"ublk-blksnap add /dev/vdb", "ublk-blksnap list", "ublk-blksnap status vdb", "ublk-blksnap status", "ublk-blksnap version", "ublk-blksnap config show",
		"ublk-blksnap config check", "ublk-blksnap snapshot create vdb --storage /var/tmp", "ublk-blksnap snapshot take " + id1,
		"ublk-blksnap snapshot list", "ublk-blksnap snapshot info " + id1, "ublk-blksnap snapshot destroy " + id1, "ublk-blksnap cbt info vdb", "ublk-blksnap cbt map vdb",
		"ublk-blksnap cbt changes vdb --since " + take(1).String(), "blksnap attach -d vdb", "blksnap cbtinfo -d vdb",
		"blksnap snapshot_create -d vdb", "blksnap snapshot_info -d vdb", "blksnap snapshot_info -d vdb -f image",
		"blksnap snapshot_collect", "blksnap snapshot_waitevent -t 1 -i " + id1,
	} {
		for _, flag := range []string{" --json", " -j"} {
			status, out, errs := execute(newFake(), strings.Fields(line+flag)...)
			if status != 0 || !json.Valid([]byte(out)) {
				t.Errorf("%s: status %d, printed %q, said %q", line+flag, status, out, errs)
			}
		}
	}
	// Streams are a line of JSON an event.
	for _, line := range []string{"ublk-blksnap snapshot watch " + id1 + " --json", "blksnap snapshot_watcher -i " + id1 + " --json"} {
		_, out, _ := execute(newFake(), strings.Fields(line)...)
		for _, event := range strings.Split(strings.TrimSpace(out), "\n") {
			if !json.Valid([]byte(event)) {
				t.Errorf("%s: event %q", line, event)
			}
		}
	}
}

func TestUsage(t *testing.T) {
	runRefused(t, map[string]string{
		"ublk-blksnap explode":                               `ublk-blksnap: no command "explode": see ublk-blksnap --help`,
		"ublk-blksnap snapshot burn":                         `ublk-blksnap: no command "burn": see ublk-blksnap snapshot --help`,
		"ublk-blksnap cbt x":                                 `ublk-blksnap: no command "x": see ublk-blksnap cbt --help`,
		"ublk-blksnap add":                                   "ublk-blksnap: add: 0 arguments given: use ublk-blksnap add DEV [flags]",
		"ublk-blksnap add a b":                               "ublk-blksnap: add: 2 arguments given: use ",
		"ublk-blksnap add vdb --deep":                        "ublk-blksnap: add: unknown flag: --deep: see ublk-blksnap add --help",
		"ublk-blksnap list x":                                "ublk-blksnap: list: 1 argument given: use ",
		"blksnap add /dev/vdb":                               `blksnap: no command "add": see blksnap --help`,
		"blksnap attach":                                     `blksnap: attach: required flag(s) "device" not set`,
		"ublk-blksnap add vdb --queues=x":                    `ublk-blksnap: add: invalid argument "x" for "--queues" flag: not a whole number: see ublk-blksnap add --help`,
		"ublk-blksnap add vdb --queues=99999999999999999999": `ublk-blksnap: add: invalid argument "99999999999999999999" for "--queues" flag: out of range: see`,
		"ublk-blksnap daemon --queues=x":                     `ublk-blksnap: daemon: invalid argument "x" for "--queues" flag: not a whole number: see`,
		"ublk-blksnap snapshot create --limit 9x":            `ublk-blksnap: create: invalid argument "9x" for "--limit" flag: not a size: write a number and K, M, G or T: see`,
		"ublk-blksnap list --json=x":                         `ublk-blksnap: list: invalid argument "x" for "-j, --json" flag: neither true nor false: see`,
		"ublk-blksnap completion tcsh":                       "ublk-blksnap: completion: no shell \"tcsh\": use bash, fish, zsh\n",
		"ublk-blksnap --nonsense":                            "ublk-blksnap: unknown flag: --nonsense: see ublk-blksnap --help\n",
	})
	// What to do was left out: help, and what is wrong.
	for line, want := range map[string]int{"ublk-blksnap": 2, "ublk-blksnap cbt": 2, "ublk-blksnap snapshot": 2, "ublk-blksnap config": 2, "blksnap": 1} {
		status, out, errs := execute(newFake(), strings.Fields(line)...)
		if status != want || out != "" || len(errs) < 200 || !strings.HasSuffix(errs, strings.Fields(line)[0]+": no command given: see "+line+" --help\n") {
			t.Errorf("%s: status %d, want %d, printed %q, said %q", line, status, want, out, errs)
		}
		if _, _, errs := execute(newFake(), strings.Fields(line+" --json")...); !json.Valid([]byte(errs)) {
			t.Errorf("%s --json said %q", line, errs)
		}
	}
	for _, line := range []string{"ublk-blksnap --help", "ublk-blksnap help", "blksnap --help", "blksnap help", "ublk-blksnap completion bash", "ublk-blksnap daemon --help"} {
		f := newFake()
		status, out, errs := execute(f, strings.Fields(line)...)
		if status != 0 || len(out) < 200 || errs != "" || len(f.asked) > 0 {
			t.Errorf("%s: status %d, printed %d bytes, said %q", line, status, len(out), errs)
		}
	}
}

// TestSlowIsExplained: what takes long says what it is, once daemon and person
// have waited for two seconds.
func TestSlowIsExplained(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds: run without -short")
	}
	f := newFake()
	f.delay, f.doing = slow+2*time.Second, "take snapshot: 1 filesystems to freeze"
	var o, e bytes.Buffer
	p := &program{out: &o, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }, terminal: func(io.Writer) bool { return true }}
	status := p.run(context.Background(), []string{"ublk-blksnap", "snapshot", "take", id1})
	// A busy machine may say it a second late.
	if status != 0 || !regexp.MustCompile(`^ublk-blksnap: take snapshot: 1 filesystems to freeze … [23]s\n$`).MatchString(e.String()) {
		t.Errorf("status %d, printed %q, said %q", status, o.String(), e.String())
	}
}

func TestVersion(t *testing.T) {
	runGolden(t, []golden{
		{"ublk-blksnap version", nil, "ublk-blksnap " + longVersion() + "\n"},
		{"ublk-blksnap --version", nil, "ublk-blksnap " + longVersion() + "\n"},
		{"blksnap version", nil, control.Version + ".0\n"},
		{"blksnap version -j", nil, control.Version + ".0\n"},
	})
	var o, e bytes.Buffer
	p := &program{out: &o, err: &e, driver: func() error { return &control.Error{Code: control.Unsupported, Message: "no ublk driver"} }}
	if status := p.run(context.Background(), []string{"blksnap", "version"}); status != 1 || o.Len() > 0 || e.String() != "blksnap: no ublk driver\n" {
		t.Errorf("without a driver: status %d, printed %q, said %q", status, o.String(), e.String())
	}
	if status := p.run(context.Background(), []string{"ublk-blksnap", "version"}); status != 0 {
		t.Errorf("our own version without a driver: status %d", status)
	}
	if n, err := fmt.Sscanf(control.Version+".0", "%d.%d.%d.%d", new(int), new(int), new(int), new(int)); n != 4 || err != nil {
		t.Errorf("version %s has not four numbers", control.Version)
	}
}

// TestFullOutput: a token or a map that could not be written whole is a failure.
func TestFullOutput(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, line := range []string{"snapshot take " + id1, "snapshot take --json " + id1, "snapshot list", "list", "status vdb", "cbt info vdb", "cbt map vdb",
		"cbt changes vdb --since " + take(1).String(), "add vdb", "snapshot create vdb", "snapshot info " + id1, "snapshot watch " + id1, "snapshot_info -d vdb"} {
		var e bytes.Buffer
		f := newFake()
		p := &program{out: full, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }}
		if status := p.run(context.Background(), strings.Fields("ublk-blksnap "+line)); status != statusFailed || !strings.Contains(e.String(), "no space left") {
			t.Errorf("%s: status %d, said %q", line, status, e.String())
		}
	}
}
