package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// overviewOf is what the daemon of newFake has, a while after its start.
func overviewOf(f *fakeDaemon) (overview, time.Time) {
	start := time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)
	info := control.Info{Version: "1.2", PID: 7, Started: start, LogLinesLost: 3,
		Recovered:  &control.Recovered{At: start, Count: 2, Devices: 3, Pause: 35 * time.Millisecond},
		Unfiltered: []control.Unfiltered{{Name: "x", Path: "/dev/vdx", Reason: "no such device"}}}
	f.status.History = control.History{Continued: true, AfterPowerFailure: true, Text: "goes on after a power failure"}
	return overview{Time: start, Daemon: info, Devices: []control.DeviceStatus{f.status}, Snapshots: f.snapshots}, start.Add(90 * time.Minute)
}

func TestOverview(t *testing.T) {
	o, now := overviewOf(newFake())
	var b bytes.Buffer
	writeOverview(&b, o, now)
	want := `daemon:          version 1.2, process 7, since 2025-01-02T03:04:05Z (1h30m0s)
taken over:      2025-01-02T03:04:05Z, from a daemon that had died, 3 devices, I/O waited for 35ms from the start of this one
log lost:        3 lines, because nobody took them
before:          vdb: change tracking goes on after a power failure
waits:           x: /dev/vdx has no filter yet: no such device

FILTER  ORIGINAL  STATE  READS  WRITES  READ  WRITTEN  ERRORS  IN FLIGHT  SNAPSHOTS
vdb     /dev/vdb  live   10     0       5K    0        1       2          2

SNAPSHOT                              STATE      DEVICES  USED  OF  PERCENT  RATE  FULL IN
nightly                               taken      vdb      1M    1G  0%       3M/s  5m41s
` + id2 + `  corrupted  vdb      0     0   0%       0/s   -
`
	if b.String() != want {
		t.Errorf("printed\n%swant\n%s", &b, want)
	}
}

// TestUncleanEnd: list and status say that the last filter over a disk had no clean end,
// whatever became of the change tracking.
func TestUncleanEnd(t *testing.T) {
	f := newFake()
	for want, h := range map[string]control.History{
		"change tracking goes on after a power failure": {Continued: true, AfterPowerFailure: true, Text: "goes on after a power failure"},
		"change tracking began anew: nobody kept the map: that costs a full backup": {
			Reason: control.HistoryUnclean, Text: "nobody kept the map"},
		"the last filter over the disk had no clean end, and change tracking began anew: the disk was written to: that costs a full backup": {
			Reason: control.HistoryWritten, AfterPowerFailure: true, Text: "the disk was written to"},
	} {
		f.device.History = h
		f.status.Device = f.device
		if _, _, errs := execute(f, "ublk-blksnap", "list"); errs != "ublk-blksnap: vdb: "+want+"\n" {
			t.Errorf("list says %q, want %q", errs, want)
		}
		for _, line := range []string{"ublk-blksnap status", "ublk-blksnap status vdb"} {
			if _, out, _ := execute(f, strings.Fields(line)...); !strings.Contains(out, want) {
				t.Errorf("%s: want %q: %s", line, want, out)
			}
		}
	}
	f.device.History = control.History{Reason: control.HistoryNone, Text: "nothing was kept"}
	if _, _, errs := execute(f, "ublk-blksnap", "list"); errs != "" {
		t.Errorf("of a disk that had no filter before list says %q", errs)
	}
}

// TestAttention: list and status say what somebody should know of a filter.
func TestAttention(t *testing.T) {
	f := newFake()
	f.device.Attention, f.device.OriginalSize = "the disk has shrunk", 7<<20
	f.status.Device = f.device
	if _, _, errs := execute(f, "ublk-blksnap", "list"); errs != "ublk-blksnap: vdb: the disk has shrunk\n" {
		t.Errorf("list says %q", errs)
	}
	for _, line := range []string{"ublk-blksnap status", "ublk-blksnap status vdb"} {
		if _, out, _ := execute(f, strings.Fields(line)...); !strings.Contains(out, "the disk has shrunk") {
			t.Errorf("%s: %s", line, out)
		}
	}
}

// TestStatusOfNoName: a script that asks for a filter is not told of everything instead.
func TestStatusOfNoName(t *testing.T) {
	status, out, errs := execute(newFake(), "ublk-blksnap", "status", "")
	if status != statusUsage || out != "" || !strings.Contains(errs, "empty") {
		t.Errorf("status %d, %q, %q", status, out, errs)
	}
}

// TestStatusWatch: what is told again is told in one line of JSON each time, without a
// daemon too, until somebody interrupts it.
func TestStatusWatch(t *testing.T) {
	for _, line := range []string{"ublk-blksnap status --watch --interval 100ms", "ublk-blksnap status vdb --watch --interval 100ms --json"} {
		f := newFake()
		ctx, cancel := context.WithCancel(context.Background())
		out := &roundsUntil{rounds: 3, end: cancel}
		var e bytes.Buffer
		p := &program{out: out, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }}
		if status := p.run(ctx, strings.Fields(line)); status != statusInterrupted {
			t.Errorf("%s: status %d, %s", line, status, &e)
		}
		if !strings.Contains(line, "--json") {
			if n := strings.Count(out.String(), "FILTER"); n != 3 {
				t.Errorf("%s: %d times %s", line, n, out)
			}
			continue
		}
		for _, l := range strings.Split(strings.TrimSpace(out.String()), "\n") {
			if !json.Valid([]byte(l)) {
				t.Errorf("%s: %q", line, l)
			}
		}
	}
}

