package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// The daemon's memory is locked, so what callers can take of it is bounded. Each
// call takes a place in its class before its body is read. No class can keep the
// others out.
const (
	maxConnections = 256
	maxQuick       = 64 // calls that only look: more wait
	maxTurns       = 32 // calls that change something, under way or waiting for their turn: more are refused
	maxStreams     = 16 // long answers: more wait
	maxMarks       = 2  // requests that mark blocks: more wait
	maxWatchers    = 64 // who waits for events: more are refused

	maxHeader = 8 << 10
	maxBody   = 64 << 10 // bytes of a request; and of one range of those that mark blocks
	// maxRanges is how many ranges a request may mark once they are merged.
	maxRanges = 128 << 10
)

// timeouts is how long the daemon waits for a caller:
type timeouts struct {
	header time.Duration // to send a request's header
	body   time.Duration // and its body
	ranges time.Duration // and the ranges to mark
	answer time.Duration // to take a piece of an answer
	idle   time.Duration // to call again
}

var defaultTimeouts = timeouts{header: 10 * time.Second, body: 10 * time.Second, ranges: time.Minute, answer: 30 * time.Second, idle: 30 * time.Second}

// newServer serves an API over HTTP.
func newServer(api control.API, log *slog.Logger, p timeouts) *http.Server {
	return serverOf(newHandler(api, log, p), log, p)
}

func serverOf(h http.Handler, log *slog.Logger, p timeouts) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: p.header,
		ReadTimeout:       p.header + p.body,
		WriteTimeout:      p.answer, // of what is not ours to say, such as where a path leads; see begin
		IdleTimeout:       p.idle,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// none is the body of a call that has nothing to say.
type none struct{}

// class is a kind of calls. Only as many of them as it has places are under way.
type class struct {
	places  chan struct{}
	refusal string // to those beyond the number; empty: they wait
}

func (c *class) enter(ctx context.Context) (leave func(), err error) {
	leave = func() { <-c.places }
	select {
	case c.places <- struct{}{}:
		return leave, nil
	default:
	}
	if c.refusal != "" {
		return nil, &control.Error{Code: control.Busy, Errno: unix.EBUSY, Message: c.refusal, Fix: "try again later"}
	}
	select {
	case c.places <- struct{}{}:
		return leave, nil
	case <-ctx.Done():
		return nil, fail(context.Cause(ctx), "wait for other calls")
	}
}

func places(n int) *class { return &class{places: make(chan struct{}, n)} }

// server is what the handlers of an API have in common.
type server struct {
	api      control.API
	mux      *http.ServeMux
	timeouts timeouts
}

func newHandler(api control.API, log *slog.Logger, p timeouts) http.Handler {
	s := &server{api: api, mux: http.NewServeMux(), timeouts: p}
	marks := places(maxMarks)
	turns := &class{make(chan struct{}, maxTurns), "too many changes wait for their turn"}
	watchers := s.handleReads()

	handle(s, places(1), "stop", func(ctx context.Context, _ none) (none, error) { return none{}, api.Stop(ctx) })

	handle(s, turns, "reload", api.Reload)

	handle(s, turns, "device/add", api.AddDevice)
	handle(s, turns, "device/remove", forced(api.RemoveDevice))
	s.serve(marks, "cbt/mark", p.ranges, s.mark)

	handle(s, turns, "snapshot/create", api.CreateSnapshot)
	handle(s, turns, "snapshot/add", api.AddToSnapshot)
	handle(s, turns, "snapshot/append", api.AppendStorage)
	handle(s, turns, "snapshot/take", api.TakeSnapshot)
	handle(s, turns, "snapshot/destroy", forced(api.DestroySnapshot))
	handle(s, turns, "snapshot/set", api.SetSnapshot)
	handle(s, watchers, "snapshot/wait", api.WaitEvent) // which takes the event away from others

	return s.handler(log, func(r *http.Request) error {
		return &control.Error{Code: control.Unsupported, Errno: unix.ENOSYS,
			Message: r.Method + " " + r.URL.Path + ": the daemon does not know this call",
			Fix:     "use a client of the daemon's version"}
	})
}

