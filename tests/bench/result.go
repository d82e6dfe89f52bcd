package main

import (
	"slices"
)

// row is a system under a workload, as it is written to the JSON file.
type row struct {
	Kernel     string  `json:"kernel"`
	System     string  `json:"system"`
	Workload   string  `json:"workload"`
	ChunkKiB   int64   `json:"chunk_kib"`
	IOPS       float64 `json:"iops"`
	MBps       float64 `json:"mbps"`
	LatMeanUS  float64 `json:"lat_mean_us"`
	LatP99US   float64 `json:"lat_p99_us"`
	CPUUSPerIO float64 `json:"cpu_us_per_io"`
	Runs       int     `json:"runs"`
	Spread     float64 `json:"spread"`

	turns []figures
}

// summarize fills the row from its turns.
func (r *row) summarize() {
	of := func(f func(figures) float64) float64 {
		var all []float64
		for _, t := range r.turns {
			all = append(all, f(t))
		}
		return median(all)
	}
	r.Runs = len(r.turns)
	r.IOPS = of(func(f figures) float64 { return f.IOPS })
	r.MBps = of(func(f figures) float64 { return f.MBps })
	r.LatMeanUS = of(func(f figures) float64 { return f.LatMeanUS })
	r.LatP99US = of(func(f figures) float64 { return f.LatP99US })
	r.CPUUSPerIO = of(func(f figures) float64 { return f.CPUUSPerIO })
	byIOPS := func(a, b figures) int {
		switch {
		case a.IOPS < b.IOPS:
			return -1
		case a.IOPS > b.IOPS:
			return 1
		}
		return 0
	}
	r.Spread = (slices.MaxFunc(r.turns, byIOPS).IOPS - slices.MinFunc(r.turns, byIOPS).IOPS) / r.IOPS
}

// median is the middle one, or the mean of the two in the middle; 0 of none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// ratio is how many times as fast as b a is: the median over the turns.
func ratio(a, b *row) float64 {
	var all []float64
	for i := range min(len(a.turns), len(b.turns)) {
		all = append(all, a.turns[i].IOPS/b.turns[i].IOPS)
	}
	return median(all)
}

// results are the rows of a run.
type results []*row

// find is the row of a system under a workload, or nil. chunk is in KiB.
func (rs results) find(system, workload string, chunk int64) *row {
	for _, r := range rs {
		if r.System == system && r.Workload == workload && r.ChunkKiB == chunk {
			return r
		}
	}
	return nil
}

// target is what the project wants: system at least want times as fast as base.
type target struct {
	workload  string
	system    string
	chunk     int64
	base      string
	baseChunk int64
	want      float64
}

// targets are those of a kernel with zero copy, or without.
func targets(zeroCopy bool, chunks []int64) []target {
	const random, single, row = "4k-qd32", "4k-qd1", "128k-qd8"
	ts := []target{}
	through := func(kind, base string, want float64) {
		prefix := "rand"
		if kind == row {
			prefix = ""
		}
		for _, rw := range []string{"read-", "write-"} {
			ts = append(ts, target{prefix + rw + kind, "filter", 0, base, 0, want})
		}
	}
	if zeroCopy {
		through(random, "raw", 0.95)
		through(random, "loop", 1.25)
		through(single, "loop", 0.95)
		through(row, "raw", 0.85)
	} else {
		through(random, "raw", 0.9)
		through(random, "loop", 1.05)
		through(single, "loop", 0.95)
		through(row, "raw", 0.6)
	}
	ts = append(ts,
		target{"first-randwrite-4k-qd32", "snapshot", 4, "dm-snapshot", 4, 1.5},
		target{"first-randwrite-4k-qd32", "snapshot", 256, "dm-snapshot", 256, 2.5},
		target{"first-randwrite-4k-qd32", "snapshot", 64, "dm-snapshot", 256, 5})
	// What the write-intent log costs once a zone has been written to, and what it costs to
	// encrypt.
	ts = append(ts,
		target{"zones-later-randwrite-4k-qd32", "logged", 0, "unlogged", 0, 0.95},
		target{"first-randwrite-4k-qd32", "encrypted", 64, "snapshot", 64, 0.7},
		target{"second-randwrite-4k-qd32", "encrypted", 64, "snapshot", 64, 0.95})
	for _, c := range chunks {
		ts = append(ts, target{"second-randwrite-4k-qd32", "snapshot", c >> 10, "filter", 0, 0.9})
	}
	for _, c := range chunks {
		ts = append(ts,
			target{"image-read-128k-qd8-cold", "snapshot", c >> 10, "dm-snapshot", c >> 10, 1},
			target{"image-read-128k-qd8-half", "snapshot", c >> 10, "dm-snapshot", c >> 10, 1})
	}
	return ts
}
