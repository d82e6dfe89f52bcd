package daemon

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// What is measured, for Prometheus. A scrape looks at atomic counters and at the daemon's
// own tables. It asks neither driver nor disk, takes no lock that a request may wait for,
// and leaves out what is just going away.

// metric is one metric: its description, and what kind of value it has.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// allMetrics are those that are declared below.
var allMetrics []metric

func declare(kind prometheus.ValueType, name, help string, labels []string) metric {
	m := metric{prometheus.NewDesc("ublk_blksnap_"+name, help, labels, nil), kind}
	allMetrics = append(allMetrics, m)
	return m
}

func gauge(name, help string, labels ...string) metric {
	return declare(prometheus.GaugeValue, name, help, labels)
}

func counter(name, help string, labels ...string) metric {
	return declare(prometheus.CounterValue, name, help, labels)
}

var (
	metricBuild         = gauge("build_info", "The daemon's version.", "version")
	metricStarted       = gauge("start_time_seconds", "When the daemon started, since the epoch.")
	metricRecoveries    = counter("recoveries_total", "Daemons that took over from one that had died.")
	metricRecoveryWait  = gauge("recovery_io_wait_seconds", "How long I/O waited for the last such daemon, from its start on.", "kind")
	metricWaiting       = gauge("waiting_filters", "Filters whose I/O waits, because the daemon could not take them over yet.")
	metricUnfiltered    = gauge("unfiltered_disks", "Disks that the configuration names and that have no filter yet.")
	metricAttachedAnew  = counter("attached_anew_total", "How often a volume was attached anew, because another program had given it another table.")
	metricEventsDropped = counter("events_dropped_total", "Events of snapshots that nobody could keep.")
	metricLogDropped    = counter("log_lines_dropped_total", "Lines of the log that were dropped, as nobody took them.")

	metricFilter       = gauge("filter_info", "A filter and its original disk.", "device", "original", "path", "mode")
	metricAttached     = gauge("filter_attached", "Whether the filter is attached under its volume's own path.", "device")
	metricBypassed     = gauge("filter_bypassed", "Whether the requests of the volume do not come to the filter any more.", "device")
	metricSize         = gauge("filter_size_bytes", "Size of the disk.", "device")
	metricRequests     = counter("filter_requests_total", "Requests that were completed.", "device", "operation")
	metricBytes        = counter("filter_bytes_total", "Bytes of the requests that were completed.", "device", "operation")
	metricErrors       = counter("filter_errors_total", "Requests that ended with an error.", "device")
	metricInFlight     = gauge("filter_in_flight_requests", "Requests under way.", "device")
	metricSkipped      = counter("filter_discards_skipped_bytes_total", "Bytes of discards that were not passed on, because a snapshot needs them.", "device")
	metricUnregistered = counter("filter_unregistered_total", "Requests that failed because the kernel did not register their payload.", "device")

	metricCBT       = gauge("cbt_info", "The generation of a change map.", "device", "generation")
	metricTake      = gauge("cbt_take_number", "Number of the last take in its generation.", "device")
	metricBlocks    = gauge("cbt_blocks", "Blocks of a change map.", "device")
	metricBlockSize = gauge("cbt_block_size_bytes", "Size of a block.", "device")

	metricSnapshot = gauge("snapshot_info", "A snapshot, by its UUID and by its name if it has one, and one of its devices.", "snapshot", "name", "device")
	metricState    = gauge("snapshot_state", "1 for the state that the snapshot is in.", "snapshot", "state")
	metricCreated  = gauge("snapshot_created_time_seconds", "When the snapshot was created, since the epoch.", "snapshot")
	metricExpires  = gauge("snapshot_expires_time_seconds", "When the snapshot ends by itself, since the epoch, if it does.", "snapshot")
	metricFailed   = gauge("snapshot_failed", "Whether the snapshot is broken.", "snapshot")
	metricCopied   = gauge("snapshot_copied_chunks", "Chunks of old data that were copied.", "snapshot")
	metricStored   = gauge("snapshot_stored_chunks", "Chunks of them in the storage.", "snapshot")
	metricChunk    = gauge("snapshot_chunk_size_bytes", "Size of a chunk.", "snapshot")
	metricUsed     = gauge("snapshot_used_bytes", "What is used of the storage.", "snapshot")
	metricCapacity = gauge("snapshot_capacity_bytes", "What is allocated in the storage.", "snapshot")
	metricLimit    = gauge("snapshot_limit_bytes", "All that the storage can ever hold, as things are.", "snapshot")
	metricNeed     = gauge("snapshot_need_bytes", "The most that the snapshot can come to need.", "snapshot")
)

// put hands a value on.
type put func(m metric, v float64, labels ...string)

// collector is a daemon as Prometheus asks it.
type collector struct{ d *Daemon }

