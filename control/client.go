package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"time"
)

const (
	// DefaultSocket is where the daemon of a machine listens.
	DefaultSocket = "/run/ublk-blksnap/control.sock"
	// DefaultReadSocket is where it listens for those who may only look.
	DefaultReadSocket = "/run/ublk-blksnap/read.sock"
)

// Client asks a daemon. It may be used from several goroutines at once.
type Client struct {
	socket string
	http   *http.Client
}

var _ API = (*Client)(nil)

// NewClient makes a client of the daemon that listens on the UNIX socket. It
// does not connect yet.
func NewClient(socket string) *Client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	return &Client{socket: socket, http: &http.Client{Transport: t}}
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// restart is the errno of a daemon that has done nothing, and the next one can be asked.
var restart = errnoNamed("ERESTART")

// send sends a request to the daemon. If the program that has it hands over to another before
// it did anything, that one gets it.
func (c *Client) send(ctx context.Context, path string, req any) (*http.Response, error) {
	for {
		resp, err := c.sendOnce(ctx, path, req)
		if !errors.Is(err, restart) || ctx.Err() != nil {
			return resp, err
		}
		c.http.CloseIdleConnections() // that of the program before
	}
}

func (c *Client) sendOnce(ctx context.Context, path string, req any) (*http.Response, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("write request %s: %w", path, err)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://daemon/v1/"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("write request %s: %w", path, err)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Message == "" {
		return nil, &Error{Code: Internal, Message: fmt.Sprintf("%s: the daemon answered %s", path, resp.Status)}
	}
	return nil, &e
}

// refused is the error of a socket that nobody listens on.
var refused = errnoNamed("ECONNREFUSED")

// transportError says why the daemon could not be asked.
func (c *Client) transportError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ContextError(ctx.Err(), "ask the daemon")
	case errors.Is(err, fs.ErrPermission):
		return &Error{Code: Denied, Errno: errnoNamed("EACCES"), Message: "connect to " + c.socket + ": permission denied", Fix: "run this as root"}
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, refused):
		return &Error{Code: Unavailable, Errno: refused, Message: "no daemon runs on " + filepath.Dir(c.socket),
			Fix: "start it with systemctl start ublk-blksnap, ublk-blksnap add or ublk-blksnap daemon"}
	}
	return &Error{Code: Unavailable, Errno: errnoNamed("ECONNRESET"), Message: "the daemon on " + c.socket + " broke the connection off: " + err.Error(),
		Fix: "see its log: journalctl -u ublk-blksnap, or daemon.log beside the socket"}
}

func call[Resp any](ctx context.Context, c *Client, path string, req any) (Resp, error) {
	var out Resp
	resp, err := c.send(ctx, path, req)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		return out, c.transportError(ctx, err)
	}
	return out, nil
}

// Info implements API.
func (c *Client) Info(ctx context.Context) (Info, error) { return call[Info](ctx, c, "info", none{}) }

// Stop implements API. On Linux it returns when the process has ended, so that
// another daemon can be started at once.
func (c *Client) Stop(ctx context.Context) error {
	i, err := c.Info(ctx)
	if err != nil {
		return err
	}
	// Before it is stopped: its number may soon be another process's.
	p, ok := openProcess(i.PID)
	if ok {
		defer p.close()
	}
	if _, err := call[none](ctx, c, "stop", none{}); err != nil || !ok {
		return err
	}
	if err := p.wait(ctx); err != nil {
		return ContextError(err, "wait for the end of the daemon")
	}
	return nil
}

// reloadPatience is how long the daemon may be out of reach while it reloads.
const reloadPatience = time.Minute

// Reload implements API. It returns when the program serves.
func (c *Client) Reload(ctx context.Context, r ReloadRequest) (Reloaded, error) {
	plan, err := call[Reloaded](ctx, c, "reload", r)
	if err != nil {
		return plan, err
	}
	for lost := (time.Time{}); ; time.Sleep(10 * time.Millisecond) {
		i, err := c.Info(ctx)
		switch {
		case CodeOf(err) == Unavailable && ctx.Err() == nil:
			if lost.IsZero() {
				lost = time.Now()
			}
			if time.Since(lost) < reloadPatience {
				continue
			}
			return plan, err
		case err != nil:
			return plan, err
		}
		lost = time.Time{}
		switch done := i.Reloaded; {
		case done != nil && done.At.Equal(plan.At) && done.Error != "":
			return *done, &Error{Code: Internal, Message: "reload: " + done.Error, Fix: "the program before has taken over again"}
		case done != nil && done.At.Equal(plan.At):
			return *done, nil
		case i.Started.After(plan.At):
			return plan, &Error{Code: Internal, Message: "reload: the daemon died in the middle of it, and the next one has taken over", Fix: "see its log"}
		}
	}
}

