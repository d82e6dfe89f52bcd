package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// The members of a group may look. They have a socket of their own, beside that of root:
//
//	/run/ublk-blksnap	root:GROUP	0710	closed to others, and to be passed through
//	  control.sock		root		0600	all calls
//	  read.sock		root:GROUP	0660	those that change nothing
//
// So the kernel decides who may do what. Nothing is shared that one could take away from the
// other: connections, and the places of calls. A reader's request has the daemon open no path.
// While another program takes over, callers wait at both sockets.

// ReadSocket is where the members of a group may ask.
func (d RunDir) ReadSocket() string { return d.path("read.sock") }

const (
	closedMode = 0o700
	passedMode = 0o710 // if a group may look
	maxReaders = 64    // connections
)

// setMode gives the directory its mode, and its group.
func (d RunDir) setMode(mode os.FileMode, gid int) error {
	dir, err := d.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	if mode == passedMode { // the group before the mode, which is for it
		if err := dir.Chown(0, gid); err != nil {
			return err
		}
	}
	return dir.Chmod(mode)
}

// findGroup is the number of a group that is given by its name or number. It knows what
// /etc/group has.
func findGroup(h *disk.Host, name string) (gid int, err error) {
	if gid, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(gid), nil
	}
	text, err := h.ReadFile("/etc/group")
	if err != nil {
		return 0, fmt.Errorf("group %s: %w", name, err)
	}
	for _, line := range strings.Split(text, "\n") { // group(5)
		if f := strings.Split(line, ":"); len(f) == 4 && f[0] == name {
			return strconv.Atoi(f[2])
		}
	}
	return 0, fmt.Errorf("group %s: not in /etc/group", name)
}

// GroupNotes tell what is wrong with the group that may look.
func GroupNotes(c Config) []string {
	if c.Group == "" {
		return nil
	}
	if _, err := findGroup(host(0), c.Group); err != nil {
		return []string{err.Error() + ": until it is there, root alone may ask the daemon"}
	}
	return nil
}

// listenReaders makes the socket for the members of a group of the machine, or, without one, sees to that
// there is none. One that the program before has handed on stays, if it is for that group.
func (d RunDir) listenReaders(h *disk.Host, group string, handed *net.UnixListener) (*net.UnixListener, error) {
	gid, err := -1, error(nil)
	if group != "" {
		gid, err = findGroup(h, group)
	}
	if handed != nil {
		var st unix.Stat_t
		if err == nil && unix.Lstat(d.ReadSocket(), &st) == nil && int64(st.Gid) == int64(gid) {
			return handed, d.setMode(passedMode, gid)
		}
		handed.Close()
	}
	if err := os.Remove(d.ReadSocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if group == "" || err != nil {
		return nil, errors.Join(err, d.setMode(closedMode, 0))
	}
	// It has its name when it has its mode: a member who watches tries again and again.
	made := d.ReadSocket() + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := listenClosed(made)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chown(made, 0, gid), os.Chmod(made, 0o660), d.setMode(passedMode, gid), os.Rename(made, d.ReadSocket())); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// serveReaders serves the members of the group at the listener that it returns, if there is
// one, until the server is shut down. That they cannot be is no reason for the disks not to be
// served.
func (o *Options) serveReaders(ctx context.Context, api control.API, handed *net.UnixListener) (*net.UnixListener, *http.Server) {
	srv := serverOf(newReadHandler(api, o.Log.Logger, defaultTimeouts, o.Config.Group), o.Log.Logger, defaultTimeouts)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	l, err := o.Dir.listenReaders(o.host(), o.Config.Group, handed)
	if err != nil {
		o.Log.Error("nobody but root can ask the daemon", "group", o.Config.Group, "error", err)
	}
	if l != nil {
		go func() { _ = srv.Serve(&limitListener{Listener: l, places: make(chan struct{}, maxReaders)}) }()
	}
	return l, srv
}

// newReadHandler serves what changes nothing.
func newReadHandler(api control.API, log *slog.Logger, p timeouts, group string) http.Handler {
	s := &server{api: reader{api}, mux: http.NewServeMux(), timeouts: p}
	s.handleReads()
	if g, ok := api.(prometheus.Gatherer); ok {
		s.metrics(g)
	}
	return s.handler(log, func(r *http.Request) error {
		return &control.Error{Code: control.Denied, Errno: unix.EPERM, Fix: "run this as root",
			Message: strings.TrimPrefix(r.URL.Path, "/v1/") + ": the members of the group " + group + " may only look"}
	})
}

// reader is an API for those who may only look. They name devices as the list of devices
// does: the daemon, which is root, does not look at other paths for them.
type reader struct{ control.API }

// name is the name of a device that is named as in the list, or by the name of one that
// waits for its disk.
func (r reader) name(ctx context.Context, ref string) (string, error) {
	if ref == "" { // which is also the link of a device that has lost it
		return "", invalid("no device is named")
	}
	all, err := r.Devices(ctx)
	if err != nil {
		return "", err
	}
	for _, dev := range all {
		if slices.Contains([]string{dev.Name, dev.Path, dev.Link, dev.Original}, ref) {
			return dev.Name, nil
		}
	}
	if i, err := r.Info(ctx); err == nil && i.Lost != nil {
		for _, dev := range i.Lost.Devices {
			if dev.Name == ref {
				return dev.Name, nil
			}
		}
	}
	return "", &control.Error{Code: control.NotFound, Errno: unix.ENODEV, Message: ref + ": no filter is listed so", Fix: "name it as list does"}
}

func (r reader) DeviceStatus(ctx context.Context, ref string) (control.DeviceStatus, error) {
	name, err := r.name(ctx, ref)
	if err != nil {
		return control.DeviceStatus{}, err
	}
	return r.API.DeviceStatus(ctx, name)
}

func (r reader) CBTInfo(ctx context.Context, ref string) (control.CBTInfo, error) {
	name, err := r.name(ctx, ref)
	if err != nil {
		return control.CBTInfo{}, err
	}
	return r.API.CBTInfo(ctx, name)
}

func (r reader) CBTMap(ctx context.Context, ref string, w io.Writer) (control.CBTInfo, error) {
	name, err := r.name(ctx, ref)
	if err != nil {
		return control.CBTInfo{}, err
	}
	return r.API.CBTMap(ctx, name, w)
}

func (r reader) CBTChanges(ctx context.Context, q control.ChangesRequest, each func(control.Range) error) (_ control.CBTInfo, err error) {
	if q.Device, err = r.name(ctx, q.Device); err != nil {
		return control.CBTInfo{}, err
	}
	return r.API.CBTChanges(ctx, q, each)
}
