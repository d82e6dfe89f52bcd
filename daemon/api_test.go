package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// fakeAPI answers from fields, and remembers what it was asked last.
type fakeAPI struct {
	control.API
	asked  any
	err    error
	events []control.Event

	stops    chan error  // what each Stop returns; nil: no error
	ends     chan error  // the same of EndWithMachine
	hangs    atomic.Bool // it does not answer for its threads
	closings int
	gaveUp   atomic.Bool
}

func (f *fakeAPI) Gather() ([]*dto.MetricFamily, error) { return nil, f.err }
func (f *fakeAPI) Info(context.Context) (control.Info, error) {
	return control.Info{Version: "9", PID: 7}, f.err
}
func (f *fakeAPI) AddDevice(_ context.Context, r control.AddRequest) (control.Device, error) {
	f.asked = r
	return control.Device{Name: "vdb", Path: "/dev/ublkb0", Added: time.Unix(5, 0).UTC(), Snapshots: []string{}}, f.err
}
func (f *fakeAPI) RemoveDevice(_ context.Context, r control.RemoveRequest) (control.CutOff, error) {
	f.asked = r
	return control.CutOff{Users: []string{"somebody"}, Snapshots: []string{"u"}}, f.err
}
func (f *fakeAPI) Devices(context.Context) ([]control.Device, error) {
	return []control.Device{{Name: "a"}}, f.err
}
func (f *fakeAPI) DeviceStatus(_ context.Context, d string) (control.DeviceStatus, error) {
	f.asked = d
	return control.DeviceStatus{Errors: 3}, f.err
}
func (f *fakeAPI) CBTInfo(_ context.Context, d string) (control.CBTInfo, error) {
	f.asked = d
	return control.CBTInfo{BlockCount: 4}, f.err
}
func (f *fakeAPI) CBTMap(_ context.Context, d string, w io.Writer) (control.CBTInfo, error) {
	f.asked = d
	if f.err != nil {
		return control.CBTInfo{}, f.err
	}
	_, err := w.Write([]byte{0, 1, 255})
	return control.CBTInfo{BlockCount: 3}, err
}
func (f *fakeAPI) CBTChanges(_ context.Context, r control.ChangesRequest, each func(control.Range) error) (control.CBTInfo, error) {
	f.asked = r
	if f.err != nil {
		return control.CBTInfo{}, f.err
	}
	return control.CBTInfo{BlockCount: 3}, errors.Join(each(control.Range{Sector: 1, Count: 2}), each(control.Range{Sector: 4, Count: 1}))
}
func (f *fakeAPI) MarkDirty(_ context.Context, r control.MarkRequest) error {
	f.asked = r
	return f.err
}
func (f *fakeAPI) CreateSnapshot(_ context.Context, r control.CreateRequest) (control.Snapshot, error) {
	f.asked = r
	return control.Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) AddToSnapshot(_ context.Context, r control.SnapshotDeviceRequest) (control.Snapshot, error) {
	f.asked = r
	return control.Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) AppendStorage(_ context.Context, r control.StorageRequest) (control.Snapshot, error) {
	f.asked = r
	return control.Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) TakeSnapshot(_ context.Context, r control.TakeRequest) (control.Snapshot, error) {
	f.asked = r
	return control.Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) SetSnapshot(_ context.Context, r control.SetRequest) (control.Snapshot, error) {
	f.asked = r
	return control.Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) DestroySnapshot(_ context.Context, r control.DestroyRequest) (control.CutOff, error) {
	f.asked = r
	return control.CutOff{Users: []string{"somebody"}}, f.err
}
func (f *fakeAPI) Snapshots(context.Context) ([]control.Snapshot, error) {
	return []control.Snapshot{{ID: "u"}}, f.err
}
func (f *fakeAPI) Snapshot(_ context.Context, id string) (control.Snapshot, error) {
	f.asked = id
	return control.Snapshot{ID: id}, f.err
}
func (f *fakeAPI) WaitEvent(_ context.Context, r control.WaitRequest) (control.Event, error) {
	f.asked = r
	return control.Event{Kind: control.EventNoSpace}, f.err
}
func (f *fakeAPI) Watch(_ context.Context, r control.WatchRequest, each func(control.Event) error) error {
	f.asked = r
	for _, e := range f.events {
		if err := each(e); err != nil {
			return err
		}
	}
	return f.err
}
func (f *fakeAPI) Stop(context.Context) error {
	if f.stops == nil {
		return nil
	}
	return <-f.stops
}
func (f *fakeAPI) EndWithMachine(context.Context) error { return <-f.ends }
func (f *fakeAPI) Serves()                              {}
func (f *fakeAPI) Close()                               { f.closings++ }
func (f *fakeAPI) Reload(_ context.Context, r control.ReloadRequest) (control.Reloaded, error) {
	f.asked = r
	if f.err != nil {
		return control.Reloaded{}, f.err
	}
	return control.Reloaded{At: time.Now().Round(0), Program: r.Program, From: "9"}, nil
}
func (f *fakeAPI) GiveUp(context.Context) (int, error) {
	f.gaveUp.Store(true)
	return 2, nil
}
func (f *fakeAPI) Answers(ctx context.Context) error {
	if f.hangs.Load() {
		<-ctx.Done()
	}
	return ctx.Err()
}