// AddDevice implements API.
func (c *Client) AddDevice(ctx context.Context, r AddRequest) (Device, error) {
	return call[Device](ctx, c, "device/add", r)
}

// RemoveDevice implements API.
func (c *Client) RemoveDevice(ctx context.Context, r RemoveRequest) (CutOff, error) {
	return forced(call[CutOff](ctx, c, "device/remove", r))
}

// Devices implements API.
func (c *Client) Devices(ctx context.Context) ([]Device, error) {
	return call[[]Device](ctx, c, "device/list", none{})
}

// DeviceStatus implements API.
func (c *Client) DeviceStatus(ctx context.Context, device string) (DeviceStatus, error) {
	return call[DeviceStatus](ctx, c, "device/status", DeviceRef{device})
}

// CBTInfo implements API.
func (c *Client) CBTInfo(ctx context.Context, device string) (CBTInfo, error) {
	return call[CBTInfo](ctx, c, "cbt/info", DeviceRef{device})
}

// CBTMap implements API.
func (c *Client) CBTMap(ctx context.Context, device string, w io.Writer) (info CBTInfo, err error) {
	err = lines(ctx, c, "cbt/map", DeviceRef{device}, func(l MapLine) (*LastLine, error) {
		if l.Info != nil {
			info = *l.Info
		}
		_, err := w.Write(l.Map)
		return &l.LastLine, err
	})
	return info, err
}

// CBTChanges implements API.
func (c *Client) CBTChanges(ctx context.Context, r ChangesRequest, each func(Range) error) (info CBTInfo, err error) {
	err = lines(ctx, c, "cbt/changes", r, func(l RangeLine) (*LastLine, error) {
		if l.Info != nil {
			info = *l.Info
		}
		if l.Range == nil {
			return &l.LastLine, nil
		}
		return &l.LastLine, each(*l.Range)
	})
	return info, err
}

// MarkDirty implements API.
func (c *Client) MarkDirty(ctx context.Context, r MarkRequest) error {
	_, err := call[none](ctx, c, "cbt/mark", r)
	return err
}

// CreateSnapshot implements API.
func (c *Client) CreateSnapshot(ctx context.Context, r CreateRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/create", r)
}

// AddToSnapshot implements API.
func (c *Client) AddToSnapshot(ctx context.Context, r SnapshotDeviceRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/add", r)
}

// AppendStorage implements API.
func (c *Client) AppendStorage(ctx context.Context, r StorageRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/append", r)
}

// TakeSnapshot implements API.
func (c *Client) TakeSnapshot(ctx context.Context, r TakeRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/take", r)
}

// DestroySnapshot implements API.
func (c *Client) DestroySnapshot(ctx context.Context, r DestroyRequest) (CutOff, error) {
	return forced(call[CutOff](ctx, c, "snapshot/destroy", r))
}

// SetSnapshot implements API.
func (c *Client) SetSnapshot(ctx context.Context, r SetRequest) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/set", r)
}

// Snapshots implements API.
func (c *Client) Snapshots(ctx context.Context) ([]Snapshot, error) {
	return call[[]Snapshot](ctx, c, "snapshot/list", none{})
}

// Snapshot implements API.
func (c *Client) Snapshot(ctx context.Context, id string) (Snapshot, error) {
	return call[Snapshot](ctx, c, "snapshot/info", SnapshotRef{id})
}

// WaitEvent implements API.
func (c *Client) WaitEvent(ctx context.Context, r WaitRequest) (Event, error) {
	return call[Event](ctx, c, "snapshot/wait", r)
}

// lines calls each for the lines of a long answer. It ends with each's error, or
// the one that is in a line.
func lines[Line any](ctx context.Context, c *Client, path string, req any, each func(Line) (*LastLine, error)) error {
	resp, err := c.send(ctx, path, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var l Line
		switch err := d.Decode(&l); {
		case err == io.EOF:
			return nil
		case err != nil:
			return c.transportError(ctx, err)
		}
		last, err := each(l)
		if last.Error != nil {
			return last.Error
		}
		if err != nil {
			return err
		}
	}
}
