package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestRequestsAreBounded: no request makes the daemon keep more of it than is
// allowed, however it is written.
func TestRequestsAreBounded(t *testing.T) {
	fake := &fakeAPI{}
	c := serveRaw(t, fake)
	long := strings.Repeat("x", 2*maxBody)
	post := func(path string, body io.Reader) error { return post(t, c, path, body) }
	refused := func(path string, body io.Reader, word string) {
		t.Helper()
		if err := post(path, body); control.CodeOf(err) != control.Invalid || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v, want %q", path, err, word)
		}
	}
	refused("device/list", strings.NewReader(`{}{}`), "more than one value")
	refused("device/status", strings.NewReader(`{"device":"`+long+`"}`), "longer than")
	refused("snapshot/create", io.MultiReader(strings.NewReader(`{"devices":["`+long), strings.NewReader(`"]}`)), "longer than")
	refused("cbt/mark", strings.NewReader(`{"device":"`+long+`"}`), "longer than")
	refused("cbt/mark", strings.NewReader(`{"`+long+`":1}`), "longer than")
	refused("cbt/mark", strings.NewReader(`{"ranges":[`+strings.Repeat(" ", 2*maxBody)), "longer than")
	refused("cbt/mark", strings.NewReader(`{"device":"n","ranges":[{"sector":1,"count":`+strings.ReplaceAll(long, "x", "1")), "longer than")
	for body, word := range map[string]string{
		``: "EOF", `[`: "want {", `{"device":"n","ranges":[{"sector":1,"count":1}`: "EOF", `{"device":"n","ranges":{}}`: "not a list",
		`{"device":"n","range":[]}`: `unknown field range`, `{"device":"n","ranges":[{"sector":1,"cuont":1}]}`: "cuont",
		`{"device":"n","ranges":[{"sector":1,"count":0}]}`: "empty", `{"device":"n","ranges":[{"sector":18446744073709551615,"count":1}]}`: "beyond",
		`{"device":"n","ranges":[]}{}`: "more than one value", `{"device":5,"ranges":[]}`: "string",
	} {
		refused("cbt/mark", strings.NewReader(body), word)
	}
	if fake.asked != nil {
		t.Errorf("asked for %.99v", fake.asked)
	}

	// Many ranges that are few in the end are kept as few.
	ranges := func(n int, at func(i int) control.Range) io.Reader {
		r, p := io.Pipe()
		w := bufio.NewWriter(p)
		go func() {
			defer p.Close()
			fmt.Fprint(w, `{"device":"n","ranges":[`)
			for i := range n {
				x := at(i)
				if i > 0 {
					fmt.Fprint(w, ",")
				}
				// An error is the daemon, which does not want more of it.
				if _, err := fmt.Fprintf(w, `{"sector":%d,"count":%d}`, x.Sector, x.Count); err != nil {
					return
				}
			}
			fmt.Fprint(w, `]}`)
			_ = w.Flush()
		}()
		return r
	}
	if err := post("cbt/mark", ranges(2*maxRanges+5, func(i int) control.Range { return control.Range{Sector: uint64(i % 1000), Count: 1 << 31} })); err != nil {
		t.Error(err)
	}
	if got := fake.asked.(control.MarkRequest); got.Device != "n" || len(got.Ranges) != 1 || got.Ranges[0] != (control.Range{Sector: 0, Count: 1<<31 + 999}) {
		t.Errorf("asked for %+v", got)
	}
	refused("cbt/mark", ranges(maxRanges+1, func(i int) control.Range { return control.Range{Sector: uint64(2 * i), Count: 1} }), "separate ranges")
	if err := post("cbt/mark", strings.NewReader(`{"ranges":null,"device":"m"}`)); err != nil || fake.asked.(control.MarkRequest).Device != "m" {
		t.Errorf("nothing to mark: %v", err)
	}
}

// blockedAPI holds up those who add or watch, until they go away.
type blockedAPI struct {
	fakeAPI
	in chan struct{}
}

func (b *blockedAPI) AddDevice(ctx context.Context, _ control.AddRequest) (control.Device, error) {
	b.in <- struct{}{}
	<-ctx.Done()
	return control.Device{}, ctx.Err()
}
func (b *blockedAPI) Watch(ctx context.Context, _ control.WatchRequest, _ func(control.Event) error) error {
	_, err := b.AddDevice(ctx, control.AddRequest{})
	return err
}
func (b *blockedAPI) CBTMap(_ context.Context, _ string, w io.Writer) (control.CBTInfo, error) {
	for {
		if _, err := w.Write(make([]byte, mapPart)); err != nil {
			b.in <- struct{}{}
			return control.CBTInfo{}, err
		}
	}
}

