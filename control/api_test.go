package control

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
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// fakeAPI answers from fields, and remembers what it was asked last.
type fakeAPI struct {
	API
	asked  any
	err    error
	events []Event

	stops    chan error // what each Stop returns; nil: no error
	closings int
}

func (f *fakeAPI) Info(context.Context) (Info, error) { return Info{Version: "9", PID: 7}, f.err }
func (f *fakeAPI) AddDevice(_ context.Context, r AddRequest) (Device, error) {
	f.asked = r
	return Device{Name: "vdb", Path: "/dev/ublkb0", Added: time.Unix(5, 0).UTC(), Snapshots: []string{}}, f.err
}
func (f *fakeAPI) RemoveDevice(_ context.Context, r RemoveRequest) error { f.asked = r; return f.err }
func (f *fakeAPI) Devices(context.Context) ([]Device, error)             { return []Device{{Name: "a"}}, f.err }
func (f *fakeAPI) DeviceStatus(_ context.Context, d string) (DeviceStatus, error) {
	f.asked = d
	return DeviceStatus{Errors: 3}, f.err
}
func (f *fakeAPI) CBTInfo(_ context.Context, d string) (CBTInfo, error) {
	f.asked = d
	return CBTInfo{BlockCount: 4}, f.err
}
func (f *fakeAPI) CBTMap(_ context.Context, d string, w io.Writer) (CBTInfo, error) {
	f.asked = d
	if f.err != nil {
		return CBTInfo{}, f.err
	}
	_, err := w.Write([]byte{0, 1, 255})
	return CBTInfo{BlockCount: 3}, err
}
func (f *fakeAPI) CBTChanges(_ context.Context, r ChangesRequest, each func(Range) error) (CBTInfo, error) {
	f.asked = r
	if f.err != nil {
		return CBTInfo{}, f.err
	}
	return CBTInfo{BlockCount: 3}, errors.Join(each(Range{1, 2}), each(Range{4, 1}))
}
func (f *fakeAPI) MarkDirty(_ context.Context, r MarkRequest) error { f.asked = r; return f.err }
func (f *fakeAPI) CreateSnapshot(_ context.Context, r CreateRequest) (Snapshot, error) {
	f.asked = r
	return Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) AddToSnapshot(_ context.Context, r SnapshotDeviceRequest) (Snapshot, error) {
	f.asked = r
	return Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) AppendStorage(_ context.Context, r StorageRequest) (Snapshot, error) {
	f.asked = r
	return Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) TakeSnapshot(_ context.Context, r TakeRequest) (Snapshot, error) {
	f.asked = r
	return Snapshot{ID: "u"}, f.err
}
func (f *fakeAPI) DestroySnapshot(_ context.Context, id string) error { f.asked = id; return f.err }
func (f *fakeAPI) Snapshots(context.Context) ([]Snapshot, error) {
	return []Snapshot{{ID: "u"}}, f.err
}
func (f *fakeAPI) Snapshot(_ context.Context, id string) (Snapshot, error) {
	f.asked = id
	return Snapshot{ID: id}, f.err
}
func (f *fakeAPI) WaitEvent(_ context.Context, r WaitRequest) (Event, error) {
	f.asked = r
	return Event{Kind: EventNoSpace}, f.err
}
func (f *fakeAPI) Watch(_ context.Context, id string, each func(Event) error) error {
	f.asked = id
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
func (f *fakeAPI) Close() { f.closings++ }

func quiet() *Log { return NewLog(io.Discard, slog.LevelInfo, false) }

// serveFake serves api on a socket of its own and gives a client of it.
func serveFake(t *testing.T, api API) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(api, quiet().Logger, usualPatience)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	c := NewClient(socket)
	t.Cleanup(c.Close)
	return c
}

// calls are all calls of an API with the request that the other side must see.
func calls(ctx context.Context, a API) map[string]struct {
	asked any
	do    func() (any, error)
} {
	type call = struct {
		asked any
		do    func() (any, error)
	}
	yes := true
	add := AddRequest{Path: "/dev/vdb", Name: "n", Queues: 2, Depth: 3, Mode: ModeCopy, Recovery: &yes}
	remove := RemoveRequest{Device: "n", Force: true}
	changes := ChangesRequest{Device: "n", Since: Take{uuid.UUID{1}, 7}}
	mark := MarkRequest{Device: "n", Ranges: []Range{{1, 2}, {4, 4}}}
	create := CreateRequest{Devices: []string{"n"}, Storage: []Storage{{Path: "/s", Limit: 5, Overwrite: true}}, ChunkSize: 4096, Attach: true, Take: true, NoFreeze: true}
	addTo := SnapshotDeviceRequest{ID: "u", Device: "n", Attach: true}
	storage := StorageRequest{ID: "u", Storage: Storage{Path: "/s", Limit: 6}}
	take := TakeRequest{ID: "u", NoFreeze: true}
	wait := WaitRequest{ID: "u", Timeout: 3 * time.Second}
	return map[string]call{
		"info":     {nil, func() (any, error) { return a.Info(ctx) }},
		"add":      {add, func() (any, error) { return a.AddDevice(ctx, add) }},
		"remove":   {remove, func() (any, error) { return nil, a.RemoveDevice(ctx, remove) }},
		"list":     {nil, func() (any, error) { return a.Devices(ctx) }},
		"status":   {"n", func() (any, error) { return a.DeviceStatus(ctx, "n") }},
		"cbt info": {"n", func() (any, error) { return a.CBTInfo(ctx, "n") }},
		"cbt map": {"n", func() (any, error) {
			var got bytes.Buffer
			i, err := a.CBTMap(ctx, "n", &got)
			return []any{i, got.String()}, err
		}},
		"changes": {changes, func() (any, error) {
			var got []Range
			i, err := a.CBTChanges(ctx, changes, func(x Range) error { got = append(got, x); return nil })
			return []any{i, got}, err
		}},
		"mark":     {mark, func() (any, error) { return nil, a.MarkDirty(ctx, mark) }},
		"create":   {create, func() (any, error) { return a.CreateSnapshot(ctx, create) }},
		"add to":   {addTo, func() (any, error) { return a.AddToSnapshot(ctx, addTo) }},
		"append":   {storage, func() (any, error) { return a.AppendStorage(ctx, storage) }},
		"take":     {take, func() (any, error) { return a.TakeSnapshot(ctx, take) }},
		"destroy":  {"u", func() (any, error) { return nil, a.DestroySnapshot(ctx, "u") }},
		"list s":   {nil, func() (any, error) { return a.Snapshots(ctx) }},
		"snapshot": {"u", func() (any, error) { return a.Snapshot(ctx, "u") }},
		"wait":     {wait, func() (any, error) { return a.WaitEvent(ctx, wait) }},
		"watch": {"u", func() (any, error) {
			var got []Event
			err := a.Watch(ctx, "u", func(e Event) error { got = append(got, e); return nil })
			return got, err
		}},
	}
}