func quiet() *Log { return NewLog(io.Discard, slog.LevelInfo, false) }

// serveFake serves api on a socket of its own and gives a client of it.
func serveFake(t *testing.T, api control.API) *control.Client {
	t.Helper()
	c := control.NewClient(listenFake(t, api))
	t.Cleanup(c.Close)
	return c
}

// serveRaw is serveFake for requests that the client does not send.
func serveRaw(t *testing.T, api control.API) *http.Client {
	t.Helper()
	return rawClient(t, listenFake(t, api))
}

func rawClient(t *testing.T, socket string) *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// post makes a call and returns the error that it is answered with.
func post(t *testing.T, c *http.Client, path string, body io.Reader) error {
	t.Helper()
	resp, err := c.Post("http://d/v1/"+path, "application/json", body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	var e control.Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil {
		t.Fatal(err)
	}
	return &e
}

func listenFake(t *testing.T, api control.API) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(api, quiet().Logger, defaultTimeouts)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return socket
}

// calls are all calls of an API with the request that the other side must see.
func calls(ctx context.Context, a control.API) map[string]struct {
	asked any
	do    func() (any, error)
} {
	type call = struct {
		asked any
		do    func() (any, error)
	}
	add := control.AddRequest{Path: "/dev/vdb", Name: "n", Queues: 2, Depth: 3, Mode: control.ModeCopy}
	remove := control.RemoveRequest{Device: "n", Force: true}
	changes := control.ChangesRequest{Device: "n", Since: control.Take{Generation: uuid.UUID{1}, Number: 7}}
	mark := control.MarkRequest{Device: "n", Ranges: []control.Range{{Sector: 1, Count: 2}, {Sector: 4, Count: 4}}}
	create := control.CreateRequest{Devices: []string{"n"}, Storage: []control.Storage{{Path: "/s", Limit: 5, Overwrite: true}}, ChunkSize: 4096, Attach: true, Take: true, NoFreeze: true,
		Name: "nightly", Labels: map[string]string{"a": "b"}, TTL: time.Minute}
	addTo := control.SnapshotDeviceRequest{ID: "u", Device: "n", Attach: true}
	storage := control.StorageRequest{ID: "u", Storage: control.Storage{Path: "/s", Limit: 6}}
	take := control.TakeRequest{ID: "u", NoFreeze: true}
	destroy := control.DestroyRequest{ID: "u", Force: true}
	set := control.SetRequest{ID: "u", TTL: time.Hour}
	wait := control.WaitRequest{ID: "u", Timeout: 3 * time.Second}
	watch := control.WatchRequest{ID: "u", Since: 9}
	return map[string]call{
		"info":     {nil, func() (any, error) { return a.Info(ctx) }},
		"add":      {add, func() (any, error) { return a.AddDevice(ctx, add) }},
		"remove":   {remove, func() (any, error) { return a.RemoveDevice(ctx, remove) }},
		"list":     {nil, func() (any, error) { return a.Devices(ctx) }},
		"status":   {"n", func() (any, error) { return a.DeviceStatus(ctx, "n") }},
		"cbt info": {"n", func() (any, error) { return a.CBTInfo(ctx, "n") }},
		"cbt map": {"n", func() (any, error) {
			var got bytes.Buffer
			i, err := a.CBTMap(ctx, "n", &got)
			return []any{i, got.String()}, err
		}},
		"changes": {changes, func() (any, error) {
			var got []control.Range
			i, err := a.CBTChanges(ctx, changes, func(x control.Range) error { got = append(got, x); return nil })
			return []any{i, got}, err
		}},
		"mark":     {mark, func() (any, error) { return nil, a.MarkDirty(ctx, mark) }},
		"create":   {create, func() (any, error) { return a.CreateSnapshot(ctx, create) }},
		"add to":   {addTo, func() (any, error) { return a.AddToSnapshot(ctx, addTo) }},
		"append":   {storage, func() (any, error) { return a.AppendStorage(ctx, storage) }},
		"take":     {take, func() (any, error) { return a.TakeSnapshot(ctx, take) }},
		"set":      {set, func() (any, error) { return a.SetSnapshot(ctx, set) }},
		"destroy":  {destroy, func() (any, error) { return a.DestroySnapshot(ctx, destroy) }},
		"list s":   {nil, func() (any, error) { return a.Snapshots(ctx) }},
		"snapshot": {"u", func() (any, error) { return a.Snapshot(ctx, "u") }},
		"wait":     {wait, func() (any, error) { return a.WaitEvent(ctx, wait) }},
		"watch": {watch, func() (any, error) {
			var got []control.Event
			err := a.Watch(ctx, watch, func(e control.Event) error { got = append(got, e); return nil })
			return got, err
		}},
	}
}