// TestNoClassStarvesAnother: as many as may wait do, the next ones are told, and
// who only wants to look is served.
func TestNoClassStarvesAnother(t *testing.T) {
	api := &blockedAPI{in: make(chan struct{})}
	c := serveFake(t, api)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ends := make(chan error)
	for name, class := range map[string]struct {
		most int
		do   func(context.Context) error
	}{
		"turns":    {maxTurns, func(ctx context.Context) error { _, err := c.AddDevice(ctx, control.AddRequest{}); return err }},
		"watchers": {maxWatchers, func(ctx context.Context) error { return c.Watch(ctx, control.WatchRequest{ID: "u"}, nil) }},
	} {
		first, leave := context.WithCancel(ctx)
		defer leave()
		for i := range class.most {
			ctx := ctx
			if i == 0 {
				ctx = first
			}
			go func() { ends <- class.do(ctx) }()
			<-api.in
		}
		if err := class.do(ctx); control.CodeOf(err) != control.Busy {
			t.Errorf("%s: one more: %v", name, err)
		}
		if _, err := c.Devices(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// A place is free again when its holder has gone.
		leave()
		if err := <-ends; control.CodeOf(err) != control.Interrupted {
			t.Errorf("%s: %v", name, err)
		}
		go func() {
			err := class.do(ctx)
			for control.CodeOf(err) == control.Busy {
				err = class.do(ctx)
			}
			ends <- err
		}()
		<-api.in
	}
	cancel()
	for range maxTurns + maxWatchers {
		<-ends
	}
}

// TestSlowCallers: who does not send, or does not read, is given up.
func TestSlowCallers(t *testing.T) {
	api := &blockedAPI{in: make(chan struct{})}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	short := 50 * time.Millisecond
	s := newServer(api, quiet().Logger, timeouts{short, short, short, short, short})
	// Two of them at a time: the rest waits.
	go s.Serve(&limitListener{Listener: l, places: make(chan struct{}, 2)})
	t.Cleanup(func() { s.Close() })
	dial := func(text string) net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	head := func(path string, n int) string {
		return fmt.Sprintf("POST /v1/%s HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n", path, n)
	}
	for text, want := range map[string]string{
		"":                                "",
		"POST /v1/info HTTP/1.1\r\nHost:": "",
		head("info", 9) + "{":             `"code":"timeout"`,
		head("cbt/mark", 99) + `{"ranges":[{"sector":1`:                    `"code":"timeout"`,
		head("info", 2) + "{}":                                             `"pid":7`, // and does not go
		"POST /v1/info HTTP/1.1\r\nX: " + strings.Repeat("x", 2*maxHeader): "431",
	} {
		got, err := io.ReadAll(dial(text))
		if err != nil && !errors.Is(err, net.ErrClosed) && len(got) == 0 && want != "" || !bytes.Contains(got, []byte(want)) {
			t.Errorf("%.40q: %q, %v; want %q", text, got, err, want)
		}
	}
	deaf := dial(head("cbt/map", 14) + `{"device":"n"}`)
	<-api.in // its answer is given up
	deaf.Close()

	// Nobody waits for who asks and asks and does not read, not even for the answers that are
	// not ours.
	for _, call := range []string{"POST //v1/info HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: d\r\n\r\n"} {
		conn := dial("")
		for err = error(nil); err == nil; {
			_, err = io.WriteString(conn, strings.Repeat(call, 100))
		}
	}

	// A place among the connections is free when one has gone.
	one, two := dial(""), dial("")
	c := control.NewClient(socket)
	defer c.Close()
	if _, err := c.Info(context.Background()); err != nil {
		t.Error(err)
	}
	one.Close()
	two.Close()
}

// TestNotCutShort: what takes longer than a caller may is not given up with him
// waiting.
func TestNotCutShort(t *testing.T) {
	api := &blockedAPI{in: make(chan struct{})}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	short := 10 * time.Millisecond
	s := newServer(api, quiet().Logger, timeouts{short, short, short, short, short})
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	for _, body := range []string{"", "{}", `{"path":"/dev/vdb"}`} {
		ended := make(chan error, 1)
		c := rawClient(t, socket)
		go func() {
			resp, err := c.Post("http://d/v1/device/add", "application/json", strings.NewReader(body))
			if err == nil {
				resp.Body.Close()
			}
			ended <- err
		}()
		<-api.in
		select {
		case err := <-ended:
			t.Errorf("body %q: given up: %v", body, err)
		case <-time.After(10 * short):
		}
		c.CloseIdleConnections()
	}
}
