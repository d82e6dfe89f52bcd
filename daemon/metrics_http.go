package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

const (
	maxScrapes        = 4  // at a time: more wait
	maxMetricsCallers = 16 // connections to the loopback address
	metricsRetry      = 10 * time.Second
)

// serveMetrics answers with what is measured.
func serveMetrics(w http.ResponseWriter, r *http.Request, g prometheus.Gatherer) error {
	families, err := g.Gather()
	if err != nil {
		return fail(err, "measure")
	}
	format := expfmt.Negotiate(r.Header)
	w.Header().Set("Content-Type", string(format))
	enc := expfmt.NewEncoder(w, format)
	for _, f := range families {
		if enc.Encode(f) != nil {
			return nil //nolint:nilerr // the caller went away
		}
	}
	if c, ok := enc.(expfmt.Closer); ok {
		_ = c.Close()
	}
	return nil
}

// metrics answers GET /metrics on the socket.
func (s *server) metrics(g prometheus.Gatherer) {
	scrapes := places(maxScrapes)
	s.mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		leave, err := scrapes.enter(r.Context())
		if err == nil {
			defer leave()
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.timeouts.answer))
			err = serveMetrics(w, r, g)
		}
		if err != nil {
			s.writeError(w, err)
		}
	})
}

// newMetricsServer is a server that knows nothing but GET /metrics.
func newMetricsServer(g prometheus.Gatherer, log *slog.Logger, p timeouts) *http.Server {
	s := &server{mux: http.NewServeMux(), timeouts: p}
	s.metrics(g)
	return serverOf(s.mux, log, p)
}

// offerMetrics serves the metrics on the configured address until ctx ends. While somebody
// else has the address, it tries again: the daemon has more important things to do than to
// fail for that.
func (o *Options) offerMetrics(ctx context.Context, g prometheus.Gatherer) {
	addr := o.Config.Metrics
	if addr == "" {
		return
	}
	srv := newMetricsServer(g, o.Log.Logger, defaultTimeouts)
	go func() {
		<-ctx.Done()
		_ = srv.Close()
	}()
	for told := false; ctx.Err() == nil; {
		l, err := net.Listen("tcp", addr)
		if err == nil {
			o.Log.Info("metrics are served", "url", "http://"+addr+"/metrics")
			_ = srv.Serve(&limitListener{Listener: l, places: make(chan struct{}, maxMetricsCallers)})
			return
		}
		if !told {
			told = true
			o.Log.Warn("metrics cannot be served yet: another try every 10 s", "address", addr, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(metricsRetry):
		}
	}
}

// loopback is a parameter that holds a loopback address with a port, or nothing.
type loopback struct{ v *string }

func (l loopback) String() string { return *l.v }
func (l loopback) Type() string   { return "address" }
func (l loopback) Set(s string) error {
	if s == "" {
		*l.v = s
		return nil
	}
	a, err := netip.ParseAddrPort(s)
	switch {
	case err != nil || a.Port() == 0:
		return fmt.Errorf("%q is not an address and a port: write %s", s, exampleMetrics)
	case !a.Addr().IsLoopback():
		return fmt.Errorf("%q can be reached from other machines, and who scrapes is not asked who he is: write %s, or have a proxy in front of it", s, exampleMetrics)
	}
	*l.v = s
	return nil
}

const exampleMetrics = "127.0.0.1:9469"