// TestClientIsTheAPI calls everything over the socket: requests, answers and
// errors must come through as they are.
func TestClientIsTheAPI(t *testing.T) {
	ctx := context.Background()
	fake := &fakeAPI{events: []Event{{Seq: 1, Kind: EventLowFreeSpace, Sectors: 8}, {Seq: 2, Kind: EventCorrupted, Errno: -28}}}
	c := serveFake(t, fake)
	direct := calls(ctx, fake)
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

		busy := Error{Code: Busy, Errno: unix.EBUSY, Message: "do it: mounted", Fix: "unmount it"}
		fake.err = &busy
		events := fake.events
		fake.events = nil // an answer that has begun cannot become an error
		_, err = over.do()
		fake.events = events
		var e *Error
		if !errors.As(err, &e) || *e != busy || !errors.Is(err, unix.EBUSY) {
			t.Errorf("%s: error %#v", name, err)
		}
	}
}

func TestPlainErrorsGetACode(t *testing.T) {
	c := serveFake(t, &fakeAPI{err: io.ErrUnexpectedEOF})
	_, err := c.Devices(context.Background())
	if CodeOf(err) != Internal || err.Error() != io.ErrUnexpectedEOF.Error() {
		t.Fatalf("%#v", err)
	}
}

// TestWatchBrokenOff: a stream that ends by an error must not look like one that
// ended well.
func TestWatchBrokenOff(t *testing.T) {
	c := serveFake(t, &fakeAPI{events: []Event{{Seq: 1}}, err: noSnapshot("u")})
	n := 0
	err := c.Watch(context.Background(), "u", func(Event) error { n++; return nil })
	if n != 1 || CodeOf(err) != NotFound || !errors.Is(err, unix.ESRCH) {
		t.Fatalf("%d events, error %v", n, err)
	}
}

func TestWatchEndedByReader(t *testing.T) {
	c := serveFake(t, &fakeAPI{events: []Event{{Seq: 1}, {Seq: 2}}})
	enough := errors.New("enough")
	if err := c.Watch(context.Background(), "u", func(Event) error { return enough }); !errors.Is(err, enough) {
		t.Fatal(err)
	}
}

func TestUnknownCallsAndFields(t *testing.T) {
	c := serveFake(t, &fakeAPI{})
	if _, err := call[none](context.Background(), c, "device/explode", none{}); CodeOf(err) != Unsupported {
		t.Errorf("unknown call: %v", err)
	}
	_, err := call[Device](context.Background(), c, "device/add", map[string]any{"path": "/dev/vdb", "dept": 5})
	if CodeOf(err) != Invalid || !strings.Contains(err.Error(), "dept") {
		t.Errorf("misspelt field: %v", err)
	}
	resp, err := c.http.Get("http://d/v1/device/list")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != http.MethodPost ||
		e.Code != Invalid || !strings.HasSuffix(e.Message, "use POST") {
		t.Errorf("GET of a call that is known: %s, %+v, %v", resp.Status, e, err)
	}
}

func TestClientErrors(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	c := NewClient(filepath.Join(dir, "nothing"))
	if _, err := c.Info(ctx); CodeOf(err) != Unavailable {
		t.Errorf("no socket: %v", err)
	}
	// A socket whose daemon is dead.
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := NewClient(stale).Info(ctx); CodeOf(err) != Unavailable {
		t.Errorf("stale socket: %v", err)
	}
	// A daemon that hangs up.
	socket := filepath.Join(dir, "s")
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	if _, err := NewClient(socket).Info(ctx); CodeOf(err) != Unavailable || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("hung up: %#v", err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := c.Info(canceled); CodeOf(err) != Interrupted {
		t.Errorf("interrupted: %v", err)
	}
}

func TestErrorJSON(t *testing.T) {
	for _, e := range []Error{
		{Code: Busy, Errno: unix.EBUSY, Message: "m", Fix: "f"},
		{Code: Internal, Message: "m"},
		{Code: Exists, Errno: unix.EALREADY, Message: "m"},
	} {
		b, err := json.Marshal(&e)
		if err != nil {
			t.Fatal(err)
		}
		if e.Errno != 0 && !bytes.Contains(b, []byte(`"errno":"`+unix.ErrnoName(e.Errno)+`"`)) {
			t.Errorf("%s: errno not by name", b)
		}
		var back Error
		if err := json.Unmarshal(b, &back); err != nil || back != e {
			t.Errorf("%s came back as %+v, %v", b, back, err)
		}
	}
}
