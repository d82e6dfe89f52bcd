package control

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"golang.org/x/sys/unix"
)

// maxBody bounds a request's body: a map of the largest device marked dirty
// range by range fits.
const maxBody = 64 << 20

// none is the body of a call that has nothing to say.
type none struct{}

type (
	deviceRef struct {
		Device string `json:"device"`
	}
	snapshotRef struct {
		ID string `json:"id"`
	}
	mapAnswer struct {
		Map []byte `json:"map"`
	}
)

// NewHandler serves an API over HTTP.
func NewHandler(api API, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	handle(mux, "info", func(ctx context.Context, _ none) (Info, error) { return api.Info(ctx) })

	handle(mux, "device/add", api.AddDevice)
	handle(mux, "device/remove", answerless(api.RemoveDevice))
	handle(mux, "device/list", func(ctx context.Context, _ none) ([]Device, error) { return api.Devices(ctx) })
	handle(mux, "device/status", func(ctx context.Context, r deviceRef) (DeviceStatus, error) { return api.DeviceStatus(ctx, r.Device) })

	handle(mux, "cbt/info", func(ctx context.Context, r deviceRef) (CBTInfo, error) { return api.CBTInfo(ctx, r.Device) })
	handle(mux, "cbt/map", func(ctx context.Context, r deviceRef) (mapAnswer, error) {
		m, err := api.CBTMap(ctx, r.Device)
		return mapAnswer{m}, err
	})
	handle(mux, "cbt/changes", api.CBTChanges)
	handle(mux, "cbt/mark", answerless(api.MarkDirty))

	handle(mux, "snapshot/create", api.CreateSnapshot)
	handle(mux, "snapshot/add", api.AddToSnapshot)
	handle(mux, "snapshot/append", api.AppendStorage)
	handle(mux, "snapshot/take", api.TakeSnapshot)
	handle(mux, "snapshot/destroy", func(ctx context.Context, r snapshotRef) (none, error) { return none{}, api.DestroySnapshot(ctx, r.ID) })
	handle(mux, "snapshot/list", func(ctx context.Context, _ none) ([]Snapshot, error) { return api.Snapshots(ctx) })
	handle(mux, "snapshot/info", func(ctx context.Context, r snapshotRef) (Snapshot, error) { return api.Snapshot(ctx, r.ID) })
	handle(mux, "snapshot/wait", api.WaitEvent)
	post(mux, "snapshot/watch", func(w http.ResponseWriter, r *http.Request) { watch(api, w, r) })

	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, &Error{Code: Unsupported, Errno: unix.ENOSYS,
			Message: r.Method + " " + r.URL.Path + ": the daemon does not know this call",
			Fix:     "use a client of the daemon's version"})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Debug("call", "path", r.URL.Path)
		mux.ServeHTTP(w, r)
	})
}

// post serves a call. Another method is answered with what is right.
func post(mux *http.ServeMux, path string, serve http.HandlerFunc) {
	mux.HandleFunc("/v1/"+path, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			serve(w, r)
			return
		}
		w.Header().Set("Allow", http.MethodPost)
		answerError(w, http.StatusMethodNotAllowed, invalid("%s %s: not this method: use POST", r.Method, r.URL.Path))
	})
}

func answerless[Req any](f func(context.Context, Req) error) func(context.Context, Req) (none, error) {
	return func(ctx context.Context, r Req) (none, error) { return none{}, f(ctx, r) }
}

func handle[Req, Resp any](mux *http.ServeMux, path string, f func(context.Context, Req) (Resp, error)) {
	post(mux, path, func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if err := readBody(r, &req); err != nil {
			writeError(w, err)
			return
		}
		resp, err := f(r.Context(), req)
		if err != nil {
			writeError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// An error here is a caller that went away.
		_ = json.NewEncoder(w).Encode(resp)
	})
}

func readBody(r *http.Request, req any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody))
	// A misspelt option must not be an option left out.
	d.DisallowUnknownFields()
	if err := d.Decode(req); err != nil && err != io.EOF {
		return invalid("read request: %v", err)
	}
	return nil
}

func writeError(w http.ResponseWriter, err error) {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Code: Internal, Message: err.Error()}
	}
	answerError(w, httpStatus(e.Code), e)
}

func answerError(w http.ResponseWriter, status int, e *Error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(e)
}

func httpStatus(c Code) int {
	switch c {
	case Invalid:
		return http.StatusBadRequest
	case NotFound:
		return http.StatusNotFound
	case Exists, Busy, ReadOnly, Corrupted, GenerationEnded:
		return http.StatusConflict
	case Denied:
		return http.StatusForbidden
	case Unsupported:
		return http.StatusNotImplemented
	case NoSpace:
		return http.StatusInsufficientStorage
	case Timeout:
		return http.StatusRequestTimeout
	case Unavailable, Interrupted:
		return http.StatusServiceUnavailable
	case Internal:
	}
	return http.StatusInternalServerError
}

func watch(api API, w http.ResponseWriter, r *http.Request) {
	var req snapshotRef
	if err := readBody(r, &req); err != nil {
		writeError(w, err)
		return
	}
	began := false
	begin := func() {
		if !began {
			began = true
			w.Header().Set("Content-Type", "application/x-ndjson")
			w.WriteHeader(http.StatusOK)
		}
	}
	enc := json.NewEncoder(w)
	err := api.Watch(r.Context(), req.ID, func(e Event) error {
		begin()
		if err := enc.Encode(e); err != nil {
			return err
		}
		return http.NewResponseController(w).Flush()
	})
	switch {
	case err == nil:
		begin()
	case !began:
		writeError(w, err)
	default:
		// The answer has begun: only breaking it off says that it is not whole.
		panic(http.ErrAbortHandler)
	}
}
