package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// TestReadersCalls: of all calls those that change nothing are for readers, whatever comes to
// the API.
func TestReadersCalls(t *testing.T) {
	ctx := context.Background()
	fake := &calling{fakeAPI{events: []control.Event{{Seq: 1}}}}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := serverOf(newReadHandler(fake, quiet().Logger, defaultTimeouts, "backup"), quiet().Logger, defaultTimeouts)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	c := control.NewClient(l.Addr().String())
	t.Cleanup(c.Close)
	reads := []string{"info", "list", "status", "cbt info", "cbt map", "changes", "list s", "snapshot", "watch"}
	denied := func(name string, err error) {
		t.Helper()
		if control.CodeOf(err) != control.Denied || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "backup may only look: run this as root") || fake.asked != nil {
			t.Errorf("%s: %v, asked for %v", name, err, fake.asked)
		}
	}
	for name, call := range calls(ctx, c) {
		fake.asked = nil
		_, err := call.do()
		if !slices.Contains(reads, name) {
			denied(name, err)
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	fake.asked = nil
	_, err = c.Reload(ctx, control.ReloadRequest{Program: "/bin/sh"})
	denied("reload", err)
	denied("stop", c.Stop(ctx))
	if resp, err := rawClient(t, l.Addr().String()).Get("http://d/metrics"); err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("metrics: %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
	denied("what nobody knows", post(t, rawClient(t, l.Addr().String()), "device/explode", http.NoBody))
}

// calling is an API with the device of calls.
type calling struct{ fakeAPI }

func (*calling) Devices(context.Context) ([]control.Device, error) {
	return []control.Device{{Name: "n"}}, nil
}

// listed is an API with one device, which it knows by its name alone.
type listed struct{ *fakeAPI }

func (l listed) Devices(context.Context) ([]control.Device, error) {
	return []control.Device{{Name: "data", Path: "/dev/ublkb0", Link: "/dev/ublk-blksnap/data", Original: "/dev/vdb"}}, nil
}

func (l listed) Info(context.Context) (control.Info, error) {
	return control.Info{Lost: &control.Lost{Devices: []control.LostDevice{{Name: "waiting"}}}}, nil
}

// TestReadersPaths: for a reader the daemon looks at no path that is not in its list.
func TestReadersPaths(t *testing.T) {
	fake := &fakeAPI{}
	r := reader{listed{fake}}
	ask := func(ref string) error {
		fake.asked = nil
		var errs []error
		for _, f := range []func() error{
			func() error { _, err := r.DeviceStatus(context.Background(), ref); return err },
			func() error { _, err := r.CBTInfo(context.Background(), ref); return err },
			func() error { _, err := r.CBTMap(context.Background(), ref, &strings.Builder{}); return err },
			func() error {
				_, err := r.CBTChanges(context.Background(), control.ChangesRequest{Device: ref}, func(control.Range) error { return nil })
				if q, ok := fake.asked.(control.ChangesRequest); ok {
					fake.asked = q.Device
				}
				return err
			},
		} {
			err := f()
			if err == nil && fake.asked != "data" {
				t.Errorf("%q: asked for %v", ref, fake.asked)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	for _, ref := range []string{"data", "/dev/ublkb0", "/dev/ublk-blksnap/data", "/dev/vdb"} {
		if err := ask(ref); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if name, err := r.name(context.Background(), "waiting"); err != nil || name != "waiting" {
		t.Errorf("one that waits: %q, %v", name, err)
	}
	for _, ref := range []string{"", "vdb", "proc", "/root/secret", "/dev/../dev/vdb", "/dev/vdc", "..", "./x"} {
		if err := ask(ref); err == nil || fake.asked != nil {
			t.Errorf("%s: %v, asked for %v", ref, err, fake.asked)
		}
	}
}

// asUser runs f on a thread with other rights, which ends with it.
func asUser(t *testing.T, uid, gid int, f func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		groups := [1]uint32{uint32(gid)}
		_, _, e1 := unix.RawSyscall(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&groups)), 0)
		_, _, e2 := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(uid), uintptr(uid), uintptr(uid))
		_, _, e3 := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid))
		if e1|e2|e3 != 0 {
			done <- errors.New("cannot change the user")
			return
		}
		done <- f()
	}()
	return <-done
}