// roundsUntil is an output that interrupts whoever has told something so often.
type roundsUntil struct {
	bytes.Buffer
	rounds int
	end    func()
}

func (r *roundsUntil) Write(b []byte) (int, error) {
	n, err := r.Buffer.Write(b)
	if bytes.Contains(b, []byte("live")) {
		if r.rounds--; r.rounds == 0 {
			r.end()
		}
	}
	return n, err
}

// TestNeedsAttention: status and top say alike what is not as it should be, and top does while
// no daemon answers too.
func TestNeedsAttention(t *testing.T) {
	f := newFake()
	f.status.Attention, f.snapshots[0].Overdue = "the disk has shrunk", "mounted on /mnt"
	o, now := overviewOf(f)
	o.Daemon.Lost = &control.Lost{PID: 7, Devices: []control.LostDevice{{Name: "old", Original: "/dev/vdc", Path: "/dev/ublkb4", Waits: true, Reason: "no such device"}}}
	want := "attention:       vdb: the disk has shrunk\n" +
		"attention:       snapshot nightly: its time is over, and it is destroyed when nobody uses it: mounted on /mnt\n" +
		"waits:           " + o.Daemon.Lost.String() + "\n" +
		"waits:           x: /dev/vdx has no filter yet: no such device\n\nFILTER"
	var b bytes.Buffer
	writeOverview(&b, o, now)
	for what, text := range map[string]string{
		"status": b.String(), "top": strings.Join(topLines(o, overview{}, nil), "\n"), "top without an answer": strings.Join(topLines(overview{}, o, os.ErrDeadlineExceeded), "\n"),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s has no\n%s:\n%s", what, want, text)
		}
	}
}

// TestTopLines: rates, and the order by them.
func TestTopLines(t *testing.T) {
	now, _ := overviewOf(newFake())
	now.Daemon.Unfiltered = nil
	before := now
	before.Time = now.Time.Add(-2 * time.Second)
	busy := now.Devices[0]
	busy.Name = "busy"
	busy.Operations = map[string]control.Operation{control.OpWrite: {Requests: 100, Bytes: 8 << 20}, control.OpRead: {Requests: 10, Bytes: 4 << 10}}
	fresh := busy
	fresh.Name = "fresh"
	now.Devices = append(now.Devices, fresh, busy)
	idle := busy
	idle.Operations = map[string]control.Operation{}
	before.Devices = append(before.Devices, idle)
	lines := topLines(now, before, nil)
	text := strings.Join(lines, "\n")
	for i, want := range []string{"q: quit", "", "FILTER", "busy    /dev/vdb  4M       2K      50        5", "vdb", "fresh   /dev/vdb  0 "} {
		if !strings.HasPrefix(lines[i], want) && (i > 0 || !strings.HasSuffix(lines[i], want)) {
			t.Errorf("line %d is %q, want %q:\n%s", i, lines[i], want, text)
		}
	}
	if !strings.Contains(text, "nightly") {
		t.Errorf("no snapshot:\n%s", text)
	}
	if lines := topLines(overview{}, now, os.ErrDeadlineExceeded); !strings.Contains(lines[0], "timeout") || len(lines) < 5 {
		t.Errorf("without an answer: %q", lines)
	}
}

// TestTop runs it on a terminal, which is as it was when q is pressed.
func TestTop(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 6, Col: 30}); err != nil {
		t.Fatal(err)
	}
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan int, 1)
	var e bytes.Buffer
	f := newFake()
	p := &program{in: tty, out: tty, err: &e, connect: func(context.Context, starts) (control.API, error) { return f, nil }}
	go func() { ended <- p.run(context.Background(), []string{"ublk-blksnap", "top", "--interval", "100ms"}) }()
	shown := ""
	b := make([]byte, 4096)
	for strings.Count(shown, clearBelow) < 2 {
		n, err := master.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		shown += string(b[:n])
	}
	_, frame, _ := strings.Cut(shown, topLeft)
	frame, _, _ = strings.Cut(frame, clearBelow)
	lines := strings.Split(strings.ReplaceAll(frame, clearLine, ""), "\r\n")
	if !strings.HasPrefix(shown, otherScreen) || len(lines) > 6 || !strings.HasPrefix(lines[2], "FILTER") {
		t.Errorf("shown: %q", shown)
	}
	for _, l := range lines {
		if len(l) > 29 {
			t.Errorf("a line of %d characters on a screen of 30: %q", len(l), l)
		}
	}
	if _, err := master.WriteString("xq"); err != nil {
		t.Fatal(err)
	}
	go func() { // it may have more to show before it ends
		for {
			if _, err := master.Read(b); err != nil {
				return
			}
		}
	}()
	if status := <-ended; status != 0 {
		t.Errorf("status %d: %s", status, &e)
	}
	after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal is left as %+v, and was %+v, %v", after, before, err)
	}
}

// TestBeforeTheFilter: what a daemon took over before a filter was added is no part of that filter's status.
func TestBeforeTheFilter(t *testing.T) {
	at := time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC)
	for want, info := range map[string]control.Info{"reloaded:": {Reloaded: &control.Reloaded{At: at}}, "taken over:": {Recovered: &control.Recovered{At: at}}} {
		for since, told := range map[time.Duration]bool{-time.Minute: true, time.Minute: false} {
			var b bytes.Buffer
			writeBefore(&b, info, at.Add(since))
			if strings.HasPrefix(b.String(), want) != told || !told && b.Len() > 0 {
				t.Errorf("%s added %v later: %q", want, since, &b)
			}
		}
	}
}
