package daemon

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/control/controltest"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// lines is a log that many write to.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// TestMalformedRequests: 10,000 requests that mean nothing are refused, each with a reason, half
// of them at the socket of those who may only look. Nothing changes, nothing is left of them, and who comes next is served. The integration
// tests do the same to a daemon with a snapshot.
func TestMalformedRequests(t *testing.T) {
	n := 10_000
	if testing.Short() {
		n = 1000
	}
	m, err := cbtmap.NewMemory(1<<20, cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	take := m.Switch()
	var log lines
	d := &Daemon{
		opts: Options{Dir: RunDir(t.TempDir()), Log: NewLog(&log, slog.LevelInfo, false), Config: DefaultConfig()}, host: disk.Machine(), events: newEventLog(),
		opLock: make(chan struct{}, 1), waiting: map[string]*survivor{}, snapshots: map[string]*snapshot{},
		devices: map[string]*device{"data": {
			Device: control.Device{Name: "data", Original: "/dev/none", Size: 1 << 20}, cbt: m,
			disk: &disk.Disk{Name: "none", Node: "/dev/none", Num: blockdev.Num{Major: 240, Minor: 1}}, ublk: &ublk.Device{Num: blockdev.Num{Major: 240, Minor: 2}},
		}},
	}
	d.opts.Config.StateDir = t.TempDir()
	d.activity.Store(new(string))
	dir := t.TempDir()
	serve := func(name string, s *http.Server, limit int) (socket string, places chan struct{}) {
		socket, places = filepath.Join(dir, name), make(chan struct{}, limit)
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go s.Serve(&limitListener{Listener: l, places: places})
		t.Cleanup(func() { s.Close() })
		return socket, places
	}
	socket, places := serve("control", newServer(d, d.opts.Log.Logger, defaultTimeouts), maxConnections)
	forReaders := serverOf(newReadHandler(d, d.opts.Log.Logger, defaultTimeouts, "backup"), d.opts.Log.Logger, defaultTimeouts)
	readSocket, readPlaces := serve("read", forReaders, maxReaders)
	goroutines := runtime.NumGoroutine()

	known := controltest.Known{Device: "data", Path: "/dev/none", Snapshot: uuid.NewString(), Generation: take.GenerationID.String(), Sectors: 1 << 11}
	var wg sync.WaitGroup
	for part := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			seed := uint64(part)
			r := rand.New(rand.NewPCG(seed, 11))
			for range n / 8 {
				if err := controltest.Try([]string{socket, readSocket}[part%2], controltest.Malformed(r, known), 20*time.Second); err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		}()
	}
	wg.Wait()

	if now, err := m.Info(); err != nil || now != take {
		t.Errorf("the change map was %+v, is %+v, %v", take, now, err)
	}
	c := control.NewClient(readSocket)
	defer c.Close()
	eventually(t, "the end of what callers asked for that have left", func() bool {
		i, err := c.Info(context.Background())
		return err == nil && i.Activity == ""
	})
	if len(d.devices) != 1 || len(d.snapshots) != 0 {
		t.Errorf("%d devices, %d snapshots", len(d.devices), len(d.snapshots))
	}
	c.Close()
	for end := time.Now().Add(20 * time.Second); len(places) > 1 || len(readPlaces) > 1 || runtime.NumGoroutine() > goroutines+4; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d and %d connections, %d goroutines, %d before:\n%s", len(places), len(readPlaces), runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
		}
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	if text := log.text.String(); strings.Contains(text, "panic") {
		t.Errorf("the log: %.3000s", text)
	}
}