// TestReadersSocket: members of the group reach their socket and nothing else, others reach
// nothing, and without a group there is no such socket.
func TestReadersSocket(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const member, other, nobody = 4242, 4243, 65534
	base, err := os.MkdirTemp("/dev/shm", "readers")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := RunDir(filepath.Join(base, "run"))
	if err := errors.Join(os.Chmod(base, 0o755), dir.make()); err != nil {
		t.Fatal(err)
	}
	reach := func(gid int, path string) error {
		return asUser(t, nobody, gid, func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		})
	}
	open := func(group string) *net.UnixListener {
		t.Helper()
		l, err := dir.listenReaders(host(0), group, nil)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l, err := dir.listen()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { l.Close() }()
	for _, again := range []bool{false, true} { // as after a death
		r := open("4242")
		if err := dir.make(); err != nil { // as the next command does
			t.Error(err)
		}
		if err := reach(member, dir.ReadSocket()); err != nil {
			t.Errorf("a member, again %v: %v", again, err)
		}
		for path, gid := range map[string]int{dir.Socket(): member, dir.ReadSocket(): other} {
			if err := reach(gid, path); !errors.Is(err, unix.EACCES) {
				t.Errorf("group %d reaches %s: %v", gid, path, err)
			}
		}
		r.Close()
		// The next daemon, until it comes to readers: they are told that none runs yet, and try again.
		_ = l.Close()
		if l, err = dir.listen(); err != nil {
			t.Fatal(err)
		}
		if err := reach(member, dir.ReadSocket()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a member, while the next daemon starts: %v", err)
		}
	}
	// One that is handed on stays, if it is for the group that is configured now.
	first := open("4242")
	if r, err := dir.listenReaders(host(0), "4242", first); err != nil || r != first {
		t.Errorf("handed on: %v, %v", r, err)
	}
	second, err := dir.listenReaders(host(0), "4243", first)
	if err != nil || second == first {
		t.Fatalf("the socket of another group is kept: %v", err)
	}
	defer second.Close()
	if err := errors.Join(reach(other, dir.ReadSocket()), first.SetDeadline(time.Now())); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the group has changed: %v", err)
	}
	if err := reach(member, dir.ReadSocket()); !errors.Is(err, unix.EACCES) {
		t.Errorf("a member of the group before: %v", err)
	}
	if r := open(""); r != nil {
		t.Error("a socket without a group")
	}
	if _, err := os.Stat(dir.ReadSocket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if st, err := os.Stat(string(dir)); err != nil || st.Mode().Perm() != closedMode {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if r, err := dir.listenReaders(host(0), "no-such-group", nil); err == nil || r != nil {
		t.Errorf("a group that is not there: %v, %v", r, err)
	}
	if notes := GroupNotes(Config{Group: "no-such-group"}); len(notes) != 1 || !strings.Contains(notes[0], "no-such-group") {
		t.Errorf("%v", notes)
	}
	if notes := append(GroupNotes(Config{}), GroupNotes(Config{Group: "root"})...); len(notes) > 0 {
		t.Errorf("%v", notes)
	}
}

// TestSocketsAreBornClosed: nobody can come in before a socket has its mode.
func TestSocketsAreBornClosed(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	path := filepath.Join(t.TempDir(), "s")
	l, err := listenClosed(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if st, err := os.Lstat(path); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", st, err)
	}
}

// TestReaderWithoutDaemon: who is not root is told that no daemon runs, and starts none.
func TestReaderWithoutDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	s := Starter{Dir: RunDir(filepath.Join(t.TempDir(), "none"))}
	for want, reach := range map[control.Code]func(context.Context) (*control.Client, error){
		control.Unavailable: s.Connect, control.Denied: s.Start,
	} {
		err := asUser(t, 65534, 65534, func() error { _, err := reach(context.Background()); return err })
		if control.CodeOf(err) != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