// handleReads serves what changes nothing. It returns the class of those who wait for events.
func (s *server) handleReads() (watchers *class) {
	api, quick, streams := s.api, places(maxQuick), places(maxStreams)
	watchers = &class{make(chan struct{}, maxWatchers), "too many wait for events"}
	handle(s, quick, "info", func(ctx context.Context, _ none) (control.Info, error) { return api.Info(ctx) })
	handle(s, quick, "device/list", func(ctx context.Context, _ none) ([]control.Device, error) { return api.Devices(ctx) })
	handle(s, quick, "device/status", func(ctx context.Context, r control.DeviceRef) (control.DeviceStatus, error) {
		return api.DeviceStatus(ctx, r.Device)
	})
	handle(s, quick, "cbt/info", func(ctx context.Context, r control.DeviceRef) (control.CBTInfo, error) {
		return api.CBTInfo(ctx, r.Device)
	})
	stream(s, streams, "cbt/map", s.cbtMap)
	stream(s, streams, "cbt/changes", s.cbtChanges)
	handle(s, quick, "snapshot/list", func(ctx context.Context, _ none) ([]control.Snapshot, error) { return api.Snapshots(ctx) })
	handle(s, quick, "snapshot/info", func(ctx context.Context, r control.SnapshotRef) (control.Snapshot, error) {
		return api.Snapshot(ctx, r.ID)
	})
	stream(s, watchers, "snapshot/watch", s.watch)
	if g, ok := api.(prometheus.Gatherer); ok {
		s.metrics(g)
	}
	return watchers
}

// handler serves the calls that there are, and refuses all others.
func (s *server) handler(log *slog.Logger, refusal func(r *http.Request) error) http.Handler {
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.writeError(w, refusal(r)) })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Debug("call", "path", r.URL.Path)
		s.mux.ServeHTTP(w, r)
	})
}

// serve calls f for each call of a path, once the call has its place. body is how
// long the caller may take to send the call's body.
func (s *server) serve(c *class, path string, body time.Duration, f func(w http.ResponseWriter, r *http.Request) error) {
	s.mux.HandleFunc("/v1/"+path, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			s.answerError(w, http.StatusMethodNotAllowed, invalid("%s %s: not this method: use POST", r.Method, r.URL.Path))
			return
		}
		leave, err := c.enter(r.Context())
		if err == nil {
			defer leave()
			if r.Body != http.NoBody { // without a body the server reads already, to notice that the caller goes
				rc := http.NewResponseController(w)
				_ = rc.SetReadDeadline(time.Now().Add(body))
				_ = rc.SetWriteDeadline(time.Now().Add(body)) // he may wait to be told to send it
			}
			err = f(w, r)
		}
		if err != nil {
			s.writeError(w, err)
		}
	})
}

// forced has an error of f tell too what f broke before it failed.
func forced[Req any](f func(context.Context, Req) (control.CutOff, error)) func(context.Context, Req) (control.CutOff, error) {
	return func(ctx context.Context, r Req) (control.CutOff, error) {
		c, err := f(ctx, r)
		if err != nil {
			err = c.With(errorOf(err))
		}
		return c, err
	}
}

// handle answers the calls of a path with what f returns.
func handle[Req, Resp any](s *server, c *class, path string, f func(context.Context, Req) (Resp, error)) {
	s.serve(c, path, s.timeouts.body, func(w http.ResponseWriter, r *http.Request) error {
		var req Req
		if err := readBody(r, &req); err != nil {
			return err
		}
		resp, err := f(r.Context(), req)
		if err != nil {
			return err
		}
		s.begin(w, "application/json")
		// An error here means that the caller went away.
		_ = json.NewEncoder(w).Encode(resp)
		return nil
	})
}

