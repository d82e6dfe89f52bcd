package main

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// step is one workload on an instance. One without a name prepares the next.
type step struct {
	workload string
	onImage  bool
	job      job
}

// scene is steps on one instance, which is fresh at the first.
type scene struct {
	steps   []step
	systems []system
}

// plan is all that can be measured; each time-based run takes as long as
// duration.
func plan(duration time.Duration, chunks []int64) []scene {
	raw := system{"raw", 0, startRaw}
	filter := system{"filter", 0, startFilter}
	through := []system{raw, {"loop", 0, startLoop}, filter}
	var dm, ours []system
	for _, c := range chunks {
		dm = append(dm, system{"dm-snapshot", c, startDM})
		ours = append(ours, system{"snapshot", c, startSnapshot})
		if c == 64<<10 {
			ours = append(ours, system{"encrypted", c, startEncrypted})
		}
	}
	writers := append(append([]system{raw, filter}, dm...), ours...)
	var small, large []system
	for _, s := range writers {
		if s.chunk < 64<<10 {
			small = append(small, s)
		} else {
			large = append(large, s)
		}
	}
	readers := append(append([]system{raw}, dm...), ours...)

	var scenes []scene
	timed := func(rw string, block, depth int) step {
		j := job{rw: rw, block: block, depth: depth, size: diskSize, duration: duration}
		return step{workload: j.name(), job: j}
	}
	for _, s := range []step{
		timed("randread", 4<<10, 32), timed("randwrite", 4<<10, 32),
		timed("randread", 4<<10, 1), timed("randwrite", 4<<10, 1),
		timed("read", 128<<10, 8), timed("write", 128<<10, 8),
	} {
		scenes = append(scenes, scene{[]step{s}, through})
	}

	// A write to each MiB, which is a zone, and then wherever.
	each := job{rw: "write:1020k", block: 4 << 10, depth: 32, size: diskSize, bytes: diskSize / 256}
	later := timed("randwrite", 4<<10, 32)
	scenes = append(scenes, scene{[]step{{workload: "zones-4k-qd32", job: each}, {workload: "zones-later-" + later.workload, job: later.job}},
		[]system{{"unlogged", 0, startUnlogged}, {"logged", 0, startLogged}}})

	first := func(bytes int64) []step {
		j := job{rw: "randwrite", block: 4 << 10, depth: 32, size: diskSize, bytes: bytes}
		return []step{{workload: "first-" + j.name(), job: j}}
	}
	row := job{rw: "write", block: 128 << 10, depth: 8, size: 256 << 20, bytes: 256 << 20}
	second := job{rw: "randwrite", block: 4 << 10, depth: 32, size: row.size, duration: duration}
	scenes = append(scenes,
		scene{first(64 << 20), small}, scene{first(16 << 20), large},
		scene{[]step{{workload: "first-" + row.name(), job: row}, {workload: "second-" + second.name(), job: second}}, writers})

	image := func(end string, rw string, block, depth int) step {
		s := timed(rw, block, depth)
		return step{workload: "image-" + s.workload + "-" + end, onImage: true, job: s.job}
	}
	half := step{job: job{rw: "randwrite", block: 256 << 10, depth: 8, size: diskSize, bytes: diskSize / 2}}
	scenes = append(scenes, scene{[]step{
		image("cold", "read", 128<<10, 8), image("cold", "randread", 4<<10, 32),
		half,
		image("half", "read", 128<<10, 8), image("half", "randread", 4<<10, 32),
	}, readers})
	return scenes
}

// name is the job's part of a workload's name.
func (j job) name() string { return fmt.Sprintf("%s-%dk-qd%d", j.rw, j.block>>10, j.depth) }

// choose keeps what the pattern selects. Steps on which a chosen one depends
// stay, but those after the last are not needed.
func choose(scenes []scene, pattern *regexp.Regexp) []scene {
	var out []scene
	for _, sc := range scenes {
		var kept scene
		for _, s := range sc.systems {
			if n := sc.chosen(s, pattern); n > 0 {
				kept.systems = append(kept.systems, s)
				kept.steps = sc.steps[:max(n, len(kept.steps))]
			}
		}
		if len(kept.systems) > 0 {
			out = append(out, kept)
		}
	}
	return out
}

// chosen is the number of steps up to the last that the pattern selects for s.
func (sc scene) chosen(s system, pattern *regexp.Regexp) int {
	n := 0
	for i, st := range sc.steps {
		if st.workload != "" && pattern.MatchString(rowName(s, st)) {
			n = i + 1
		}
	}
	return n
}

func rowName(s system, st step) string {
	return strings.Join([]string{s.name, st.workload, fmt.Sprint(s.chunk >> 10)}, "/")
}
