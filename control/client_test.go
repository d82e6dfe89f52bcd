package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

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

// TestClientAsksTheNext: what a program had not begun when another took over, that one does.
func TestClientAsksTheNext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var got RemoveRequest
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil || got.Device != "data" {
			t.Errorf("asked for %+v, %v", got, err)
		}
		if asked++; asked < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			_ = json.NewEncoder(w).Encode(&Error{Code: Unavailable, Errno: unix.ERESTART, Message: "another program takes over"})
			return
		}
		_ = json.NewEncoder(w).Encode(struct{}{})
	})}
	defer s.Close()
	go func() { _ = s.Serve(l) }()
	if _, err := NewClient(socket).RemoveDevice(context.Background(), RemoveRequest{Device: "data"}); err != nil || asked != 3 {
		t.Errorf("asked %d times: %v", asked, err)
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