// Describe implements prometheus.Collector.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range allMetrics {
		out <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	put := func(m metric, v float64, labels ...string) {
		for i, text := range labels {
			labels[i] = strings.ToValidUTF8(text, "\ufffd") // paths may be anything, labels may not
		}
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
	}
	c.d.measure(put)
	for _, dev := range c.d.sortedDevices() {
		dev.measure(put)
	}
	for _, s := range c.d.sortedSnapshots() {
		c.d.measureSnapshot(s, put)
	}
}

// Gather implements prometheus.Gatherer.
func (d *Daemon) Gather() ([]*dto.MetricFamily, error) {
	r := prometheus.NewRegistry()
	if err := r.Register(collector{d}); err != nil {
		return nil, err
	}
	return r.Gather()
}

// since is a time as Prometheus has it.
func since(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }

func (d *Daemon) measure(put put) {
	d.mu.Lock()
	recovered, waiting := d.recovered, len(d.waiting)
	unfiltered := len(d.unfiltered())
	d.mu.Unlock()
	put(metricBuild, 1, control.Version)
	put(metricStarted, since(d.started))
	count := 0
	if recovered != nil {
		count = recovered.Count
		put(metricRecoveryWait, recovered.Pause.Seconds(), "filters")
		put(metricRecoveryWait, recovered.Images.Seconds(), "images")
	}
	put(metricRecoveries, float64(count))
	put(metricWaiting, float64(waiting))
	put(metricUnfiltered, float64(unfiltered))
	put(metricAttachedAnew, float64(d.attachedAnew.Load()))
	put(metricEventsDropped, float64(d.eventsDropped.Load()))
	put(metricLogDropped, float64(d.opts.Log.Lost()))
}

func (dev *device) measure(put put) {
	if !dev.use.TryRLock() { // it goes
		return
	}
	defer dev.use.RUnlock()
	if dev.gone {
		return
	}
	put(metricFilter, 1, dev.Name, dev.Original, dev.Path, string(dev.Mode))
	put(metricAttached, boolean01(dev.attached != nil), dev.Name)
	put(metricBypassed, boolean01(dev.whyBypassed() != ""), dev.Name)
	put(metricSize, float64(dev.Size), dev.Name)
	var failed, skipped uint64
	var inFlight int64
	var requests, bytes [ublk.OpWriteZeroes + 1]uint64
	for q := range dev.Queues {
		c := dev.filter.Counters(q)
		for op := range requests {
			requests[op] += c.Requests[op].Load()
			bytes[op] += c.Bytes[op].Load()
		}
		failed += c.Errors.Load()
		inFlight += c.InFlight.Load()
		skipped += c.Skipped.Load()
	}
	for op := ublk.OpRead; op <= ublk.OpWriteZeroes; op++ {
		put(metricRequests, float64(requests[op]), dev.Name, op.String())
		put(metricBytes, float64(bytes[op]), dev.Name, op.String())
	}
	put(metricErrors, float64(failed), dev.Name)
	put(metricInFlight, float64(inFlight), dev.Name)
	put(metricSkipped, float64(skipped), dev.Name)
	put(metricUnregistered, float64(dev.ublk.Unregistered()), dev.Name)
	info := dev.cbt.Last()
	put(metricCBT, 1, dev.Name, info.GenerationID.String())
	put(metricTake, float64(info.ChangesNumber), dev.Name)
	put(metricBlocks, float64(info.BlockCount), dev.Name)
	put(metricBlockSize, float64(info.BlockSize), dev.Name)
}

func (d *Daemon) measureSnapshot(s *snapshot, put put) {
	if !s.use.TryRLock() {
		return
	}
	defer s.use.RUnlock()
	if s.gone {
		return
	}
	broken := s.snap.Err() != 0
	d.mu.Lock()
	state, name, ends := s.stateLocked(broken), s.note.Name, s.note.Ends
	var devices []string
	for _, im := range s.images {
		devices = append(devices, im.device.Name)
	}
	d.mu.Unlock()
	for _, one := range []string{control.SnapshotCreated, control.SnapshotTaken, control.SnapshotCorrupted, control.SnapshotDestroying} {
		put(metricState, boolean01(one == state), s.id, one)
	}
	for _, device := range devices {
		put(metricSnapshot, 1, s.id, name, device)
	}
	put(metricCreated, since(s.created), s.id)
	if ends != 0 {
		put(metricExpires, since(ends.wall()), s.id)
	}
	put(metricFailed, boolean01(broken), s.id)
	u := s.usage()
	put(metricCopied, float64(u.Copied/s.chunk), s.id)
	put(metricStored, float64(u.Stored/s.chunk), s.id)
	put(metricChunk, float64(s.chunk), s.id)
	put(metricUsed, float64(u.Copied), s.id)
	put(metricCapacity, float64(u.Capacity), s.id)
	if u.Limit != 0 {
		put(metricLimit, float64(u.Limit), s.id)
	}
	put(metricNeed, float64(u.Need), s.id)
}

func boolean01(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