// stream answers the calls of a path with the lines that f puts.
func stream[Req any](s *server, c *class, path string, f func(ctx context.Context, req Req, put func(line any, flush bool) error) error) {
	s.serve(c, path, s.timeouts.body, func(w http.ResponseWriter, r *http.Request) error {
		var req Req
		if err := readBody(r, &req); err != nil {
			return err
		}
		began := false
		enc := json.NewEncoder(w)
		put := func(line any, flush bool) error {
			began = true
			s.begin(w, "application/x-ndjson")
			err := enc.Encode(line)
			if err == nil && flush {
				err = http.NewResponseController(w).Flush()
			}
			return err
		}
		err := f(r.Context(), req, put)
		if err == nil {
			s.begin(w, "application/x-ndjson")
			return nil
		}
		if !began {
			return err
		}
		_ = put(control.LastLine{Error: errorOf(err)}, true)
		// If the caller does not read that line, the answer that is broken off tells him.
		panic(http.ErrAbortHandler)
	})
}

// begin gives the caller time to take the next piece of an answer.
func (s *server) begin(w http.ResponseWriter, contentType string) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.timeouts.answer))
	w.Header().Set("Content-Type", contentType)
}

func (s *server) cbtMap(ctx context.Context, r control.DeviceRef, put func(any, bool) error) error {
	i, err := s.api.CBTMap(ctx, r.Device, putter(func(p []byte) error { return put(control.MapLine{Map: p}, false) }))
	if err != nil {
		return err
	}
	return put(control.LastLine{Info: &i}, false)
}

type putter func([]byte) error

func (f putter) Write(p []byte) (int, error) { return len(p), f(p) }

func (s *server) cbtChanges(ctx context.Context, r control.ChangesRequest, put func(any, bool) error) error {
	i, err := s.api.CBTChanges(ctx, r, func(changed control.Range) error { return put(control.RangeLine{Range: &changed}, false) })
	if err != nil {
		return err
	}
	return put(control.LastLine{Info: &i}, false)
}

func (s *server) watch(ctx context.Context, r control.WatchRequest, put func(any, bool) error) error {
	return s.api.Watch(ctx, r, func(e control.Event) error { return put(control.EventLine{Event: &e}, true) })
}

func (s *server) mark(w http.ResponseWriter, r *http.Request) error {
	req, err := readMark(r.Body)
	if err == nil {
		err = s.api.MarkDirty(r.Context(), req)
	}
	if err != nil {
		return err
	}
	s.begin(w, "application/json")
	_ = json.NewEncoder(w).Encode(none{})
	return nil
}

// readMark reads a MarkRequest as it comes, and keeps its ranges merged.
func readMark(body io.Reader) (r control.MarkRequest, err error) {
	limited := &io.LimitedReader{R: body, N: maxBody}
	d := json.NewDecoder(limited)
	d.DisallowUnknownFields()
	// next decodes the next value, which may be as long as a small request.
	next := func(v any) error {
		limited.N = maxBody
		return d.Decode(v)
	}
	want := func(want json.Delim) error {
		limited.N = maxBody
		t, err := d.Token()
		if err == nil && t != want {
			err = errors.New("want " + want.String())
		}
		return err
	}
	var ranges []cbtmap.Sectors
	err = want('{')
	for err == nil && d.More() {
		var key json.Token
		if key, err = d.Token(); err != nil {
			break
		}
		switch key {
		case "device":
			err = next(&r.Device)
		case "ranges":
			if key, err = d.Token(); err != nil || key == nil {
				break
			}
			if key != json.Delim('[') {
				err = errors.New("ranges are not a list")
			}
			for err == nil && d.More() {
				var added control.Range
				if err = next(&added); err == nil {
					ranges, err = addRange(ranges, added)
				}
			}
			if err == nil {
				err = want(']')
			}
		default:
			err = errors.New("unknown field " + key.(string))
		}
	}
	if err == nil {
		err = want('}')
	}
	if err == nil {
		err = atEnd(d)
	}
	if err != nil && limited.N <= 0 {
		err = &http.MaxBytesError{Limit: maxBody}
	}
	if err != nil {
		return r, bodyError(err)
	}
	for _, merged := range cbtmap.Merge(ranges) {
		r.Ranges = append(r.Ranges, control.Range{Sector: merged.First, Count: merged.Count})
	}
	return r, nil
}

