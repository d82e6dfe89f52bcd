package daemon

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// systemd is what a daemon tells systemd from now on.
func systemd(t *testing.T) (said chan string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	said = make(chan string, 1000)
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := l.Read(b)
			if err != nil {
				return
			}
			said <- string(b[:n])
		}
	}()
	return said
}

// hears waits for a message that begins so.
func hears(t *testing.T, said chan string, begin string) string {
	t.Helper()
	for end := time.After(time.Minute); ; {
		select {
		case s := <-said:
			if strings.HasPrefix(s, begin) {
				return s
			}
		case <-end:
			t.Fatalf("systemd was not told %s", begin)
		}
	}
}

// TestWatchdog: signs of life come as long as the threads that serve I/O do their
// work, and end when one does not.
func TestWatchdog(t *testing.T) {
	said := systemd(t)
	t.Setenv("WATCHDOG_USEC", "300000")
	fake := &fakeAPI{}
	ended := runFake(t, RunDir(t.TempDir()), fake)
	hears(t, said, "EXTEND_TIMEOUT_USEC=60000000")
	hears(t, said, "READY=1")
	hears(t, said, "WATCHDOG_USEC=300000") // whatever a reload has set
	for range 3 {
		hears(t, said, "WATCHDOG=1")
	}
	fake.hangs.Store(true)
	// One may be on its way. None follows it within several times the pause.
	for silent := false; !silent; {
		select {
		case s := <-said:
			if strings.HasPrefix(s, "WATCHDOG=1") && fake.hangs.Load() {
				continue
			}
		case <-time.After(time.Second):
			silent = true
		}
	}
	fake.hangs.Store(false)
	hears(t, said, "WATCHDOG=1")
	unix.Kill(unix.Getpid(), unix.SIGTERM)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	hears(t, said, "STOPPING=1")
}

// TestNoWatchdog: systemd gets no sign that it does not wait for.
func TestNoWatchdog(t *testing.T) {
	for name, set := range map[string][2]string{"none": {"", ""}, "zero": {"0", ""}, "of another process": {"1000", "1"}} {
		t.Setenv("WATCHDOG_USEC", set[0])
		t.Setenv("WATCHDOG_PID", set[1])
		if got := watchdogTime(); got != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestStartProgress: systemd is asked to wait only for a start that makes steps. After a
// reload the watchdog waits as long.
func TestStartProgress(t *testing.T) {
	said := systemd(t)
	t.Setenv("WATCHDOG_USEC", "300000")
	const step, patience = 30 * time.Millisecond, 300 * time.Millisecond
	p := &progress{}
	end := time.Now().Add(4 * patience)
	stop := extend(step, "", p.watched(patience))
	for time.Now().Before(end) {
		p.made()
		hears(t, said, "EXTEND_TIMEOUT_USEC=30000")
	}
	// It hangs.
	for silent := false; !silent; {
		select {
		case <-said:
			if time.Since(end) > time.Minute {
				t.Fatal("systemd is asked to wait for ever")
			}
		case <-time.After(patience):
			silent = true
		}
	}
	stop()
	stop = extendStart(p, time.Hour, true)
	defer stop()
	hears(t, said, "WATCHDOG_USEC=60000000")
	if s := hears(t, said, "EXTEND_TIMEOUT_USEC=60000000"); !strings.HasSuffix(s, "\nWATCHDOG=1") {
		t.Errorf("after a reload: %q", s)
	}
}
