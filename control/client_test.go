package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
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
