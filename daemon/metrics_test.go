package daemon

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// measured is a daemon with a device and a snapshot of it.
func measured(t *testing.T) (*Daemon, *device, *snapshot) {
	t.Helper()
	q, err := blockdev.NewRingQueue(blockdev.RingConfig{Name: "control", Depth: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Stop)
	cbt, err := cbtmap.NewMemory(1<<30, cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	dev := &device{
		Device: control.Device{Name: "data", Original: "/dev/vdb", Path: "/dev/ublkb0", Size: 1 << 30, Queues: 2, Mode: control.ModeCopy},
		cbt:    cbt, filter: filter.New(filter.Config{Size: 1 << 30, CBT: cbt, Queues: 2}), ublk: &ublk.Device{},
	}
	for i := range uint64(2) {
		c := dev.filter.Counters(int(i))
		c.Requests[ublk.OpWrite].Store(3 + i)
		c.Bytes[ublk.OpWrite].Store(4096 * (3 + i))
		c.Errors.Store(i)
		c.InFlight.Store(5)
	}
	dir, err := os.MkdirTemp("/dev/shm", "measured") // a state is on a tmpfs, all of which is looked at
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	id := uuid.New()
	snap, err := snapshots.New(snapshots.Config{
		ID: id, ChunkSize: 64 << 10, PoolSize: 1 << 20, Portion: 1 << 20, StateDir: dir, StorageTimeout: time.Minute, Control: q, OnEvent: func(diffarea.Event) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		snap.Destroy()()
		if err := snap.GiveBack(); err != nil {
			t.Error(err)
		}
	})
	s := &snapshot{id: id.String(), snap: snap, chunk: 64 << 10, created: time.Unix(7, 0), images: []*image{{device: dev}}}
	d := &Daemon{
		opts: Options{Log: quiet()}, started: time.Unix(5, 0),
		recovered: &control.Recovered{Count: 3, Pause: 250 * time.Millisecond, Images: time.Second},
		devices:   map[string]*device{"data": dev}, snapshots: map[string]*snapshot{s.id: s},
	}
	d.eventsDropped.Store(2)
	return d, dev, s
}

// TestMetrics: names, units and values are as Prometheus has them.
func TestMetrics(t *testing.T) {
	d, _, s := measured(t)
	problems, err := testutil.GatherAndLint(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n, err := testutil.GatherAndCount(d); err != nil || n < len(allMetrics) {
		t.Errorf("%d values of %d metrics, %v", n, len(allMetrics), err)
	}
	want := strings.ReplaceAll(`
# HELP ublk_blksnap_events_dropped_total Events of snapshots that nobody could keep.
# TYPE ublk_blksnap_events_dropped_total counter
ublk_blksnap_events_dropped_total 2
# HELP ublk_blksnap_filter_bytes_total Bytes of the requests that were completed.
# TYPE ublk_blksnap_filter_bytes_total counter
ublk_blksnap_filter_bytes_total{device="data",operation="discard"} 0
ublk_blksnap_filter_bytes_total{device="data",operation="flush"} 0
ublk_blksnap_filter_bytes_total{device="data",operation="read"} 0
ublk_blksnap_filter_bytes_total{device="data",operation="write"} 28672
ublk_blksnap_filter_bytes_total{device="data",operation="write-zeroes"} 0
# HELP ublk_blksnap_filter_errors_total Requests that ended with an error.
# TYPE ublk_blksnap_filter_errors_total counter
ublk_blksnap_filter_errors_total{device="data"} 1
# HELP ublk_blksnap_filter_in_flight_requests Requests under way.
# TYPE ublk_blksnap_filter_in_flight_requests gauge
ublk_blksnap_filter_in_flight_requests{device="data"} 10
# HELP ublk_blksnap_recoveries_total Daemons that took over from one that had died.
# TYPE ublk_blksnap_recoveries_total counter
ublk_blksnap_recoveries_total 3
# HELP ublk_blksnap_recovery_io_wait_seconds How long I/O waited for the last such daemon, from its start on.
# TYPE ublk_blksnap_recovery_io_wait_seconds gauge
ublk_blksnap_recovery_io_wait_seconds{kind="filters"} 0.25
ublk_blksnap_recovery_io_wait_seconds{kind="images"} 1
# HELP ublk_blksnap_snapshot_state 1 for the state that the snapshot is in.
# TYPE ublk_blksnap_snapshot_state gauge
ublk_blksnap_snapshot_state{snapshot="UUID",state="corrupted"} 0
ublk_blksnap_snapshot_state{snapshot="UUID",state="created"} 1
ublk_blksnap_snapshot_state{snapshot="UUID",state="destroying"} 0
ublk_blksnap_snapshot_state{snapshot="UUID",state="taken"} 0
`, "UUID", s.id)
	var names []string
	for _, line := range strings.Split(want, "\n") {
		if f := strings.Fields(line); len(f) > 2 && f[1] == "TYPE" {
			names = append(names, f[2])
		}
	}
	if err := testutil.GatherAndCompare(d, strings.NewReader(want), names...); err != nil {
		t.Error(err)
	}
}

// TestMetricsOfASnapshot: a query can go by the name of a snapshot, and see its end coming.
func TestMetricsOfASnapshot(t *testing.T) {
	d, _, s := measured(t)
	const expires = "ublk_blksnap_snapshot_expires_time_seconds"
	if n, err := testutil.GatherAndCount(d, expires); n != 0 || err != nil {
		t.Errorf("%d ends of a snapshot that stays, %v", n, err)
	}
	s.note.Name, s.note.Ends = "nightly", endAfter(time.Hour)
	want := strings.ReplaceAll(`
# HELP ublk_blksnap_snapshot_info A snapshot, by its UUID and by its name if it has one, and one of its devices.
# TYPE ublk_blksnap_snapshot_info gauge
ublk_blksnap_snapshot_info{device="data",name="nightly",snapshot="ID"} 1
`, `"ID"`, `"`+s.id+`"`)
	if err := testutil.GatherAndCompare(d, strings.NewReader(want), "ublk_blksnap_snapshot_info"); err != nil {
		t.Error(err)
	}
	all, err := d.Gather()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(f *dto.MetricFamily) bool { return f.GetName() == expires })
	if i < 0 {
		t.Fatal("no end")
	}
	if at := all[i].GetMetric()[0].GetGauge().GetValue(); at < since(time.Now()) || at > since(time.Now().Add(time.Hour+time.Second)) {
		t.Errorf("it ends at %f", at)
	}
}

// TestMetricsInTheManual: the page of the daemon has a row for each metric, in their order, and no other.
func TestMetricsInTheManual(t *testing.T) {
	page, err := os.ReadFile("../docs/daemon.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `ublk_blksnap_.*$").FindAllString(string(page), -1)
	var want []string
	parts := regexp.MustCompile(`fqName: "(.*)", help: "(.*)", constLabels: {}, variableLabels: {(.*)}}$`)
	for _, m := range allMetrics {
		part := parts.FindStringSubmatch(m.desc.String())
		if part == nil {
			t.Fatalf("%s", m.desc)
		}
		labels := strings.ReplaceAll(part[3], ",", ", ")
		want = append(want, strings.Join([]string{"| `" + part[1] + "`", labels, part[2] + " |"}, " | "))
	}
	if !slices.Equal(rows, want) {
		t.Errorf("docs/daemon.md has\n%s\nwant\n%s", strings.Join(rows, "\n"), strings.Join(want, "\n"))
	}
}

// TestMetricsOfAnyName: the path of a disk is nothing that a scrape could fail for.
func TestMetricsOfAnyName(t *testing.T) {
	d, dev, _ := measured(t)
	dev.Original = "/dev/mapper/a\"b\\c\nd\xff"
	want := `
# HELP ublk_blksnap_filter_info A filter and its original disk.
# TYPE ublk_blksnap_filter_info gauge
ublk_blksnap_filter_info{device="data",mode="copy",original="/dev/mapper/a\"b\\c\nd` + "\ufffd" + `",path="/dev/ublkb0"} 1
`
	if err := testutil.GatherAndCompare(d, strings.NewReader(want), "ublk_blksnap_filter_info"); err != nil {
		t.Error(err)
	}
}

// TestMetricsWaitForNobody: what is locked for long, because it goes or a take is under
// way, is left out, or known from before.
func TestMetricsWaitForNobody(t *testing.T) {
	d, dev, s := measured(t)
	dev.use.Lock()
	defer dev.use.Unlock()
	s.use.Lock()
	defer s.use.Unlock()
	n, err := testutil.GatherAndCount(d)
	if err != nil || n == 0 {
		t.Errorf("%d values, %v", n, err)
	}
	if n, err := testutil.GatherAndCount(d, "ublk_blksnap_filter_info", "ublk_blksnap_snapshot_state"); n != 0 || err != nil {
		t.Errorf("%d values of what goes, %v", n, err)
	}
}

// TestMetricsServer: on the loopback address nobody can do anything but read them.
func TestMetricsServer(t *testing.T) {
	d, _, _ := measured(t)
	for name, h := range map[string]http.Handler{
		"loopback": newMetricsServer(d, quiet().Logger, defaultTimeouts).Handler,
		"socket":   newHandler(&gathering{&fakeAPI{}, d}, quiet().Logger, defaultTimeouts),
	} {
		srv := httptest.NewServer(h)
		defer srv.Close()
		for _, c := range []struct {
			method, path string
			status       int
		}{
			{http.MethodGet, "/metrics", http.StatusOK},
			{http.MethodPost, "/metrics", http.StatusMethodNotAllowed},
			{http.MethodGet, "/", http.StatusNotFound},
			{http.MethodPost, "/v1/device/list", http.StatusNotFound},
		} {
			if name == "socket" && c.path != "/metrics" {
				continue
			}
			r, err := http.NewRequest(c.method, srv.URL+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			want := c.status
			if name == "socket" && c.method == http.MethodPost {
				want = http.StatusNotImplemented // as any call that it does not know
			}
			if answer.StatusCode != want {
				t.Errorf("%s: %s %s: %s", name, c.method, c.path, answer.Status)
			}
			if want == http.StatusOK && !strings.Contains(string(body), `ublk_blksnap_filter_requests_total{device="data",operation="write"} 7`) {
				t.Errorf("%s: %s", name, body)
			}
		}
	}
}

type gathering struct {
	*fakeAPI
	d *Daemon
}

func (g *gathering) Gather() ([]*dto.MetricFamily, error) { return g.d.Gather() }

// TestMetricsAddress: no other machine can reach it.
func TestMetricsAddress(t *testing.T) {
	for text, ok := range map[string]bool{
		"": true, "127.0.0.1:9469": true, "[::1]:9469": true, "127.1.2.3:1": true,
		"0.0.0.0:9469": false, "[::]:9469": false, "10.0.0.1:9469": false, ":9469": false, "localhost:9469": false, "127.0.0.1": false, "127.0.0.1:0": false,
	} {
		var v string
		if err := (loopback{&v}).Set(text); (err == nil) != ok || ok && v != text {
			t.Errorf("%q: %v, %q", text, err, v)
		}
	}
}