// TestClientIsTheAPI calls everything over the socket: requests, answers and
// errors must come through as they are.
func TestClientIsTheAPI(t *testing.T) {
	ctx := context.Background()
	fake := &fakeAPI{events: []control.Event{{Seq: 1, Kind: control.EventLowFreeSpace, Sectors: 8}, {Seq: 2, Kind: control.EventCorrupted, Errno: -28}}}
	c := serveFake(t, fake)
	direct := calls(ctx, fake)
	if n := reflect.TypeFor[control.API]().NumMethod(); len(direct)+2 != n { // Stop and Reload have tests of their own
		t.Errorf("%d calls besides Stop and Reload are tried, the API has %d", len(direct), n)
	}
	for name, over := range calls(ctx, c) {
		fake.asked, fake.err = nil, nil
		got, err := over.do()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !reflect.DeepEqual(fake.asked, over.asked) {
			t.Errorf("%s: asked for %+v, want %+v", name, fake.asked, over.asked)
		}
		want, _ := direct[name].do()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: answer %+v, want %+v", name, got, want)
		}

		busy := control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: "do it: mounted", Fix: "unmount it"}
		fake.err = &busy
		events := fake.events
		fake.events = nil // an answer that has begun cannot become an error
		got, err = over.do()
		fake.events = events
		var e *control.Error
		if !errors.As(err, &e) {
			t.Errorf("%s: error %#v", name, err)
			continue
		}
		if _, forced := want.(control.CutOff); forced { // what it broke before it failed
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: beside an error the answer is %+v, want %+v", name, got, want)
			}
			busy.CutOff = e.CutOff
		}
		if *e != busy || !errors.Is(err, unix.EBUSY) {
			t.Errorf("%s: error %#v", name, err)
		}
	}
}

func TestPlainErrorsGetACode(t *testing.T) {
	c := serveFake(t, &fakeAPI{err: io.ErrUnexpectedEOF})
	_, err := c.Devices(context.Background())
	if control.CodeOf(err) != control.Internal || err.Error() != io.ErrUnexpectedEOF.Error() {
		t.Fatalf("%#v", err)
	}
}

// brokenWatch has errors in what it streams only.
type brokenWatch struct{ *fakeAPI }

func (b brokenWatch) Info(context.Context) (control.Info, error) { return control.Info{}, nil }

// TestWatchBrokenOff: a stream that ends by an error must not look like one that
// ended well.
func TestWatchBrokenOff(t *testing.T) {
	c := serveFake(t, brokenWatch{&fakeAPI{events: []control.Event{{Seq: 1}}, err: noSnapshot("u")}})
	n := 0
	err := c.Watch(context.Background(), control.WatchRequest{ID: "u"}, func(control.Event) error { n++; return nil })
	if n != 1 || control.CodeOf(err) != control.NotFound || !errors.Is(err, unix.ESRCH) {
		t.Fatalf("%d events, error %v", n, err)
	}
}

func TestWatchEndedByReader(t *testing.T) {
	c := serveFake(t, &fakeAPI{events: []control.Event{{Seq: 1}, {Seq: 2}}})
	enough := errors.New("enough")
	if err := c.Watch(context.Background(), control.WatchRequest{ID: "u"}, func(control.Event) error { return enough }); !errors.Is(err, enough) {
		t.Fatal(err)
	}
}

func TestUnknownCallsAndFields(t *testing.T) {
	c := serveRaw(t, &fakeAPI{})
	if err := post(t, c, "device/explode", strings.NewReader("{}")); control.CodeOf(err) != control.Unsupported {
		t.Errorf("unknown call: %v", err)
	}
	err := post(t, c, "device/add", strings.NewReader(`{"path": "/dev/vdb", "dept": 5}`))
	if control.CodeOf(err) != control.Invalid || !strings.Contains(err.Error(), "dept") {
		t.Errorf("misspelt field: %v", err)
	}
	resp, err := c.Get("http://d/v1/device/list")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e control.Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != http.MethodPost ||
		e.Code != control.Invalid || !strings.HasSuffix(e.Message, "use POST") {
		t.Errorf("GET of a call that is known: %s, %+v, %v", resp.Status, e, err)
	}
}