func addRange(ranges []cbtmap.Sectors, r control.Range) ([]cbtmap.Sectors, error) {
	if err := r.Check(); err != nil {
		return nil, err
	}
	if len(ranges) == maxRanges {
		ranges = cbtmap.Merge(ranges)
		if len(ranges) > maxRanges/2 {
			return nil, invalid("more than %d separate ranges: mark them with several requests", maxRanges/2)
		}
	}
	return append(ranges, cbtmap.Sectors{First: r.Sector, Count: r.Count}), nil
}

func readBody(r *http.Request, req any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody))
	// A misspelt option must not be an option left out.
	d.DisallowUnknownFields()
	err := d.Decode(req)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil {
		err = atEnd(d)
	}
	if err != nil {
		return bodyError(err)
	}
	return nil
}

// atEnd makes sure that nothing follows. The server notices that the caller goes
// away only after the body has been read to its end.
func atEnd(d *json.Decoder) error {
	switch _, err := d.Token(); err {
	case io.EOF:
		return nil
	case nil:
		return errors.New("more than one value")
	default:
		return err
	}
}

func bodyError(err error) *control.Error {
	var e *control.Error
	var long *http.MaxBytesError
	var late net.Error
	switch {
	case errors.As(err, &e):
		return fail(err, "read request")
	case errors.As(err, &long):
		return invalid("read request: longer than %d bytes", long.Limit)
	case errors.As(err, &late) && late.Timeout():
		return &control.Error{Code: control.Timeout, Errno: unix.ETIMEDOUT, Message: "read request: it did not come in time"}
	}
	return invalid("read request: %v", err)
}

func errorOf(err error) *control.Error {
	var e *control.Error
	if !errors.As(err, &e) {
		e = &control.Error{Code: control.Internal, Message: err.Error()}
	}
	return e
}

func (s *server) writeError(w http.ResponseWriter, err error) {
	e := errorOf(err)
	s.answerError(w, httpStatus(e.Code), e)
}

func (s *server) answerError(w http.ResponseWriter, status int, e *control.Error) {
	s.begin(w, "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(e)
}

// limitListener lets only a number of connections in at a time.
type limitListener struct {
	net.Listener
	places chan struct{}
}

func (l *limitListener) Accept() (net.Conn, error) {
	l.places <- struct{}{}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &limitConn{Conn: conn, listener: l}, nil
}

type limitConn struct {
	net.Conn
	listener *limitListener
	released sync.Once
}

func (c *limitConn) Close() error {
	defer c.released.Do(func() { <-c.listener.places })
	return c.Conn.Close()
}

func httpStatus(c control.Code) int {
	switch c {
	case control.Invalid:
		return http.StatusBadRequest
	case control.NotFound:
		return http.StatusNotFound
	case control.Exists, control.Busy, control.ReadOnly, control.Corrupted, control.GenerationEnded:
		return http.StatusConflict
	case control.Denied:
		return http.StatusForbidden
	case control.Unsupported:
		return http.StatusNotImplemented
	case control.NoSpace:
		return http.StatusInsufficientStorage
	case control.Timeout:
		return http.StatusRequestTimeout
	case control.Unavailable, control.Interrupted:
		return http.StatusServiceUnavailable
	case control.Internal:
	}
	return http.StatusInternalServerError
}
