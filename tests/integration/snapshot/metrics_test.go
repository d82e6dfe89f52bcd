package snapshot

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// TestMetrics scrapes a daemon under load, on its socket and on a loopback address, and
// while a disk does not answer.
func TestMetrics(t *testing.T) {
	guest.NeedEither(t)
	const size, address = 16 << 20, "127.0.0.1:9469"
	guest.Run(t, "modprobe", "dm-mod")
	disk := guest.DMDisk(t, "measured", guest.LinearTable(t, guest.RAMDisks(t, 1, size)[0]))
	d := program.Start(t, "metrics="+address)
	socket := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.RunDir.Socket())
	}}}
	defer socket.CloseIdleConnections()
	defer http.DefaultClient.CloseIdleConnections()
	scrape := func(c *http.Client, method, path string) (status int, text string, err error) {
		ctx, cancel := context.WithTimeout(guest.Context(t), 20*time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := c.Do(r)
		if err != nil {
			return 0, "", err
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		return answer.StatusCode, string(b), err
	}
	value := func(text, metric string) (v float64) {
		t.Helper()
		for _, line := range strings.Split(text, "\n") {
			if rest, ok := strings.CutPrefix(line, metric+" "); ok {
				if _, err := fmt.Sscan(rest, &v); err != nil {
					t.Fatalf("%s: %v", line, err)
				}
				return v
			}
		}
		t.Errorf("there is no %s", metric)
		return 0
	}
	guest.WaitFor(t, "metrics on "+address, func() bool { _, _, err := scrape(http.DefaultClient, http.MethodGet, "/metrics"); return err == nil })

	dev := d.Add(disk)
	s := d.Take(16<<10, dev)
	w := stamp.NewWorld(size)
	if err := w.Fill(dev.Path); err != nil {
		t.Fatal(err)
	}
	stop := w.StartWriters(t, 6, stamp.Mix{Writers: 2}, dev.Path)
	writes := fmt.Sprintf("ublk_blksnap_filter_requests_total{device=%q,operation=\"write\"}", dev.Name)
	for i := range 20 {
		c := socket
		if i%2 == 1 {
			c = http.DefaultClient
		}
		status, text, err := scrape(c, http.MethodGet, "/metrics")
		if err != nil || status != http.StatusOK {
			t.Fatalf("scrape %d: %d, %v", i, status, err)
		}
		if value(text, writes) == 0 || value(text, fmt.Sprintf("ublk_blksnap_snapshot_used_bytes{snapshot=%q}", s.ID)) != size ||
			value(text, fmt.Sprintf("ublk_blksnap_cbt_take_number{device=%q}", dev.Name)) != 1 {
			t.Fatalf("scrape %d: %s", i, text)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]int{"/v1/device/list": http.StatusNotFound, "/metrics": http.StatusMethodNotAllowed} {
		if status, _, err := scrape(http.DefaultClient, http.MethodPost, path); status != want || err != nil {
			t.Errorf("POST %s on the loopback address: %d, %v", path, status, err)
		}
	}

	// A write that hangs hangs no scrape.
	guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "measured")
	resume := func() { guest.Run(t, "dmsetup", "resume", "measured") }
	written := make(chan error, 1)
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	go func() { written <- f.WriteAt(direct.Pages(t, 4096), 0) }()
	guest.WaitFor(t, "a write that is counted as under way", func() bool {
		_, text, err := scrape(socket, http.MethodGet, "/metrics")
		if err != nil {
			resume()
			t.Fatal(err)
		}
		return value(text, fmt.Sprintf("ublk_blksnap_filter_in_flight_requests{device=%q}", dev.Name)) > 0
	})
	resume()
	if err := <-written; err != nil {
		t.Error(err)
	}
	f.Close()
	d.Destroy(s.ID)
	d.Remove(dev)
}
